"""The Python API around the real model: prompt forms, errors, interruption, shutdown."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanoflow.core.errors import EngineDeadError, InvalidRequestError
from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.llm import LLM
from tests.e2e.conftest import GREEDY, one
from tests.e2e.tiny_models import save_tiny_model

PROMPTS = ["The capital of France is", *(f"{n} things to see in Rome are" for n in range(2, 21))]


def test_ctrl_c_ends_the_call_and_leaves_the_model_usable(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    core = llm._engine.core
    step, steps = core.step, 0

    def interrupting(in_flight: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 5:
            signal.raise_signal(signal.SIGINT)
        return step(in_flight)

    monkeypatch.setattr(core, "step", interrupting)
    before = llm.stats().finished.get("abort", 0)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, SamplingParams(max_tokens=500, ignore_eos=True), use_tqdm=False)
    assert steps < 20
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    stats = llm.stats()
    assert stats.finished["abort"] == before + len(PROMPTS)
    assert (stats.kv_pages_used, stats.n_running, stats.n_waiting) == (0, 0, 0)
    assert "Paris" in one(llm, PROMPTS[0]).text


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ([1] * 9000, "shorten the prompt"),
        ([1, 2, 49152], "whole numbers from 0 to 49151"),
        ([-1], "whole numbers from 0 to 49151"),
        ([True], "whole numbers from 0 to 49151"),
        ([[1.5]], "whole numbers from 0 to 49151"),
        ("half a \ud83d smile", "lone surrogate"),
        ("", "prompt is empty"),
        ([[]], "prompt is empty"),
        ({"text": "x"}, "'prompt' or 'prompt_token_ids'"),
        ({"prompt_token_ids": None}, "list of token ids"),
        ([2.5], "list of token ids"),
    ],
)
def test_wrong_prompts_are_refused_with_a_sentence(llm: LLM, prompt: Any, sentence: str) -> None:
    with pytest.raises(InvalidRequestError, match=sentence):
        llm.generate(prompt, GREEDY, use_tqdm=False)


def test_one_wrong_prompt_stops_the_call_before_it_begins(llm: LLM) -> None:
    done = sum(llm.stats().finished.values())
    with pytest.raises(InvalidRequestError):
        llm.generate(["fine", ""], GREEDY, use_tqdm=False)
    assert sum(llm.stats().finished.values()) == done
    with pytest.raises(InvalidRequestError, match="2 prompts but 3 sampling parameters"):
        llm.generate(["a", "b"], [GREEDY] * 3, use_tqdm=False)


def test_prompts_in_every_form(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPTS[0])
    few = SamplingParams(temperature=0, max_tokens=4)
    wanted = one(llm, PROMPTS[0], max_tokens=4).token_ids
    forms: list[Any] = [ids, tuple(ids), np.array(ids), {"prompt": PROMPTS[0]}, {"prompt_token_ids": ids}]
    for form in forms:
        assert one(llm, form, max_tokens=4).token_ids == wanted
    together = llm.generate([PROMPTS[0], *forms], few, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in together] == [wanted] * 6
    assert llm.generate([], GREEDY) == []


def test_a_top_k_above_every_vocabulary_keeps_it_whole(llm: LLM) -> None:
    wanted = one(llm, PROMPTS[0], temperature=1.0, seed=2).token_ids
    assert one(llm, PROMPTS[0], temperature=1.0, seed=2, top_k=2**40).token_ids == wanted


@pytest.fixture
def small(tmp_path: Path) -> Callable[[], LLM]:
    """Makes LLMs of a tiny random model."""
    save_tiny_model("qwen2", tmp_path)
    options: dict[str, Any] = {"tokenizer": "bytes", "dtype": "float32", "kv_memory_bytes": 1 << 20}
    return lambda: LLM(str(tmp_path), show_progress=False, **options)


def test_the_context_manager_shuts_down(small: Callable[[], LLM]) -> None:
    threads = threading.active_count()
    with small() as llm:
        assert len(one(llm, [1, 2, 3], max_tokens=2).token_ids) == 2
        assert threading.active_count() > threads
    assert threading.active_count() == threads
    with pytest.raises(EngineDeadError, match="shut down"):
        llm.generate("x", GREEDY)
    llm.shutdown()


def test_a_dropped_model_gives_its_threads_back(small: Callable[[], LLM]) -> None:
    threads = threading.active_count()
    llm = small()
    assert threading.active_count() > threads
    del llm
    gc.collect()
    assert threading.active_count() == threads


def test_a_second_ctrl_c_breaks_in_and_says_so(small: Callable[[], LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    with small() as llm:
        scheduler = llm._engine.core.scheduler

        def interrupt_twice(*_: Any) -> None:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(scheduler, "retire", interrupt_twice)
        with pytest.raises(KeyboardInterrupt):
            one(llm, [1, 2, 3])
        with pytest.raises(EngineDeadError, match="KeyboardInterrupt"):
            one(llm, [1, 2, 3])


def test_who_handles_ctrl_c_goes_on_doing_so(small: Callable[[], LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        with small() as llm:
            core = llm._engine.core
            step = core.step
            monkeypatch.setattr(core, "step", lambda batch: (signal.raise_signal(signal.SIGINT), step(batch))[1])
            assert len(one(llm, [1, 2], max_tokens=3).token_ids) == 3
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(heard) >= 3


def test_a_failed_device_is_said_and_can_be_shut_down(
    small: Callable[[], LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = threading.active_count()
    llm = small()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(llm._engine.core._launcher.decoder, "lm_head", fail)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="out of order"):
        one(llm, [1, 2])
    assert llm.stats().finished == {"error": 1}
    assert llm.stats().kv_pages_used == 0
    with pytest.raises(EngineDeadError, match="out of order"):
        one(llm, [1, 2])
    llm.shutdown()
    assert threading.active_count() == threads


def test_torch_threads_of_the_caller_are_left_alone(llm: LLM) -> None:
    before = torch.get_num_threads()
    one(llm, PROMPTS[0])
    assert torch.get_num_threads() == before
