"""Rates of the CPU kernels beside torch's own, for SmolLM2's shapes: matrix products, attention, sampling, overhead.

    OMP_NUM_THREADS=2 python benchmarks/kernels_cpu.py [--dtype bfloat16] [--quick]

Weights are cycled through more memory than the last-level cache holds, as a decode step does. The best of several
repetitions counts, so that other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoflow.kernels import registry
from nanoflow.kernels.base import AttentionPlan, Kernels, LinearWeight

SHAPES = {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536), "lm_head": (49152, 576)}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
COLD_BYTES = 200e6
ATTENTION_CASES = [  # requests, queries of each, context of each
    (1, 512, 512),
    (1, 2048, 2048),
    (4, 128, 1024),
    (64, 1, 256),
    (64, 1, 1024),
    (1, 1, 1024),
    (1, 1, 8192),
]


def best_seconds(run: Callable[[], None], repetitions: int) -> float:
    run()
    best = float("inf")
    for _ in range(repetitions):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best


def linear_rates(kernels: Kernels, dtype: torch.dtype, repetitions: int) -> None:
    print(f"\nlinear, {dtype}: GFLOP/s and GB/s of weights, ours | torch")
    for name, (n, k) in SHAPES.items():
        n_copies = max(1, int(COLD_BYTES / (n * k * dtype.itemsize)))
        plain = [torch.randn(n, k).to(dtype) for _ in range(n_copies)]
        packed = [kernels.linear_weight(weight.clone()) for weight in plain]
        for m in ROWS:
            x, out = torch.randn(m, k).to(dtype), torch.empty(m, n, dtype=dtype)

            def ours(x: Tensor = x, out: Tensor = out, weights: list[LinearWeight] = packed) -> None:
                for weight in weights:
                    kernels.linear(x, weight, out)

            def theirs(x: Tensor = x, out: Tensor = out, weights: list[Tensor] = plain) -> None:
                for weight in weights:
                    torch.mm(x, weight.t(), out=out)

            cells = []
            for run in (ours, theirs):
                seconds = best_seconds(run, repetitions) / n_copies
                cells.append(f"{2e-9 * m * n * k / seconds:6.0f} {1e-9 * n * k * dtype.itemsize / seconds:5.1f}")
            print(f"  {name:8} {n:5} x {k:4}  rows {m:3}   {cells[0]} | {cells[1]}", flush=True)


def attention_case(
    kernels: Kernels, dtype: torch.dtype, n_requests: int, query: int, context: int
) -> tuple[Callable[[], None], Tensor]:
    n_pages = -(-context // 16)
    kv = kernels.allocate_kv(n_pages * n_requests, 16, KV_HEADS, HEAD_DIM, dtype, 1)[0].normal_()
    table = torch.randperm(n_pages * n_requests).int().view(n_requests, n_pages)
    lengths = torch.full((n_requests,), query, dtype=torch.int32)
    starts = (torch.arange(n_requests) * query).int()
    contexts = torch.full((n_requests,), context, dtype=torch.int32)
    plan = AttentionPlan(starts, lengths, contexts, table, n_requests, query, context)
    qkv = torch.randn(n_requests * query, (HEADS + 2 * KV_HEADS) * HEAD_DIM).to(dtype)
    out = torch.empty(n_requests * query, HEADS * HEAD_DIM, dtype=dtype)

    def run() -> None:
        kernels.attention(
            qkv, kv, plan, out, n_heads=HEADS, n_kv_heads=KV_HEADS, head_dim=HEAD_DIM, scale=HEAD_DIM**-0.5
        )

    return run, kv


def attention_rates(kernels: Kernels, dtype: torch.dtype, repetitions: int) -> None:
    print(
        f"\nattention, {dtype}, {HEADS}/{KV_HEADS} heads of {HEAD_DIM}: GFLOP/s (causal), GB/s of KV, ms, ours | torch"
    )
    for n_requests, query, context in ATTENTION_CASES:
        run, kv = attention_case(kernels, dtype, n_requests, query, context)
        flops = 4.0 * n_requests * HEADS * HEAD_DIM * query * (context - (query - 1) / 2)
        kv_bytes = 2.0 * n_requests * context * KV_HEADS * HEAD_DIM * dtype.itemsize
        q = torch.randn(n_requests, HEADS, query, HEAD_DIM).to(dtype)
        k, v = torch.randn(2, n_requests, KV_HEADS, context, HEAD_DIM).to(dtype)
        mask = torch.ones(query, context).tril(context - query).bool()

        def theirs(q: Tensor = q, k: Tensor = k, v: Tensor = v, mask: Tensor = mask) -> None:
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

        cells = []
        for function in (run, theirs):
            seconds = best_seconds(function, repetitions * 3)
            cells.append(f"{1e-9 * flops / seconds:6.1f} {1e-9 * kv_bytes / seconds:6.1f} {1e3 * seconds:7.3f} ms")
        label = f"{n_requests:3} requests x {query:4} queries, context {context:4}"
        print(f"  {label}   {cells[0]} | {cells[1]}", flush=True)
        del kv


def small_costs(kernels: Kernels, dtype: torch.dtype) -> None:
    print("\nmicroseconds a call")
    weight = kernels.linear_weight(torch.randn(16, 16).to(dtype))
    x, out = torch.randn(1, 16).to(dtype), torch.empty(1, 16, dtype=dtype)
    norm = torch.ones(16, dtype=dtype)
    tiny = {
        "linear 1x16x16 (call overhead)": lambda: kernels.linear(x, weight, out),
        "rms_norm 1x16 (call overhead)": lambda: kernels.rms_norm(x, norm, 1e-5, out),
    }
    for rows in (1, 64):
        logits = torch.randn(rows, 49152)
        ids, keys = torch.empty(rows, dtype=torch.int32), torch.arange(rows)
        zeros, ones = torch.zeros(rows), torch.ones(rows)
        none, forty = torch.zeros(rows, dtype=torch.int32), torch.full((rows,), 40, dtype=torch.int32)
        half = torch.full((rows,), 0.95)
        kinds = {
            "greedy": (zeros, none, ones),
            "temperature": (ones, none, ones),
            "top_k=40": (ones, forty, ones),
            "top_p=.95": (ones, none, half),
        }
        for kind, (temperature, top_k, top_p) in kinds.items():

            def run(
                logits: Tensor = logits,
                options: tuple[Tensor, ...] = (temperature, top_k, top_p, zeros, keys, ids),
            ) -> None:
                kernels.sample(logits, *options)

            tiny[f"sample {rows} x 49152 {kind}"] = run
    for name, call in tiny.items():

        def many(call: Callable[[], None] = call) -> None:
            for _ in range(20):
                call()

        print(f"  {name:36} {best_seconds(many, 5) / 20 * 1e6:9.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    kernels = registry.create(options.kernels, "cpu", dtype)
    print(f"kernels {kernels.name}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    repetitions = 2 if options.quick else 5
    with torch.inference_mode():
        attention_rates(kernels, dtype, repetitions)
        small_costs(kernels, dtype)
        linear_rates(kernels, dtype, repetitions)


if __name__ == "__main__":
    main()
