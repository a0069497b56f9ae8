"""Results made by hand, whose figures can be worked out: a machine of 1 TFLOP/s and 100 GB/s, and SmolLM2's shapes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

from nanoflow.bench.result import (
    BenchKind,
    BenchResult,
    Bound,
    ClientOverhead,
    IterationTrace,
    MachineInfo,
    ModelInfo,
    OpTime,
    Run,
    Series,
    SpanInfo,
    WorkloadInfo,
)
from nanoflow.core.hardware import MachineRates
from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.presets import find_preset
from nanoflow.pipeline.baselines import nano_batches, sequential
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.pipeline import LaneSpec, Pipeline

RATES = MachineRates("test machine", "bfloat16", 1e12, 1e11, measured=True)
DENSE = 256
OP_US = 100.0


def spec() -> ModelSpec:
    found = find_preset("smollm2")
    assert found is not None
    return found


def overlapped() -> Pipeline:
    """Two nano-batches, attention on a lane of its own."""
    split = nano_batches(layer_graph(spec()), DENSE, [DENSE // 2])
    ops = tuple(replace(n, lane="memory" if "attention" in n.op else "compute") for n in split.nano_ops)
    return replace(split, name="two lanes", lanes=(LaneSpec("compute", 0.7), LaneSpec("memory", 0.3)), nano_ops=ops)


def plain() -> Pipeline:
    return sequential(layer_graph(spec()), DENSE)


def traced(pipeline: Pipeline) -> IterationTrace:
    """Every nano-operation takes 100 µs, one after the other."""
    spans: list[SpanInfo] = []
    for layer in range(spec().n_layers):
        for nano in pipeline.nano_ops:
            at = OP_US * len(spans)
            spans.append(SpanInfo(f"{nano.op}[{nano.start}:{nano.stop}]@{layer}", nano.lane, at, at + OP_US))
    n_ops = dict.fromkeys(str(nano.op) for nano in pipeline.nano_ops)
    total = OP_US * spec().n_layers
    ops = tuple(OpTime(op, total, spec().n_layers, 100 / len(n_ops)) for op in (*n_ops, "head"))
    return IterationTrace(3, OP_US * len(spans), DENSE, DENSE // 2, ops, tuple(spans))


def bound(name: str, tokens_per_s: float, reached: float) -> Bound:
    percent = 100 * reached / tokens_per_s
    floors = {"compute": 1.0, "memory": 0.5}
    return Bound(
        name, "compute", 1.0, percent, floors, {"compute": percent, "memory": percent / 2}, tokens_per_s, RATES
    )


def series(name: str, tokens_per_s: float, pipeline: Pipeline | None, *, trace: bool = True) -> Series:
    numbers = {"tokens_per_s": tokens_per_s, "output_tokens_per_s": tokens_per_s / 2}
    bounds = (
        bound("work done, measured rates", 2500.0, tokens_per_s),
        bound("steady state of the workload, measured rates", 4000.0, tokens_per_s),
    )
    return Series(
        name,
        (Run(0, 2.0, numbers, bounds), Run(1, 2.0, numbers, bounds)),
        numbers | {"tokens_per_s_deviation": 50.0, "output_tokens_per_s_deviation": 25.0},
        pipeline=None if pipeline is None else json.loads(pipeline.to_json()),
        trace=traced(pipeline) if pipeline is not None and trace else None,
    )


def result(kind: BenchKind, members: Sequence[Series], workload: str = "512/512") -> BenchResult:
    return BenchResult(
        kind=kind,
        title=f"a <{kind}> & its title",
        started_at="2026-03-04T05:06:07+00:00",
        command=("nanoflow", "bench", str(kind), "smollm2", "--workload", "a b"),
        versions={"nanoflow": "0.1.0", "torch": "2.13"},
        machine=MachineInfo("test machine", "cpu", rates=RATES, fingerprint={"cores": "2"}),
        model=ModelInfo("smollm2", "bfloat16", "smollm2", 134_515_008, asdict(spec())),
        workload=WorkloadInfo(workload, 200, 0, 512.0, 0.0, 512.0, 0.0),
        series=tuple(members),
        seeds=(0, 1),
        notes=("a <note>",),
    )


def offline() -> BenchResult:
    return result(BenchKind.OFFLINE, [series("sequential", 2000.0, plain())])


def peer() -> BenchResult:
    bare = replace(series("endpoint", 1000.0, None), runs=(Run(0, 2.0, {"tokens_per_s": 1000.0}),))
    return replace(
        result(BenchKind.OFFLINE, [bare]), target="http://localhost:9", machine=MachineInfo("far", "unknown")
    )


def ablation() -> BenchResult:
    members = [
        series("sequential", 2000.0, plain()),
        series("nano-batches", 1800.0, nano_batches(layer_graph(spec()), DENSE, [DENSE // 2]), trace=False),
        series("network and memory overlap", 2400.0, overlapped()),
        Series("network overlap", not_applicable="one device sends nothing"),
    ]
    return result(BenchKind.ABLATION, members)


def online() -> BenchResult:
    members = []
    for rate, mean_s in ((1.0, 0.05), (2.0, 0.08), (4.0, 0.19), (8.0, 1.9)):
        numbers = {"normalised_latency_mean_s": mean_s, "normalised_latency_p99_s": 3 * mean_s, "ttft_mean_s": mean_s}
        numbers |= {"ttft_p99_s": 2 * mean_s, "limit_s_per_token": 0.2, "within_limit_percent": 97.0, "sustained": 1.0}
        members.append(Series(f"{rate:g} requests/s", (Run(0, 60.0, numbers),), numbers, rate_rps=rate))
    found = result(BenchKind.ONLINE, members, "sharegpt")
    client = ClientOverhead("in this process", 120.0, 900.0, 15.0)
    return replace(found, numbers={"highest_sustained_rate_rps": 4.0}, client=client)


def multiround() -> BenchResult:
    members = []
    for name, computed, elapsed_s in (("reuse", 1000.0, 4.0), ("no reuse", 4000.0, 6.0)):
        numbers = {
            "tokens_per_s": 500.0,
            "prefill_tokens_computed": computed,
            "elapsed_s": elapsed_s,
            "ttft_mean_s": 0.1,
        }
        members.append(Series(name, (Run(0, elapsed_s, numbers),), numbers))
    saved = {"saved_prefill_percent": 75.0, "predicted_saved_prefill_percent": 76.0, "total_time_ratio": 1.5}
    return replace(result(BenchKind.MULTIROUND, members, "talks"), numbers=saved)


def all_kinds() -> list[BenchResult]:
    return [offline(), peer(), ablation(), online(), multiround()]
