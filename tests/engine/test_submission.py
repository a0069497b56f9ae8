"""What is wrong with a request is found before it is queued, names the field, and says what to change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nanoflow.core.errors import InvalidRequestError
from nanoflow.core.presets import PRESETS
from nanoflow.core.request import BACKGROUND, MAX_PRIORITY
from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.submission import Submission
from nanoflow.engine.table import AGE_BITS, MAX_TOP_K, N_STOP_IDS, RequestTable
from nanoflow.text.byte_tokenizer import ByteTokenizer

SPEC = PRESETS["smollm2"]
SUBMISSION = Submission(SPEC, ByteTokenizer(SPEC.vocab_size), max_model_len=100, eos_ids=(2, 0))


@pytest.mark.parametrize(
    ("n_prompt", "params", "field", "sentence"),
    [
        (100, {}, "prompt", "shorten the prompt"),
        (5000, {}, "prompt", "the prompt has 5000 tokens, but this model serves 100"),
        (90, {"max_tokens": 11}, "max_tokens", "ask for at most 10"),
        (90, {"max_tokens": None, "min_tokens": 11}, "min_tokens", "only 10 tokens fit"),
        (5, {"logit_bias": {SPEC.vocab_size: 1.0}}, "logit_bias", "ids end at 49151"),
        (5, {"stop_token_ids": [SPEC.vocab_size]}, "stop_token_ids", "ids end at 49151"),
        (5, {"stop_token_ids": range(10, 10 + N_STOP_IDS)}, "stop_token_ids", f"at most {N_STOP_IDS - 2} ids"),
    ],
)
def test_refusals(n_prompt: int, params: dict[str, Any], field: str, sentence: str) -> None:
    with pytest.raises(InvalidRequestError, match=sentence) as caught:
        SUBMISSION.sequences([1] * n_prompt, SamplingParams(**params))
    assert caught.value.param == field


def test_limits_that_just_fit() -> None:
    sequence = SUBMISSION.sequences([1] * 90, SamplingParams(max_tokens=10, min_tokens=10))[0]
    assert sequence.request.max_tokens == 10
    assert SUBMISSION.sequences([1] * 99, SamplingParams(max_tokens=None))[0].request.max_tokens == 1
    SUBMISSION.sequences([1], SamplingParams(stop_token_ids=[*range(10, 8 + N_STOP_IDS), 10]))


def test_choices_share_the_request_and_differ_by_seed() -> None:
    choices = SUBMISSION.sequences([1, 2], SamplingParams(n=4, seed=-5))
    assert [choice.request.index for choice in choices] == [0, 1, 2, 3]
    assert len({choice.request.seed for choice in choices}) == 4
    assert len({choice.request.request_id for choice in choices}) == 1
    again = SUBMISSION.sequences([1, 2], SamplingParams(n=4, seed=-5))
    assert [c.request.seed for c in choices] == [c.request.seed for c in again]
    unseeded = {SUBMISSION.sequences([1], SamplingParams())[0].request.seed for _ in range(5)}
    assert len(unseeded) == 5


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1, 2**63, 2**64 - 1])
def test_every_seed_and_top_k_finds_room_in_the_table(seed: int) -> None:
    table = RequestTable(1, 4)
    sequence = SUBMISSION.sequences([1], SamplingParams(seed=seed, top_k=2**70))[0]
    sequence.age = 0
    slot = table.admit(sequence, ())
    assert int(table.seed[slot]) % 2**64 == seed % 2**64
    assert table.top_k[slot] == MAX_TOP_K


def test_stop_strings_are_watched_while_the_engine_runs() -> None:
    assert SUBMISSION.sequences([1], SamplingParams(stop="x"))[0].stop_watch is not None
    assert SUBMISSION.sequences([1], SamplingParams())[0].stop_watch is None


@pytest.mark.parametrize(
    "priority", [MAX_PRIORITY + 1, -MAX_PRIORITY - 1, BACKGROUND + MAX_PRIORITY + 1, True, "5", 0.5]
)
def test_priorities_are_whole_numbers_within_limits(priority: Any) -> None:
    with pytest.raises(InvalidRequestError, match="priority must be a whole number from -1000000"):
        SUBMISSION.sequences([1], SamplingParams(), priority=priority)


@pytest.mark.parametrize(
    "priority", [-MAX_PRIORITY, 0, MAX_PRIORITY, BACKGROUND - MAX_PRIORITY, BACKGROUND + MAX_PRIORITY]
)
def test_every_priority_and_age_finds_room_in_the_table(priority: int) -> None:
    table = RequestTable(1, 4)
    (sequence,) = SUBMISSION.sequences([1], SamplingParams(), priority=priority)
    sequence.age = 2**AGE_BITS - 1
    slot = table.admit(sequence, ())
    assert table.priority(np.array([slot])).tolist() == [priority]
    assert sequence.request.in_background == (priority > MAX_PRIORITY)
