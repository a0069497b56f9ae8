"""How ranks with recordings choose tokens, without a GPU: launches in place of replays, on the CPU's collectives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanoflow.core.batch import MaskPlan, SamplingPlan
from nanoflow.device.base import Issue, Program
from nanoflow.executor import captured
from nanoflow.executor.captured import CapturedExecutor
from nanoflow.executor.executor import Executor
from nanoflow.executor.head import split_masked
from nanoflow.executor.head_states import head_layout
from nanoflow.executor.pinned import PinnedStage
from nanoflow.pipeline.graph import layer_graph
from tests.distributed.in_process import on_each, sharded
from tests.distributed.pipelines import DENSE_BATCH, PIPELINES
from tests.e2e.tiny_models import BACKENDS, make_tiny_engine, save_tiny_model

N_ROWS = 11
ROWS_A_REPLAY = 4


class Launches:
    """A device that launches where a GPU replays."""

    torch_device = torch.device("cpu")
    main = None

    def __init__(self) -> None:
        self.sizes: list[tuple[int, bool]] = []

    def start(self, program: Program, states: Sequence[Any], issue: Issue) -> None:
        self.sizes.append((states[0].n, states[0].parts))
        for launch in program.launches:
            launch.run(states[launch.state])


def head_alone(executor: Executor) -> CapturedExecutor:
    """What `CapturedExecutor` chooses tokens with, over a CPU executor's rows."""
    found = object.__new__(CapturedExecutor)
    found.decoder = executor.decoder
    found.device = Launches()  # type: ignore[assignment]
    found._sharded = executor.decoder  # type: ignore[assignment]
    found._n_slots = len(executor._last_tokens) - 1
    found._activations = executor._activations
    found._last_tokens = executor._last_tokens
    found.head = executor.head
    found._head_program = captured.Program((captured.Launch("head", captured.WHOLE, found._sample, 0),), 0)
    found._head_rows = N_ROWS
    found._head_stage = PinnedStage(head_layout(N_ROWS)[-1].stop, torch.device("cpu"))
    found._heads, found._limited_heads = found._make_heads(torch.float32)
    return found


def plan_of(top_k: list[int]) -> SamplingPlan:
    """All rows draw, those with a `top_k` above 0 from that many tokens."""
    rng = np.random.default_rng(0)
    n = len(top_k)
    return SamplingPlan(
        token_rows=np.arange(n, dtype=np.int32),
        slots=np.arange(n, dtype=np.int32),
        temperature=np.full(n, 1.2, np.float32),
        top_k=np.array(top_k, np.int32),
        top_p=np.ones(n, np.float32),
        min_p=np.zeros(n, np.float32),
        keys=rng.integers(0, 2**62, n),
        n_logprobs=np.full(n, -1, np.int32),
        bias_rows=np.zeros(0, np.int32),
        bias_tokens=np.zeros(0, np.int32),
        bias_values=np.zeros(0, np.float32),
    )


def masked(plan: SamplingPlan, rows: list[int], vocab_size: int) -> SamplingPlan:
    """`rows` may choose among tokens 64 to 95 alone."""
    bits = np.zeros((len(rows), -(-vocab_size // 32)), dtype=np.int32)
    bits[:, 2] = -1
    return replace(plan, masks=MaskPlan(np.array(rows, dtype=np.int32), bits))


@pytest.fixture
def executors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Executor]]:
    """Two ranks of a tiny model, whose layers have left the same rows on both."""
    monkeypatch.setattr(captured, "LIMITED_ROWS", ROWS_A_REPLAY)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    save_tiny_model("qwen2", tmp_path / "model")
    engine = make_tiny_engine(tmp_path / "model", BACKENDS[0], dense_batch=DENSE_BATCH)
    config = engine.config.with_options("device", tensor_parallel_size=2, threads=2)
    with sharded(config, PIPELINES["sequential"](layer_graph(engine.spec, 2)), tmp_path) as launcher:
        x_td = torch.randn(DENSE_BATCH, engine.spec.d_model, generator=torch.Generator().manual_seed(1))
        for executor in launcher.executors:
            executor._activations.x_td.copy_(x_td)
        yield launcher.executors
    engine.close()


def test_rows_without_masks_are_replayed_as_ever(executors: list[Executor]) -> None:
    free = plan_of([0] * N_ROWS)
    plan = masked(free, [1, 4, 5, 10], executors[0].decoder.spec.vocab_size)
    unmasked, _ = on_each(2, lambda rank: executors[rank].head.sample(free))[0]
    wanted, _ = on_each(2, lambda rank: executors[rank].head.sample(plan))[0]
    heads = [head_alone(executor) for executor in executors]
    split = split_masked(plan)
    assert split is not None
    chosen = on_each(2, lambda rank: heads[rank]._choose(*split, None))
    assert [one.tolist() for one in chosen] == [wanted.tolist()] * 2
    rows = np.array([1, 4, 5, 10])
    assert ((wanted.numpy()[rows] >= 64) & (wanted.numpy()[rows] < 96)).all()
    assert np.delete(wanted.numpy(), rows).tolist() == np.delete(unmasked.numpy(), rows).tolist()
    assert heads[0].device.sizes == [(8, True)], "the seven rows without a mask, in one replay"  # type: ignore[attr-defined]
    assert heads[0]._last_tokens[:N_ROWS].tolist() == wanted.tolist()
    assert split_masked(free) is None and split_masked(masked(free, list(range(N_ROWS)), 320)) is None


def test_limited_rows_take_replays_of_their_own(executors: list[Executor]) -> None:
    top_k = [0, 0, 0, 0, 3, 0, 0, 1, 0, 2, 0]
    plan = plan_of(top_k)
    wanted, _ = on_each(2, lambda rank: executors[rank].head.sample(plan))[0]
    heads = [head_alone(executor) for executor in executors]
    chosen = on_each(2, lambda rank: heads[rank]._replay_heads(plan, None))
    assert [one.tolist() for one in chosen] == [wanted.tolist()] * 2
    first, second, third = heads[0].device.sizes  # type: ignore[attr-defined]
    assert first == (8, True), "rows that keep every token need no gathering"
    assert second == third == (4, False)
    assert heads[0]._last_tokens[:N_ROWS].tolist() == wanted.tolist()
