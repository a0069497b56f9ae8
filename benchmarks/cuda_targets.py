"""The kernels that decide the speed of an H200, beside what was wanted and aimed at: one table from one command.

    PYTHONPATH=src python benchmarks/cuda_targets.py [--runs 3] [--json out.json]

Shapes are Llama-3-8B's; data is random (normal) and another in every run, in bfloat16. `cuda_timing.py` says what burst
and sustained mean. The rows:

- decode attention: 800 requests of 1024 tokens, 32 heads over 8 KV heads of 128, shuffled pages of 16 tokens: 3.36 GB
  of keys and values a call, which is all that its TB/s counts; the merging launch is in its time. On the whole card,
  then on a lane (green context) of 32 multiprocessors, planned for it.
- four layer GEMMs: QKV, output projection and down (these two added to the residual), gate-up with SiLU · mul, 2048
  tokens, over two layers of weights, each product as the engine chooses it (`NANOFLOW_PRODUCTS`). TFLOP/s counts the
  products alone, the time SiLU · mul too. Sustained is what counts.
- prefill attention: 4 prompts of 4096 tokens, nothing cached; causal FLOPs, that is half of the square.
- sampling: 1000 rows of 128,256 logits at temperature 1, one call with everything.

The first start on a machine compiles kernels and races products; with both caches warm, three runs take about a minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from cuda_attention import Load, causal_tflop, decode_gb
from cuda_ops import layer_tflop, layer_weights, normal, sampling_calls
from cuda_timing import Bench, Call, Report, Row, add_options, summary

from nanoflow.device.cuda import CudaLane
from nanoflow.kernels.triton.backend import TritonKernels

TOKENS = 2048
PAGE_TOKENS = 16


@dataclass(frozen=True)
class Target:
    """A row of the table: what to call (on a lane), how much a call does, and the figures wanted and aimed at.

    Without a unit the figure is the time in ms, and less is better.
    """

    name: str
    calls: Callable[[CudaLane], list[Call]]
    wanted: float
    aim: float
    unit: str = ""
    amount: float = 0.0
    n_sms: int | None = None

    def shown(self, figure: tuple[float, float, float] | None) -> str:
        """Mean over the runs with its span, and whether it reaches the aim, only what was wanted, or neither."""
        if figure is None:
            return "–"
        mean, low, high = figure
        sign = 1 if self.unit else -1
        reached = [name for name in ("aim", "wanted") if sign * mean >= sign * getattr(self, name)]
        digits = 0 if mean >= 100 else 2 if self.unit else 3
        return f"{mean:.{digits}f} ({low:.{digits}f}–{high:.{digits}f}) {reached[0] if reached else 'missed'}"


def decode_calls(lane: CudaLane) -> list[Call]:
    lengths = np.full(800, 1024)
    load = Load.random(np.ones_like(lengths), lengths, PAGE_TOKENS)
    return [load.planned("decode", lane.n_sms)]


def prefill_calls(lane: CudaLane) -> list[Call]:
    lengths = np.full(4, 4096)
    return [Load.random(lengths, lengths, PAGE_TOKENS).planned("prefill", lane.n_sms)]


def layer_calls(_: CudaLane) -> list[Call]:
    """The products of a layer as the decoder calls them."""
    kernels = TritonKernels()
    x, residual, qkv, wide = (normal(TOKENS, n) for n in (4096, 4096, 6144, 28672))
    act = normal(TOKENS, 14336)

    def layer(weights: dict[str, torch.Tensor]) -> Call:
        packed = {name: kernels.linear_weight(weight) for name, weight in weights.items()}

        def run() -> None:
            kernels.linear(x, packed["qkv"], qkv)
            kernels.linear(qkv[:, :4096], packed["o"], residual, accumulate=True)
            kernels.linear_silu_mul(x, packed["gate_up"], wide, act)
            kernels.linear(act, packed["down"], residual, accumulate=True)

        return run

    return [layer(layer_weights()) for _ in range(2)]


TARGETS = (
    Target(
        "decode attention, 800 × 1024 tokens, GQA 32/8, TB/s",
        decode_calls, 4.2, 4.4, "TB", decode_gb(np.full(800, 1024)) / 1e3,
    ),
    Target(
        "the same on 32 multiprocessors, TB/s",
        decode_calls, 1.8, 2.5, "TB", decode_gb(np.full(800, 1024)) / 1e3, n_sms=32,
    ),
    Target("four layer GEMMs at 2048 tokens, TFLOP/s", layer_calls, 660, 690, "TFLOP", layer_tflop(TOKENS)),
    Target(
        "prefill attention, causal, 4 × 4096 tokens, TFLOP/s",
        prefill_calls, 400, 550, "TFLOP", causal_tflop(np.full(4, 4096), np.full(4, 4096)),
    ),
    Target("sampling, 1000 × 128,256, ms", lambda _: sampling_calls(1000), 0.25, 0.15),
)  # fmt: skip


def table(rows: dict[str, list[Row]]) -> str:
    """Markdown: a line a target, over all its runs."""
    lines = ["| what | wanted | aim | sustained | burst | power | energy a call |", "|---|---|---|---|---|---|---|"]
    for target in TARGETS:
        found = rows.get(target.name, [])
        watts, mj = ([getattr(row.timing, name) for row in found] for name in ("power_w", "energy_mj"))
        drawn = "– | –" if not found or None in watts else f"{np.mean(watts):.0f} W | {np.mean(mj):.1f} mJ"
        figures = f"{target.shown(summary(found, True))} | {target.shown(summary(found, False))}"
        lines.append(f"| {target.name} | {target.wanted:g} | {target.aim:g} | {figures} | {drawn} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args()
    bench = Bench()
    report = Report(bench.environment(), vars(options))
    print(f"{bench.device.name}, power limit {bench.meter.cap_w()} W", flush=True)
    rows: dict[str, list[Row]] = {}
    for run in range(options.runs):
        for target in TARGETS:
            torch.manual_seed(run)
            lane = bench.lane(target.n_sms)
            timing = bench.measure(target.calls(lane), lane)
            row = Row(target.name, run, run, timing, target.unit, target.amount)
            report.add(row)
            rows.setdefault(target.name, []).append(row)
            torch.cuda.empty_cache()
    print(f"\n{table(rows)}")
    if options.json:
        report.write(options.json, table=table(rows).splitlines())


if __name__ == "__main__":
    main()
