"""The executor of recordings without a GPU: launches in place of replays, kernels that read only what was staged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.e2e.tiny_models import make_tiny_engine, prompt_of, run, save_tiny_model

from nanoflow.core.batch import Int32Array
from nanoflow.core.sampling import SamplingParams
from nanoflow.device.base import Issue, Program
from nanoflow.executor.bucket import bucket_sizes, with_border
from nanoflow.executor.captured import CapturedExecutor
from nanoflow.kernels.base import AttentionPlan
from nanoflow.kernels.reference import ReferenceKernels
from nanoflow.pipeline.baselines import nano_batches
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.pipeline import LaneSpec, Pipeline

DENSE_BATCH, PAGE, N_SMS, MAX_REQUESTS = 24, 16, 100, 8
PROMPTS = [prompt_of(length, seed=length) for length in (30, 2, 17, 5)]
GREEDY = [SamplingParams(temperature=0, max_tokens=4 + 3 * n) for n in range(len(PROMPTS))]


class Work:
    """A planner that writes down what it is given: how many requests, then four numbers each."""

    def __init__(self, n_requests: int) -> None:
        self.n_ints = 1 + 4 * n_requests

    def plan(self, *columns_and_out: Int32Array) -> None:
        *columns, out = columns_and_out
        out[0] = len(columns[0])
        out[1 : 1 + 4 * len(columns[0])] = np.stack(columns, axis=1).reshape(-1)

    def bind(self, ints: torch.Tensor) -> Any:
        return ints


class StagedKernels(ReferenceKernels):
    """Attention that reads the staged work list; notes the multiprocessors that planners are made for."""

    def __init__(self) -> None:
        super().__init__()
        self.lane_sms: list[tuple[int, int]] = []

    def attention_work(self, *, n_rows: int, n_requests: int, lane_sms: int, **_: Any) -> Work:  # type: ignore[override]
        self.lane_sms.append((n_rows, lane_sms))
        return Work(n_requests)

    def attention(self, qkv_tn: Any, kv_layer: Any, plan: AttentionPlan, out_tn: Any, **shape: Any) -> None:
        count = int(plan.work[0])
        if not count:
            return
        start, length, context, page = plan.work[1 : 1 + 4 * count].view(-1, 4).T.contiguous()
        width = -(-int(context.max()) // PAGE)
        table = torch.stack([torch.nn.functional.pad(plan.page_table[p : p + width], (0, width))[:width] for p in page])
        most = int(length.max()), int(context.max())
        super().attention(qkv_tn, kv_layer, AttentionPlan(start, length, context, table, count, *most), out_tn, **shape)


class Lane:
    """Runs at once."""

    def __init__(self, name: str, n_sms: int) -> None:
        self.name, self.n_sms = name, n_sms

    def run(self, work: Callable[[Any], None], state: Any) -> None:
        work(state)

    def wait(self, events: Sequence[Any]) -> None: ...

    def record(self, event: Any) -> None: ...


class Launches:
    """A device that launches where a GPU replays, and notes the lanes of what it was told to run."""

    torch_device, main, n_sms = torch.device("cpu"), None, N_SMS

    def __init__(self) -> None:
        self.lanes: list[Lane] = []
        self.layers: list[set[str]] = []
        self.recorded: list[int] = []

    def open_lanes(self, lanes: Sequence[tuple[str, float]]) -> None:
        self.lanes = [Lane(name, round(share * N_SMS)) for name, share in lanes]

    def start(self, program: Program, states: Sequence[Any], issue: Issue) -> Any:
        lanes = [*self.lanes, Lane("whole", N_SMS)]
        names = {lanes[launch.lane].name for launch in program.launches if "@" in launch.label}
        if names:
            self.layers.append(names)
        with torch.no_grad():
            issue(program.launches, lanes, states, [None] * program.n_events)  # type: ignore[arg-type, list-item]
        return SimpleNamespace(synchronize=lambda: None)

    def capture(self, program: Program, states: Sequence[Any], issue: Issue) -> None:
        self.recorded.append(id(program))


class Event:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


def two_lanes(graph: Any, min_tokens: int) -> Pipeline:
    """Halves on a third and two thirds of the device."""
    cut = nano_batches(graph, DENSE_BATCH, [10])
    nano_ops = tuple(replace(nano, lane="a" if nano.start else "b") for nano in cut.nano_ops)
    return Pipeline("two", DENSE_BATCH, (LaneSpec("a", 0.33), LaneSpec("b", 0.67)), nano_ops, min_tokens=min_tokens)


@pytest.mark.parametrize("min_tokens", [0, 9, DENSE_BATCH])
def test_small_batches_run_in_sequential_order_and_give_the_same_tokens(
    min_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    save_tiny_model("qwen3", tmp_path)
    engine = make_tiny_engine(
        tmp_path, "reference", dense_batch=DENSE_BATCH, max_running=MAX_REQUESTS, enable_prefix_caching=False
    )
    wanted = run(engine, PROMPTS, GREEDY)
    inner: Any = engine.core.launcher
    decoder, device, kernels = inner.decoder, Launches(), StagedKernels()
    decoder.kernels = kernels
    pipeline = two_lanes(layer_graph(engine.spec), min_tokens)
    sizes = {"max_requests": MAX_REQUESTS, "max_pages": 32, "page_tokens": PAGE}
    executor = CapturedExecutor(
        pipeline, decoder, device, inner.head.sampler, len(inner._last_tokens), torch.float32, **sizes
    )  # type: ignore[arg-type]
    whole = [rows for rows, sms in kernels.lane_sms if sms == N_SMS]
    assert max(whole, default=0) == max(0, min_tokens - 1), "planners of small batches have the whole device"
    executor.warm_up(capture=False)
    assert len(device.layers) == (2 if min_tokens else 1) and device.layers[0] == {"a", "b"}
    executor.warm_up()
    assert len(set(device.recorded)) == (3 if min_tokens else 2), "one program a way, and the head"
    device.layers.clear()
    tokens: list[int] = []

    def launch(plan: Any) -> Any:
        tokens.append(plan.n_tokens)
        return executor.launch(plan)

    engine.core.relaunch_with(SimpleNamespace(launch=launch), asynchronous=True, min_tokens=min_tokens)
    before = engine.core.stats().work
    assert run(engine, PROMPTS, GREEDY) == wanted
    assert device.layers == [{"whole"} if n < min_tokens else {"a", "b"} for n in tokens]
    assert max(tokens) == DENSE_BATCH and min(tokens) < 9
    small = (engine.core.stats().work - before).small_iterations
    assert small == sum(n < min_tokens for n in tokens)
    engine.close()


def test_no_recorded_size_serves_batches_on_both_sides_of_the_threshold() -> None:
    for min_tokens in (0, 1, 2, 64, 65, 500, 512, 2048):
        sizes = with_border(bucket_sizes(2048), min_tokens)
        assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == 2048
        assert len(sizes) <= len(bucket_sizes(2048)) + 1
        below = 0
        for size in sizes:
            assert size < min_tokens or below + 1 >= min_tokens, "its batches have below + 1 to size tokens"
            below = size
