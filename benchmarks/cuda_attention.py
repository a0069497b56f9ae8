"""Rates of the paged attention kernels on an NVIDIA GPU: decode in GB/s of keys and values, prefill in TFLOP/s.

    PYTHONPATH=src python benchmarks/cuda_attention.py [--quick] [--sweep] [--lane-sms 32] [--only decode|prefill]
                                                       [--runs 3] [--json FILE]

Random data, shuffled pages; the KV cache of a case is many times the L2 cache. `cuda_timing.py` says what burst and
sustained mean. GB/s counts the keys and values that are read, once; causal FLOPs are counted, that is half of the
square. A lane of N multiprocessors is a green context.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cuda_timing import SUSTAIN_S, Bench, Call, Report, Row, add_options
from torch import Tensor

from nanoflow.kernels.triton import layout
from nanoflow.kernels.triton.decode_attention import decode_attention
from nanoflow.kernels.triton.layout import DecodeShape, PrefillShape
from nanoflow.kernels.triton.prefill_attention import prefill_attention
from nanoflow.kernels.triton.work_lists import DecodePlanner, PrefillPlanner

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DECODE_SWEEP = [
    *(DecodeShape(64, 4, stages, blocks) for stages, blocks in ((2, 4), (2, 5), (3, 4), (3, 5), (3, 10))),
    *(DecodeShape(64, 4, stages, blocks) for stages, blocks in ((4, 3), (5, 2))),
    *(DecodeShape(32, 4, stages, blocks) for stages, blocks in ((2, 5), (3, 5), (4, 5), (5, 4), (6, 3))),
    *(DecodeShape(32, 2, stages, blocks) for stages, blocks in ((3, 8), (4, 6), (5, 5))),
    *(DecodeShape(32, 1, stages, blocks) for stages, blocks in ((3, 8), (4, 6))),
    *(DecodeShape(16, 1, stages, blocks) for stages, blocks in ((3, 12), (5, 12))),
    *(DecodeShape(128, 8, stages, blocks) for stages, blocks in ((2, 3), (3, 3), (4, 2))),
    DecodeShape(128, 4, 3, 3),
]
BULK_SWEEP = [
    *(DecodeShape(16, 1, 2, blocks, bulk=True) for blocks in (4, 5, 6, 8, 12)),
    *(DecodeShape(16, 1, 3, blocks, bulk=True) for blocks in (4, 6, 8)),
    *(DecodeShape(32, 1, 2, blocks, bulk=True) for blocks in (3, 4, 6)),
]
PREFILL_SWEEP = [
    layout.prefill_shape(HEAD_DIM, bulk=True),
    *(PrefillShape(128, 64, 8, stages, 1) for stages in (2, 3, 4, 5)),
    *(PrefillShape(128, 128, 8, stages, 1) for stages in (2, 3)),
    *(PrefillShape(64, 64, 4, stages, 2) for stages in (2, 3, 4)),
    PrefillShape(128, 32, 8, 4, 1),
    PrefillShape(64, 128, 4, 2, 1),
]


@dataclass
class Load:
    """Requests on the card: rows of QKV, a KV cache with shuffled pages, and an output."""

    query_len: np.ndarray
    context_len: np.ndarray
    qkv: Tensor
    kv: Tensor
    page_table: Tensor
    page_start: np.ndarray
    out: Tensor

    @staticmethod
    def random(query_len: np.ndarray, context_len: np.ndarray, page_tokens: int) -> Load:
        n_pages = -(-context_len // page_tokens)
        shape = layout.kv_shape(int(n_pages.sum()), page_tokens, KV_HEADS, HEAD_DIM)
        rows = int(query_len.sum())
        return Load(
            query_len.astype(np.int32),
            context_len.astype(np.int32),
            torch.randn(rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM, device="cuda", dtype=torch.bfloat16),
            torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(),
            torch.randperm(int(n_pages.sum()), device="cuda").int(),
            (np.cumsum(n_pages) - n_pages).astype(np.int32),
            torch.empty(rows, HEADS * HEAD_DIM, device="cuda", dtype=torch.bfloat16),
        )

    def planned(self, kind: str, lane_sms: int, shape: DecodeShape | PrefillShape | None = None) -> Call:
        """The kernel call for these requests on a lane of `lane_sms`, in `shape`, else in the one chosen for it."""
        rows = int(self.query_len.sum())
        common = {"n_heads": HEADS, "n_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "lane_sms": lane_sms}
        planner: DecodePlanner | PrefillPlanner
        kernel: Callable[..., None]
        if kind == "decode":
            assert not isinstance(shape, PrefillShape)
            planner, kernel = DecodePlanner(n_rows=rows, shape=shape, **common), decode_attention
        else:
            assert not isinstance(shape, DecodeShape)
            n_requests = len(self.query_len)
            planner = PrefillPlanner(n_rows=rows, n_requests=n_requests, shape=shape, **common)
            kernel = prefill_attention
        ints = np.zeros(planner.n_ints, np.int32)
        start = (np.cumsum(self.query_len) - self.query_len).astype(np.int32)
        planner.plan(start, self.query_len, self.context_len, self.page_start, ints)
        work: Any = planner.bind(torch.from_numpy(ints).cuda())

        def run() -> None:
            kernel(
                self.qkv,
                self.kv,
                work,
                self.page_table,
                self.out,
                n_heads=HEADS,
                n_kv_heads=KV_HEADS,
                head_dim=HEAD_DIM,
                scale=HEAD_DIM**-0.5,
            )

        return run


def decode_loads(quick: bool) -> dict[str, np.ndarray]:
    """Contexts of the decode cases, by name."""
    rng = np.random.default_rng(0)
    cases = {"800 x 1024": np.full(800, 1024)}
    if not quick:
        cases |= {
            "800 x 16..2032": rng.integers(16, 2033, 800),
            "64 x 1024": np.full(64, 1024),
            "4 x 32768": np.full(4, 32768),
            "1 x 32768": np.full(1, 32768),
            "1 x 1024": np.full(1, 1024),
            "1000 x 128": np.full(1000, 128),
        }
    return cases


def prefill_loads(quick: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(new tokens, contexts) of the prefill cases, by name."""
    cases = {"4 x 4096": (np.full(4, 4096), np.full(4, 4096))}
    if not quick:
        cases |= {
            "2 x 1024": (np.full(2, 1024), np.full(2, 1024)),
            "chunk of 512 after 7680": (np.full(1, 512), np.full(1, 8192)),
            "16 x 128": (np.full(16, 128), np.full(16, 128)),
            "1 x 16384": (np.full(1, 16384), np.full(1, 16384)),
        }
    return cases


def causal_tflop(query_len: np.ndarray, context_len: np.ndarray) -> float:
    """4 · heads · head dim · visible (query, key) pairs."""
    q, c = query_len.astype(float), context_len.astype(float)
    return float((q * c - q * (q - 1) / 2).sum()) * 4 * HEADS * HEAD_DIM / 1e12


def decode_gb(context_len: np.ndarray) -> float:
    """10^9 bytes of keys and values that a decode step reads."""
    return float(context_len.sum()) * 4 * KV_HEADS * HEAD_DIM / 1e9


def loads(kind: str, quick: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(new tokens, contexts) of the cases of a kind, by name."""
    if kind == "decode":
        return {name: (np.ones_like(context), context) for name, context in decode_loads(quick).items()}
    return prefill_loads(quick)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the first case of each kind")
    parser.add_argument("--sweep", action="store_true", help="every block shape on the first case, burst only")
    parser.add_argument("--lane-sms", type=int, help="run on a green context of this many multiprocessors")
    parser.add_argument("--bulk", action="store_true", help="sweep the decode kernel of the bulk copy engine")
    parser.add_argument("--only", choices=["decode", "prefill"])
    parser.add_argument("--page-tokens", type=int, default=16)
    add_options(parser)
    options = parser.parse_args()
    bench = Bench()
    report = Report(bench.environment(), vars(options))
    lane = bench.lane(options.lane_sms)
    print(f"{bench.device.name}, {lane.n_sms} multiprocessors, pages of {options.page_tokens} tokens", flush=True)
    sweeps: dict[str, Sequence[DecodeShape | PrefillShape]] = {
        "decode": BULK_SWEEP if options.bulk else DECODE_SWEEP,
        "prefill": PREFILL_SWEEP,
    }
    kinds = [options.only] if options.only else ["decode", "prefill"]
    for run in range(options.runs):
        torch.manual_seed(run)
        for kind in kinds:
            for name, (query_len, context_len) in loads(kind, options.quick or options.sweep).items():
                load = Load.random(query_len, context_len, options.page_tokens)
                unit = "GB" if kind == "decode" else "TFLOP"
                amount = decode_gb(context_len) if kind == "decode" else causal_tflop(query_len, context_len)
                shapes: list[DecodeShape | PrefillShape | None] = [*sweeps[kind]] if options.sweep else [None]
                for shape in shapes:
                    label = f"{kind} {name} {shape or ''}".strip()
                    try:
                        call = load.planned(kind, lane.n_sms, shape)
                        timing = bench.measure([call], lane, 0.0 if options.sweep else SUSTAIN_S)
                    except Exception as error:  # a shape that does not fit must not end the sweep
                        print(f"{label}: {type(error).__name__}: {str(error)[:100]}", flush=True)
                        continue
                    report.add(Row(label, run, run, timing, unit, amount))
                del load
    if options.json:
        report.write(options.json)


if __name__ == "__main__":
    main()
