"""The real model: tokens, probabilities, sampling options, interruption and errors, through the Python API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from nanoflow.core.errors import InvalidRequestError
from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.llm import LLM
from tests.e2e.conftest import GREEDY, hf_logits, one

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village,",
    "def fibonacci(n):\n    ",
    "The three primary colours are",
    "Water boils at",
    "In 1969, humans first",
    "My favourite recipe begins with",
    "E = mc^2 means that",
    "To install Python on Linux,",
    "Roses are red,",
    "The mitochondria is",
    "SELECT name FROM users WHERE",
    "Dear Sir or Madam,",
    "A haiku about rain:\n",
    "The derivative of x^2 is",
    "Shakespeare wrote",
    "1, 1, 2, 3, 5, 8,",
    "Ein Satz auf Deutsch:",
    "<p>Hello",
    "The longest river in the world is the Nile, which flows through " * 6,
]


def test_greedy_tokens_equal_transformers(llm: LLM, hf_model: Any) -> None:
    """Fed with our own output, transformers must choose the same token at each of its positions: so would its loop."""
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    for output in outputs:
        tokens = output.outputs[0].token_ids
        assert len(tokens) == 64
        logits = hf_logits(hf_model, output.prompt_token_ids + tokens[:-1])
        assert tokens == logits[len(output.prompt_token_ids) - 1 :].argmax(dim=-1).tolist(), output.prompt


def test_the_capital_of_france(llm: LLM) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = llm.chat(question, GREEDY, use_tqdm=False)[0]
    assert "Paris" in answer.outputs[0].text
    assert answer.prompt is not None and answer.prompt.endswith("<|im_start|>assistant\n")
    both = llm.chat([question, question], GREEDY, use_tqdm=False)
    assert [output.outputs[0].text for output in both] == [answer.outputs[0].text] * 2


OTHERS = [prompt[: 10 + 3 * n] for n, prompt in enumerate(PROMPTS)] + PROMPTS[:10]


@pytest.mark.parametrize("prompt", [PROMPTS[1], PROMPTS[-1]])
def test_a_seed_fixes_the_text_whatever_else_is_in_the_batch(llm: LLM, prompt: str) -> None:
    seeded = SamplingParams(temperature=1.0, seed=1234, max_tokens=28, ignore_eos=True)
    alone = llm.generate(prompt, seeded, use_tqdm=False)[0].outputs[0].token_ids
    assert len(OTHERS) == 30
    others = [SamplingParams(temperature=1.0, max_tokens=8 + n, top_k=n) for n in range(30)]
    crowd = llm.generate([*OTHERS[:15], prompt, *OTHERS[15:]], [*others[:15], seeded, *others[15:]], use_tqdm=False)
    assert crowd[15].outputs[0].token_ids == alone


@pytest.fixture(scope="module")
def chunking_llm() -> Iterator[LLM]:
    options: dict[str, Any] = {"dtype": "float32", "dense_batch": 16, "max_model_len": 160, "kv_memory_bytes": 1 << 26}
    with LLM("smollm2", show_progress=False, **options) as llm:
        yield llm


def test_a_seed_fixes_the_text_whole_or_chunked(llm: LLM, chunking_llm: LLM) -> None:
    seeded = {"temperature": 1.0, "seed": 7, "max_tokens": 24, "ignore_eos": True}
    assert one(chunking_llm, PROMPTS[-1], **seeded).token_ids == one(llm, PROMPTS[-1], **seeded).token_ids


def test_without_a_limit_the_context_is_the_limit(chunking_llm: LLM) -> None:
    output = one(chunking_llm, [504] * 157, max_tokens=None, ignore_eos=True)
    assert (len(output.token_ids), output.finish_reason) == (3, "length")
    with pytest.raises(InvalidRequestError, match="ask for at most 3"):
        one(chunking_llm, [504] * 157, max_tokens=4)


def test_seeds_and_choices_differ(llm: LLM) -> None:
    seeded = [SamplingParams(temperature=1.0, seed=seed, max_tokens=16) for seed in range(4)]
    texts = [output.outputs[0].text for output in llm.generate([PROMPTS[1]] * 4, seeded, use_tqdm=False)]
    assert len(set(texts)) == 4
    output = llm.generate(PROMPTS[1], SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=16), use_tqdm=False)[0]
    assert [choice.index for choice in output.outputs] == [0, 1, 2]
    assert len({choice.text for choice in output.outputs}) == 3
    assert output.outputs[0].text == texts[3]
    unseeded = llm.generate([PROMPTS[1]] * 3, SamplingParams(temperature=1.0, max_tokens=16), use_tqdm=False)
    assert len({output.outputs[0].text for output in unseeded}) == 3


def test_stop_strings_end_the_text_before_them(llm: LLM) -> None:
    free = one(llm, PROMPTS[0], max_tokens=24)
    start = len(free.text) // 2
    stop = free.text[start : start + 9]  # longer than a token, so it is split over several
    assert len(llm.tokenizer.encode(stop, add_special_tokens=False)) > 1
    cut = free.text.index(stop)
    stopped = one(llm, PROMPTS[0], max_tokens=24, stop=["never in there", stop])
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == (free.text[:cut], "stop", stop)
    assert len(stopped.token_ids) < len(free.token_ids)
    shown = one(llm, PROMPTS[0], max_tokens=24, stop=stop, include_stop_str_in_output=True)
    assert shown.text == free.text[:cut] + stop
    missed = one(llm, PROMPTS[0], max_tokens=24, stop="never in there")
    assert (missed.text, missed.finish_reason) == (free.text, "length")


def test_stop_ids_end_the_text_and_are_hidden(llm: LLM) -> None:
    free = one(llm, PROMPTS[0])
    token = free.token_ids[6]
    first = free.token_ids.index(token)
    stopped = one(llm, PROMPTS[0], stop_token_ids=[token])
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", token)
    assert stopped.text == llm.tokenizer.decode(free.token_ids[:first])
    shown = one(llm, PROMPTS[0], stop_token_ids=[token], include_stop_str_in_output=True)
    assert shown.text == llm.tokenizer.decode(free.token_ids[: first + 1])


def test_min_tokens_holds_back_stop_ids_and_stop_strings(llm: LLM) -> None:
    free = one(llm, PROMPTS[0], max_tokens=24)
    token = free.token_ids[2]
    longer = one(llm, PROMPTS[0], max_tokens=24, stop_token_ids=[token], min_tokens=10)
    assert len(longer.token_ids) >= 10 and token not in longer.token_ids[:10]
    early = llm.tokenizer.decode(free.token_ids[2:4])
    assert len(one(llm, PROMPTS[0], max_tokens=24, stop=early).token_ids) <= 4
    held = one(llm, PROMPTS[0], max_tokens=24, stop=early, min_tokens=8)
    assert len(held.token_ids) > 8
    assert held.text.startswith(llm.tokenizer.decode(free.token_ids[:7]))


def test_lengths(llm: LLM) -> None:
    for count in (1, 2, 17):
        output = one(llm, PROMPTS[0], max_tokens=count)
        assert (len(output.token_ids), output.finish_reason) == (count, "length")
    chat = [{"role": "user", "content": "Say hello."}]
    ended = llm.chat(chat, SamplingParams(temperature=0, max_tokens=200), use_tqdm=False)[0].outputs[0]
    assert ended.finish_reason == "stop" and ended.stop_reason is None
    assert ended.token_ids[-1] in llm.tokenizer.eos_ids
    assert "<|im_end|>" not in ended.text
    count = len(ended.token_ids) + 5
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    longer = llm.chat(chat, params, use_tqdm=False)[0].outputs[0]
    assert longer.finish_reason == "length" and len(longer.token_ids) == count
    assert longer.token_ids[: len(ended.token_ids)] == ended.token_ids


def test_logit_bias_forces_and_forbids(llm: LLM) -> None:
    token = llm.tokenizer.encode(" banana", add_special_tokens=False)[0]
    assert one(llm, PROMPTS[0], logit_bias={token: 100.0}, max_tokens=4).token_ids == [token] * 4
    free = one(llm, PROMPTS[0]).token_ids
    assert one(llm, PROMPTS[0], logit_bias={free[0]: -100.0}).token_ids[0] != free[0]


def test_logprobs_are_the_models(llm: LLM, hf_model: Any) -> None:
    output = llm.generate(
        PROMPTS[:3],
        [SamplingParams(temperature=t, seed=1, max_tokens=12, logprobs=k) for t, k in ((0, 5), (1.5, 3), (0, 0))],
        use_tqdm=False,
    )
    for request, n_top, greedy in zip(output, (5, 3, 0), (True, False, True), strict=True):
        choice = request.outputs[0]
        assert choice.logprobs is not None and len(choice.logprobs) == len(choice.token_ids)
        theirs = hf_logits(hf_model, request.prompt_token_ids + choice.token_ids[:-1]).log_softmax(dim=-1)
        theirs = theirs[len(request.prompt_token_ids) - 1 :]
        for token, table, row in zip(choice.token_ids, choice.logprobs, theirs, strict=True):
            assert token in table
            assert n_top <= len(table) <= n_top + 1 and len(table) >= 1
            assert sum(np.exp(entry.logprob) for entry in table.values()) <= 1.0 + 1e-6
            for other, entry in table.items():
                assert entry.logprob == pytest.approx(float(row[other]), abs=2e-3)
                assert entry.rank == int((row > row[other]).sum()) + 1
                assert entry.decoded_token == llm.tokenizer.token_text(other)
            assert set(row.topk(n_top).indices.tolist()) <= set(table)
            assert table[token].rank == 1 or not greedy
        total = sum(table[token].logprob for token, table in zip(choice.token_ids, choice.logprobs, strict=True))
        assert choice.cumulative_logprob == pytest.approx(total)
    assert any(
        t[k].rank != 1 for t, k in zip(output[1].outputs[0].logprobs or [], output[1].outputs[0].token_ids, strict=True)
    )


def test_prompt_logprobs_are_the_models(llm: LLM, hf_model: Any) -> None:
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=2)
    for output in llm.generate(
        [PROMPTS[2], PROMPTS[-1] * 3], params, use_tqdm=False
    ):  # the second spans chunks and blocks
        ids, tables = output.prompt_token_ids, output.prompt_logprobs
        assert tables is not None and len(tables) == len(ids) and tables[0] is None
        theirs = hf_logits(hf_model, ids).log_softmax(dim=-1)
        for position in range(1, len(ids)):
            table, row = tables[position], theirs[position - 1]
            assert table is not None and ids[position] in table
            assert set(row.topk(2).indices.tolist()) <= set(table)
            for token, entry in table.items():
                assert entry.logprob == pytest.approx(float(row[token]), abs=5e-3)
    assert one_token_prompt(llm) == [None]


def one_token_prompt(llm: LLM) -> Any:
    return llm.generate([[504]], SamplingParams(max_tokens=1, prompt_logprobs=1), use_tqdm=False)[0].prompt_logprobs


@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 1.5},
        {"repetition_penalty": 0.8, "presence_penalty": -0.5, "frequency_penalty": 1.2},
    ],
)
def test_penalties_against_a_plain_loop(llm: LLM, hf_model: Any, penalties: dict[str, float]) -> None:
    prompt = llm.tokenizer.encode("one two, one two, one two, one")
    beside = SamplingParams(temperature=0, max_tokens=9, repetition_penalty=1.9)
    ours = (
        llm.generate(
            [PROMPTS[3], prompt, PROMPTS[4]],
            [beside, SamplingParams(temperature=0, max_tokens=14, **penalties), beside],  # type: ignore[arg-type]
            use_tqdm=False,
        )[1]
        .outputs[0]
        .token_ids
    )
    assert len(ours) == 14
    all_logits = hf_logits(hf_model, prompt + ours[:-1])[len(prompt) - 1 :].tolist()
    for step, logits in enumerate(all_logits):  # fed with our own output, as in the greedy test
        output = ours[:step]
        for token in set(prompt) | set(output):
            factor = penalties.get("repetition_penalty", 1.0)
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        for token in set(output):
            logits[token] -= penalties.get("presence_penalty", 0.0)
            logits[token] -= penalties.get("frequency_penalty", 0.0) * output.count(token)
        assert ours[step] == max(range(len(logits)), key=logits.__getitem__), step
    assert ours != one(llm, prompt, max_tokens=14).token_ids, "the penalties changed something"
