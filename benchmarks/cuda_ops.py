"""Rates of every kernel but attention on an NVIDIA GPU: matrix products, sampling, experts, and the small ones.

    PYTHONPATH=src python benchmarks/cuda_ops.py [--only gemm|layer|sample|small|experts] [--tokens 2048]

Random data, launches replayed from a CUDA graph over several sets of weights (more than the L2 cache holds). `burst` is
the median of a few replays on a cool card; `sustained` the mean over a second or more, with the card's power.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanoflow.kernels.base import ExpertWeights
from nanoflow.kernels.triton.activation import silu_mul
from nanoflow.kernels.triton.backend import TritonKernels
from nanoflow.kernels.triton.gemm import GemmShape
from nanoflow.kernels.triton.linear import library_linear, persistent

BF16 = torch.bfloat16
N_SETS = 4
SUSTAIN_S = 1.2
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
BASE = GemmShape()
VARIANTS: dict[str, GemmShape] = {
    "128x256": BASE,
    "128x256 loops": replace(BASE, flatten=False),
    "128x128": replace(BASE, n=128, warps=4, stages=4),
}


class Power:
    """The card's energy counter, from NVML, read between its ticks (it moves about ten times a second)."""

    def __init__(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._nvml = pynvml
        self._card = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())

    def joules(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._card)) / 1000

    def watts_during(self, step: Callable[[], None], seconds: float) -> float:
        """Keep the card busy with `step`s (which do not wait) for about `seconds`; mean power from first to last tick.

        Two steps are always queued, so that the card is never idle between readings.
        """
        queued: list[torch.cuda.Event] = []
        begun, seen, ticks = time.perf_counter(), self.joules(), []
        while time.perf_counter() - begun < seconds or len(ticks) < 3:
            step()
            queued.append(torch.cuda.Event())
            queued[-1].record()
            if len(queued) > 2:
                queued.pop(0).synchronize()
            now = self.joules()
            if now != seen:
                seen = now
                ticks.append((time.perf_counter(), now))
        (first, before), (last, after) = ticks[0], ticks[-1]
        return (after - before) / (last - first)


@dataclass
class Timing:
    """Of one call: microseconds in a burst and sustained, and the watts drawn meanwhile."""

    burst_us: float
    sustained_us: float
    watts: float


def captured(calls: Sequence[Callable[[], None]]) -> torch.cuda.CUDAGraph:
    """A graph of `calls`, each run once before."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def elapsed_us(graph: torch.cuda.CUDAGraph, n: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(n):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / n


def measure(calls: Sequence[Callable[[], None]], power: Power | None = None, seconds: float = SUSTAIN_S) -> Timing:
    """Timing of one of `calls`, which do the same on different data; sustained only with `power`."""
    graph = captured(calls)
    elapsed_us(graph, 2)
    burst = statistics.median(elapsed_us(graph, 1) for _ in range(9))
    if power is None:
        return Timing(burst / len(calls), 0.0, 0.0)
    per_step = max(1, int(10_000 / burst))
    n_replays = 0

    def step() -> None:
        nonlocal n_replays
        n_replays += per_step
        for _ in range(per_step):
            graph.replay()

    power.watts_during(step, 0.3 * seconds)
    torch.cuda.synchronize()
    n_replays = 0
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    watts = power.watts_during(step, seconds)
    end.record()
    end.synchronize()
    sustained = start.elapsed_time(end) * 1000 / n_replays
    return Timing(burst / len(calls), sustained / len(calls), watts)


def normal(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device="cuda").to(BF16)


def run_gemm(n_tokens: int, power: Power) -> None:
    """Each product of a Llama-3-8B layer by the library and by our variants."""
    for name, (width, depth) in SHAPES.items():
        x, out = normal(n_tokens, depth), normal(n_tokens, width)
        half = normal(n_tokens, width // 2)
        weights = [normal(width, depth) / depth**0.5 for _ in range(N_SETS)]
        tflop = 2e-12 * n_tokens * width * depth
        accumulate, fused = name in ("o", "down"), name == "gate_up"

        def report(label: str, calls: list[Callable[[], None]], name: str = name, tflop: float = tflop) -> None:
            try:
                t = measure(calls, power, 0.6)
            except Exception as error:
                print(f"gemm {name:8} {label:24} failed: {str(error)[:90]}", flush=True)
                return
            rates = f"{tflop / t.burst_us * 1e6:6.0f} burst {tflop / t.sustained_us * 1e6:6.0f} sustained TFLOP/s"
            print(f"gemm {name:8} {label:24} {rates} {t.sustained_us:8.1f} us {t.watts:5.0f} W", flush=True)

        def by_library(w: Tensor, x: Tensor = x, out: Tensor = out, accumulate: bool = accumulate) -> None:
            library_linear(x, w, out, None, accumulate)

        report("library", [lambda w=w: by_library(w) for w in weights])
        for label, shape in VARIANTS.items():
            target = half if fused else out

            def by_us(
                w: Tensor, s: GemmShape, f: bool = fused, a: bool = accumulate, x: Tensor = x, t: Tensor = target
            ) -> None:
                persistent(x, w, t, None, s, accumulate=a, silu_mul=f)

            report(label, [lambda w=w, s=shape, f=by_us: f(w, s) for w in weights])


def run_layer(n_tokens: int, power: Power) -> None:
    """The four products of a layer in turn, with SiLU · mul: how they do under the power cap."""
    x, residual, qkv, wide = (normal(n_tokens, n) for n in (4096, 4096, 6144, 28672))
    act = normal(n_tokens, 14336)
    layers = [{name: normal(n, k) / k**0.5 for name, (n, k) in SHAPES.items()} for _ in range(N_SETS)]
    tflop = sum(2e-12 * n_tokens * n * k for n, k in SHAPES.values())

    def product(w: Tensor, source: Tensor, out: Tensor, accumulate: bool, shape: GemmShape | None) -> None:
        if shape is None:
            library_linear(source, w, out, None, accumulate)
        else:
            persistent(source, w, out, None, shape, accumulate=accumulate)

    def layer(w: dict[str, Tensor], small: GemmShape | None, fused: GemmShape | None) -> None:
        product(w["qkv"], x, qkv, False, small)
        product(w["o"], qkv[:, :4096], residual, True, small)
        if fused is None:
            library_linear(x, w["gate_up"], wide, None, False)
            silu_mul(wide, act, interleaved=True)
        else:
            persistent(x, w["gate_up"], act, None, fused, silu_mul=True)
        product(w["down"], act, residual, True, small)

    for _ in range(2):
        for label, small, fused in (
            ("library", None, None),
            ("library, gate-up 128x256", None, BASE),
            ("all 128x256", BASE, BASE),
        ):
            t = measure([lambda w=w, s=small, f=fused: layer(w, s, f) for w in layers], power)
            rates = f"{tflop / t.burst_us * 1e6:5.0f} burst {tflop / t.sustained_us * 1e6:5.0f} sustained TFLOP/s"
            joules = t.watts * t.sustained_us / 1e6
            print(f"layer {label:26} {rates} {t.sustained_us:7.0f} us {t.watts:4.0f} W {joules:.3f} J", flush=True)


def run_sample() -> None:
    """Sampling of rows over the Llama-3 vocabulary."""
    kernels, vocab = TritonKernels(), 128256
    for n_rows in (1, 32, 256, 1000):
        for dtype in (BF16, torch.float32) if n_rows == 1000 else (BF16,):
            logits = [(torch.randn(n_rows, vocab, device="cuda") * 2).to(dtype) for _ in range(2)]
            keys = torch.randint(-(2**62), 2**62, (n_rows,), device="cuda")
            out = torch.empty(n_rows, dtype=torch.int32, device="cuda")
            for label, temperature, top_k, top_p, min_p in (
                ("temperature 1", 1.0, 0, 1.0, 0.0),
                ("greedy", 0.0, 0, 1.0, 0.0),
                ("top-k 50", 1.0, 50, 1.0, 0.0),
                ("top-p 0.9", 1.0, 0, 0.9, 0.0),
                ("min-p 0.05", 1.0, 0, 1.0, 0.05),
                ("top-k 50, top-p 0.9", 1.0, 50, 0.9, 0.0),
            ):
                arguments = (
                    torch.full((n_rows,), temperature, device="cuda"),
                    torch.full((n_rows,), top_k, dtype=torch.int32, device="cuda"),
                    torch.full((n_rows,), top_p, device="cuda"),
                    torch.full((n_rows,), min_p, device="cuda"),
                    keys,
                )
                t = measure([lambda x=x, a=arguments, o=out: kernels.sample(x, *a, o) for x in logits])
                print(f"sample {n_rows:5} rows {str(dtype)[6:]:9} {label:20} {t.burst_us:8.1f} us", flush=True)


def run_small(n_tokens: int) -> None:
    """The kernels that only move data; GB/s counts each input and output once."""
    kernels = TritonKernels()
    x, out = [normal(n_tokens, 4096) for _ in range(N_SETS)], normal(n_tokens, 4096)
    wide, act = [normal(n_tokens, 28672) for _ in range(2)], normal(n_tokens, 14336)
    qkv = [normal(n_tokens, 6144) for _ in range(N_SETS)]
    norm_weight = torch.randn(4096, device="cuda").to(BF16)
    with torch.device("cuda"):
        kv = kernels.allocate_kv(n_tokens // 16 + 1, 16, 8, 128, BF16, 1)[0]
    positions = torch.arange(n_tokens, dtype=torch.int32, device="cuda")
    slots = torch.randperm(n_tokens, device="cuda").int()
    cos_sin = torch.randn(n_tokens, 128, device="cuda")
    table = kernels.linear_weight(normal(128256, 4096))
    ids = torch.randint(0, 128256, (n_tokens,), dtype=torch.int32, device="cuda")

    def rope(q: Tensor) -> None:
        kernels.rope_append(q, positions, slots, cos_sin, kv, n_heads=32, n_kv_heads=8, head_dim=128)

    cases: dict[str, tuple[list[Callable[[], None]], float]] = {
        "rms_norm": ([lambda v=v: kernels.rms_norm(v, norm_weight, 1e-5, out) for v in x], 4 * 4096),
        "rope_append": ([lambda v=v: rope(v) for v in qkv], 2 * (6144 + 4096 + 2048)),
        "silu_mul": ([lambda v=v: kernels.silu_mul(v, act) for v in wide], 2 * (28672 + 14336)),
        "silu_mul interleaved": (
            [lambda v=v: silu_mul(v, act, interleaved=True) for v in wide],
            2 * (28672 + 14336),
        ),
        "embed": ([lambda: kernels.embed(ids, table, out)], 4 * 4096),
    }
    for name, (calls, bytes_a_token) in cases.items():
        t = measure(calls)
        rate = bytes_a_token * n_tokens / t.burst_us / 1e3
        print(f"small {name:22} {t.burst_us:7.1f} us {rate:6.0f} GB/s", flush=True)


def run_experts(power: Power) -> None:
    """A mixture-of-experts layer, router to sum; TFLOP/s counts the experts' products."""
    kernels = TritonKernels()
    for name, width, hidden, n_experts, n_active in (
        ("Mixtral-8x7B", 4096, 14336, 8, 2),
        ("Qwen3-30B-A3B", 2048, 768, 128, 8),
    ):
        weights = ExpertWeights(
            kernels.linear_weight(normal(n_experts, width) / width**0.5),
            kernels.expert_weights((normal(2 * hidden, width) / 64 for _ in range(n_experts)), n_experts, gate_up=True),
            kernels.expert_weights((normal(width, hidden) / 64 for _ in range(n_experts)), n_experts, gate_up=False),
            n_active,
            True,
        )
        for n_tokens in (16, 256, 2048):
            x, out = normal(n_tokens, width), normal(n_tokens, width)
            t = measure([lambda w=weights, a=x, o=out: kernels.experts(a, w, o)], power, 0.4)
            tflop = 6e-12 * n_tokens * n_active * width * hidden
            used = min(n_experts, n_tokens * n_active)
            gb = 6e-9 * used * width * hidden
            rates = (
                f"{tflop / t.sustained_us * 1e6:5.0f} TFLOP/s, at most {gb / t.sustained_us * 1e6:5.0f} GB/s of weights"
            )
            print(f"experts {name:14} {n_tokens:5} tokens {t.sustained_us:8.1f} us {rates}", flush=True)
        del weights
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("gemm", "layer", "sample", "small", "experts"))
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    power = Power()
    sections: dict[str, Callable[[], None]] = {
        "small": lambda: run_small(arguments.tokens),
        "sample": run_sample,
        "experts": lambda: run_experts(power),
        "layer": lambda: run_layer(arguments.tokens, power),
        "gemm": lambda: run_gemm(arguments.tokens, power),
    }
    for name, section in sections.items():
        if arguments.only in (None, name):
            section()


if __name__ == "__main__":
    main()
