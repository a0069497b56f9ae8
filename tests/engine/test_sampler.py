"""The sampler around the kernels: penalties, biases, log-probabilities, and plans cut into blocks of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanoflow.core.batch import MaskPlan, PenaltyPlan, PenaltyReset, SamplingPlan
from nanoflow.engine.sampler import LogitsSampler, PenaltyTable
from nanoflow.executor.head import LOGIT_ROWS, BlockHead
from nanoflow.kernels.registry import available, create

VOCAB = 50
CPU = torch.device("cpu")
BACKENDS = [name for name, refusal in available("cpu", torch.float32) if refusal is None]


def ints(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def floats(values: Sequence[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def plan(n: int, seed: int = 0, **changes: Any) -> SamplingPlan:
    """Rows of every kind: greedy and random, truncated and not."""
    rng = np.random.default_rng(seed)
    base = SamplingPlan(
        token_rows=ints(range(n)),
        slots=ints(range(n)),
        temperature=floats(rng.choice([0.0, 0.7, 1.3], n)),
        top_k=ints(rng.choice([0, 3, 20], n)),
        top_p=floats(rng.choice([1.0, 0.8], n)),
        min_p=floats(rng.choice([0.0, 0.05], n)),
        keys=rng.integers(-(2**63), 2**63 - 1, n),
        n_logprobs=ints([-1] * n),
        bias_rows=ints([]),
        bias_tokens=ints([]),
        bias_values=floats([]),
    )
    return replace(base, **changes)


def penalties(rows: Sequence[int], resets: tuple[PenaltyReset, ...] = (), **changes: float) -> PenaltyPlan:
    n = len(rows)
    values = {"repetition": 1.0, "presence": 0.0, "frequency": 0.0, **changes}
    return PenaltyPlan(ints(rows), **{name: floats([value] * n) for name, value in values.items()}, resets=resets)


def logits_of(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def make_sampler(kernels: str = BACKENDS[0]) -> LogitsSampler:
    return LogitsSampler(create(kernels, "cpu", torch.float32), VOCAB, CPU)


def test_penalties_change_what_they_say() -> None:
    table = PenaltyTable(VOCAB, CPU)
    reset = PenaltyReset(0, prompt_ids=ints([1, 2]), output_ids=ints([2, 3, 3]))
    both = penalties([0, -1], (reset,), repetition=2.0, presence=0.5, frequency=0.25)
    table.reset(both)
    logits = torch.ones(2, VOCAB)
    logits[:, 3] = -1.0
    table.apply(logits, both)
    assert logits[0, 0] == 1.0
    assert logits[0, 1] == 0.5, "in the prompt: repetition alone"
    assert logits[0, 2] == 0.5 - 0.5 - 0.25
    assert logits[0, 3] == -2.0 - 0.5 - 2 * 0.25, "negative logits are multiplied"
    assert logits[1].tolist() == [1.0] * 3 + [-1.0] + [1.0] * (VOCAB - 4), "no row, no penalty"
    table.count(torch.tensor([0, 0], dtype=torch.int32), both)
    again = torch.ones(2, VOCAB)
    table.apply(again, both)
    assert again[0, 0] == 0.5 - 0.5 - 0.25


def test_penalty_rows_are_filled_anew_and_grow() -> None:
    table = PenaltyTable(VOCAB, CPU)
    table.reset(penalties([0], (PenaltyReset(0, ints([5]), ints([5])),)))
    table.reset(penalties([0, 9], (PenaltyReset(9, ints([7]), ints([7, 7])),)))
    logits = torch.zeros(2, VOCAB)
    table.apply(logits, penalties([0, 9], frequency=1.0))
    assert (logits[0, 5], logits[1, 7], logits.sum()) == (-1.0, -2.0, -3.0)
    table.reset(penalties([0], (PenaltyReset(0, ints([1]), ints([])),)))
    logits = torch.zeros(1, VOCAB)
    table.apply(logits, penalties([0], frequency=1.0, presence=1.0))
    assert logits.abs().sum() == 0.0, "the request before left nothing behind"


@pytest.mark.parametrize("kernels", BACKENDS)
def test_greedy_bias_and_bans(kernels: str) -> None:
    logits = logits_of(3)
    best = logits.argmax(dim=1).tolist()
    other = (best[0] + 1) % VOCAB
    rows = plan(
        3,
        temperature=floats([0, 0, 0]),
        bias_rows=ints([0, 1]),
        bias_tokens=ints([other, best[1]]),
        bias_values=floats([100.0, -np.inf]),
    )
    tokens = torch.empty(3, dtype=torch.int32)
    assert make_sampler(kernels).sample(logits.clone(), rows, tokens) is None
    second = logits[1].topk(2).indices[1].item()
    assert tokens.tolist() == [other, second, best[2]]


@pytest.mark.parametrize("kernels", BACKENDS)
def test_logprobs_are_those_of_the_unchanged_logits(kernels: str) -> None:
    logits = logits_of(4)
    rows = plan(
        4,
        n_logprobs=ints([2, -1, 0, 5]),
        any_logprobs=True,
        bias_rows=ints([0]),
        bias_tokens=ints([13]),
        bias_values=floats([100.0]),
    )
    tokens = torch.empty(4, dtype=torch.int32)
    arrays = make_sampler(kernels).sample(logits.clone(), rows, tokens)
    assert arrays is not None and tokens[0] == 13
    wanted = logits.log_softmax(dim=1)
    for row, token in enumerate(tokens.tolist()):
        assert arrays.chosen[row] == pytest.approx(wanted[row, token].item(), abs=1e-5)
        assert arrays.rank[row] == 1 + (wanted[row] > wanted[row, token]).sum()
        assert arrays.top_ids[row].tolist() == wanted[row].topk(5).indices.tolist()


@pytest.mark.parametrize("kernels", BACKENDS)
def test_sampled_tokens_count_towards_penalties(kernels: str) -> None:
    sampler, logits = make_sampler(kernels), logits_of(2)
    reset = PenaltyReset(0, ints([]), ints([]))
    chosen = []
    for resets in ((reset,), (), ()):
        rows = plan(2, temperature=floats([0, 0]), penalties=penalties([0, -1], resets, frequency=100.0))
        sampler.begin(rows)
        tokens = torch.empty(2, dtype=torch.int32)
        sampler.sample(logits.clone(), rows, tokens)
        chosen.append(tokens.tolist())
    assert [first for first, _ in chosen] == logits[0].topk(3).indices.tolist(), "each token once, then the next best"
    assert [second for _, second in chosen] == [logits[1].argmax().item()] * 3


class _Decoder:
    """Stands in for the model: the logits of token row r are row r of a fixed matrix."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.spec = SimpleNamespace(vocab_size=logits.shape[1])

    def lm_head(self, x_td: Tensor, rows: Tensor, out: Tensor) -> None:
        out.copy_(self.logits[rows.long()])


def head_of(logits: Tensor) -> BlockHead:
    """An executor's sampling half alone."""
    last_tokens = torch.zeros(len(logits), dtype=torch.int32)
    return BlockHead(_Decoder(logits), make_sampler(), torch.empty(0), last_tokens)  # type: ignore[arg-type]


def test_many_rows_are_sampled_in_blocks_as_if_in_one() -> None:
    n = 2 * LOGIT_ROWS + 37
    logits, rng = logits_of(n), np.random.default_rng(3)
    n_logprobs = np.where(np.arange(n) < LOGIT_ROWS, 1, np.where(np.arange(n) < 2 * LOGIT_ROWS, -1, 4))
    resets = tuple(PenaltyReset(r, ints([r % VOCAB]), ints([(r + 1) % VOCAB] * 3)) for r in range(n))
    biased = ints(rng.choice(n, 60, replace=False))
    whole = plan(
        n,
        token_rows=ints(rng.permutation(n)),
        slots=ints(rng.permutation(n)),
        n_logprobs=n_logprobs.astype(np.int32),
        any_logprobs=True,
        penalties=replace(
            penalties([r if r % 3 else -1 for r in range(n)], resets, repetition=1.4, frequency=0.7),
            presence=floats(rng.uniform(-1, 1, n)),
        ),
        bias_rows=biased,
        bias_tokens=ints(rng.integers(0, VOCAB, 60)),
        bias_values=floats(rng.uniform(-5, 5, 60)),
    )
    head = head_of(logits)
    for _ in range(2):  # the second time with the first time's counts
        tokens, arrays = head.sample(whole)
        whole = replace(whole, penalties=replace(whole.penalties, resets=()))  # type: ignore[type-var]
    plain = make_sampler()
    plain._penalties.reset(penalties([0], resets))
    for _ in range(2):
        wanted = torch.empty(n, dtype=torch.int32)
        expected = plain.sample(logits[torch.from_numpy(whole.token_rows).long()], whole, wanted)
    assert tokens.tolist() == wanted.tolist()
    assert head._last_tokens[torch.from_numpy(whole.slots).long()].tolist() == wanted.tolist()
    assert arrays is not None and expected is not None
    np.testing.assert_allclose(arrays.chosen, expected.chosen, rtol=1e-6)
    assert arrays.rank.tolist() == expected.rank.tolist()
    for row, count in enumerate(n_logprobs.tolist()):
        width = max(count, 0)
        assert arrays.top_ids[row, :width].tolist() == expected.top_ids[row, :width].tolist()


def test_nothing_to_sample() -> None:
    tokens, arrays = head_of(logits_of(2)).sample(plan(0))
    assert len(tokens) == 0 and arrays is None


@pytest.mark.parametrize("kernels", BACKENDS)
def test_masked_rows_choose_among_their_tokens_and_others_as_before(kernels: str) -> None:
    n = 40
    rng = np.random.default_rng(3)
    rows = ints(sorted(rng.choice(n, 17, replace=False)))
    may = rng.random((17, VOCAB)) < 0.1
    may[np.arange(17), rng.integers(0, VOCAB, 17)] = True
    padded = np.pad(may, ((0, 0), (0, 64 - VOCAB)), constant_values=True)  # bits beyond the vocabulary mean nothing
    bits = np.packbits(padded, axis=1, bitorder="little").view(np.int32)
    free, tokens = plan(n), torch.empty(n, dtype=torch.int32)
    make_sampler(kernels).sample(logits_of(n), free, tokens)
    chosen = torch.empty(n, dtype=torch.int32)
    make_sampler(kernels).sample(logits_of(n), replace(free, masks=MaskPlan(rows, bits)), chosen)
    assert may[np.arange(17), chosen.numpy()[rows]].all()
    others = np.setdiff1d(np.arange(n), rows)
    assert (chosen.numpy()[others] == tokens.numpy()[others]).all()
    best = np.where(may, logits_of(n).numpy()[rows], -np.inf).argmax(axis=1)
    greedy = free.temperature[rows] == 0
    assert greedy.any() and (chosen.numpy()[rows][greedy] == best[greedy]).all()
    every = replace(plan(17), masks=MaskPlan(ints(range(17)), bits))
    all_masked = torch.empty(17, dtype=torch.int32)
    make_sampler(kernels).sample(logits_of(17), every, all_masked)
    assert may[np.arange(17), all_masked.numpy()].all()


def test_blocks_of_rows_keep_their_masks() -> None:
    whole = replace(plan(10), masks=MaskPlan(ints([2, 5, 9]), np.arange(6, dtype=np.int32).reshape(3, 2)))
    part = whole.rows(4, 9).masks
    assert part is not None and part.rows.tolist() == [1] and part.bits.tolist() == [[2, 3]]
    assert whole.rows(6, 9).masks is None
    last = whole.rows(9, 10).masks
    assert last is not None and last.rows.tolist() == [0]
