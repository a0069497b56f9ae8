"""Rates of every kernel but attention on an NVIDIA GPU: matrix products, sampling, experts, and the small ones.

    PYTHONPATH=src python benchmarks/cuda_ops.py [--only gemm|layer|sample|small|experts] [--tokens 2048]
                                                 [--runs 3] [--json FILE]

Random data, over several sets of weights (more than the L2 cache holds); `cuda_timing.py` says what burst and sustained
mean. Products, layers and experts are also run sustained, since the power limit binds there; the rest in a burst.

- `small`: the kernels that only move data; GB/s counts each input and output once.
- `sample`: one call over the Llama-3 vocabulary, by number of rows and by what is asked for.
- `experts`: a mixture-of-experts layer, router to sum; TFLOP/s counts the experts' products.
- `layer`: the four products of a Llama-3-8B layer in turn with SiLU · mul, by the library and by ours; TFLOP/s counts
  the products.
- `gemm`: each of them alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from cuda_timing import Bench, Call, Report, Row, add_options
from torch import Tensor

from nanoflow.kernels.base import ExpertWeights
from nanoflow.kernels.triton.activation import silu_mul
from nanoflow.kernels.triton.backend import TritonKernels
from nanoflow.kernels.triton.gemm import GemmShape
from nanoflow.kernels.triton.linear import library_linear, persistent

BF16 = torch.bfloat16
N_SETS = 4
VOCAB = 128256
SUSTAIN_S = {"gemm": 0.6, "layer": 1.2, "experts": 0.4}
"""Seconds of sustained work a case; sections that are not named here run in a burst only."""
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
BASE = GemmShape()
VARIANTS: dict[str, GemmShape] = {
    "128x256": BASE,
    "128x256 loops": replace(BASE, flatten=False),
    "128x128": replace(BASE, n=128, warps=4, stages=4),
}
SAMPLING = {
    "temperature 1": (1.0, 0, 1.0, 0.0),
    "greedy": (0.0, 0, 1.0, 0.0),
    "top-k 50": (1.0, 50, 1.0, 0.0),
    "top-p 0.9": (1.0, 0, 0.9, 0.0),
    "min-p 0.05": (1.0, 0, 1.0, 0.05),
    "top-k 50, top-p 0.9": (1.0, 50, 0.9, 0.0),
}
"""Temperature, top-k, top-p and min-p, by name."""


@dataclass(frozen=True)
class Case:
    """Calls that do the same on different data, and what one stands for (see `cuda_timing.Row`)."""

    name: str
    calls: Sequence[Call]
    unit: str = ""
    amount: float = 0.0


def normal(rows: int, columns: int) -> Tensor:
    """Random bfloat16 on the card."""
    return torch.randn(rows, columns, device="cuda").to(BF16)


def layer_weights() -> dict[str, Tensor]:
    """The four weights of a layer, by product."""
    return {name: normal(n, k) / k**0.5 for name, (n, k) in SHAPES.items()}


def layer_tflop(n_tokens: int) -> float:
    """10^12 operations of a layer's four products."""
    return sum(2e-12 * n_tokens * n * k for n, k in SHAPES.values())


def gemm_cases(n_tokens: int) -> Iterator[Case]:
    """Each product of a Llama-3-8B layer by the library and by our variants."""
    for name, (width, depth) in SHAPES.items():
        accumulate, fused = name in ("o", "down"), name == "gate_up"
        x, out = normal(n_tokens, depth), normal(n_tokens, width)
        target = normal(n_tokens, width // 2) if fused else out
        weights = [normal(width, depth) / depth**0.5 for _ in range(N_SETS)]
        tflop = 2e-12 * n_tokens * width * depth

        by_library = [partial(library_linear, x, w, out, None, accumulate) for w in weights]
        yield Case(f"gemm {name:8} library", by_library, "TFLOP", tflop)
        for label, shape in VARIANTS.items():
            by_us = [
                partial(persistent, x, w, target, None, shape, accumulate=accumulate, silu_mul=fused) for w in weights
            ]
            yield Case(f"gemm {name:8} {label}{', SiLU·mul' if fused else ''}", by_us, "TFLOP", tflop)


def layer_cases(n_tokens: int) -> Iterator[Case]:
    """The four products of a layer in turn, with SiLU · mul: how they do under the power cap."""
    x, residual, qkv, wide = (normal(n_tokens, n) for n in (4096, 4096, 6144, 28672))
    act = normal(n_tokens, 14336)
    layers = [layer_weights() for _ in range(N_SETS)]

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

    for label, small, fused in (
        ("library", None, None),
        ("library, gate-up 128x256", None, BASE),
        ("all 128x256", BASE, BASE),
    ):
        calls = [partial(layer, w, small, fused) for w in layers]
        yield Case(f"layer {label}", calls, "TFLOP", layer_tflop(n_tokens))


def sampling_calls(n_rows: int, asked: str = "temperature 1", dtype: torch.dtype = BF16) -> list[Call]:
    """Sampling of `n_rows` rows over the Llama-3 vocabulary, on two sets of logits."""
    kernels = TritonKernels()
    temperature, top_k, top_p, min_p = SAMPLING[asked]
    arguments = (
        torch.full((n_rows,), temperature, device="cuda"),
        torch.full((n_rows,), top_k, dtype=torch.int32, device="cuda"),
        torch.full((n_rows,), top_p, device="cuda"),
        torch.full((n_rows,), min_p, device="cuda"),
        torch.randint(-(2**62), 2**62, (n_rows,), device="cuda"),
    )
    out = torch.empty(n_rows, dtype=torch.int32, device="cuda")
    logits = [(torch.randn(n_rows, VOCAB, device="cuda") * 2).to(dtype) for _ in range(2)]
    return [partial(kernels.sample, x, *arguments, out) for x in logits]


def sample_cases(_: int) -> Iterator[Case]:
    for n_rows in (1, 32, 256, 1000):
        for dtype in (BF16, torch.float32) if n_rows == 1000 else (BF16,):
            for asked in SAMPLING:
                name = f"sample {n_rows:5} rows {str(dtype)[6:]:9} {asked}"
                yield Case(name, sampling_calls(n_rows, asked, dtype))


def small_cases(n_tokens: int) -> Iterator[Case]:
    """The kernels that only move data."""
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
    table = kernels.linear_weight(normal(VOCAB, 4096))
    ids = torch.randint(0, VOCAB, (n_tokens,), dtype=torch.int32, device="cuda")

    def rope(q: Tensor) -> None:
        kernels.rope_append(q, positions, slots, cos_sin, kv, n_heads=32, n_kv_heads=8, head_dim=128)

    cases: dict[str, tuple[Sequence[Call], float]] = {
        "rms_norm": ([partial(kernels.rms_norm, v, norm_weight, 1e-5, out) for v in x], 4 * 4096),
        "rope_append": ([partial(rope, v) for v in qkv], 2 * (6144 + 4096 + 2048)),
        "silu_mul": ([partial(kernels.silu_mul, v, act) for v in wide], 2 * (28672 + 14336)),
        "silu_mul interleaved": ([partial(silu_mul, v, act, interleaved=True) for v in wide], 2 * (28672 + 14336)),
        "embed": ([partial(kernels.embed, ids, table, out)], 4 * 4096),
    }
    for name, (calls, bytes_a_token) in cases.items():
        yield Case(f"small {name}", calls, "GB", bytes_a_token * n_tokens / 1e9)


def experts_cases(_: int) -> Iterator[Case]:
    """A mixture-of-experts layer, router to sum."""
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
            tflop = 6e-12 * n_tokens * n_active * width * hidden
            calls = [partial(kernels.experts, x, weights, out)]
            yield Case(f"experts {name:14} {n_tokens:5} tokens", calls, "TFLOP", tflop)
        del weights
        torch.cuda.empty_cache()


SECTIONS: dict[str, Callable[[int], Iterator[Case]]] = {
    "small": small_cases,
    "sample": sample_cases,
    "experts": experts_cases,
    "layer": layer_cases,
    "gemm": gemm_cases,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(SECTIONS))
    parser.add_argument("--tokens", type=int, default=2048)
    add_options(parser)
    options = parser.parse_args()
    bench = Bench()
    report = Report(bench.environment(), vars(options))
    lane = bench.lane()
    for run in range(options.runs):
        torch.manual_seed(run)
        for section, cases in SECTIONS.items():
            for case in cases(options.tokens) if options.only in (None, section) else ():
                try:
                    timing = bench.measure(case.calls, lane, SUSTAIN_S.get(section, 0.0))
                except Exception as error:  # a shape that does not fit must not end the rest
                    print(f"{case.name}: {type(error).__name__}: {str(error)[:90]}", flush=True)
                    continue
                report.add(Row(case.name, run, run, timing, case.unit, case.amount))
    if options.json:
        report.write(options.json)


if __name__ == "__main__":
    main()
