"""Rates of the paged attention kernels on an NVIDIA GPU: decode in GB/s of keys and values, prefill in TFLOP/s.

    PYTHONPATH=src python benchmarks/cuda_attention.py [--quick] [--sweep] [--lane-sms 32] [--only decode|prefill]

Random data, shuffled pages, launches replayed from a CUDA graph; the KV cache of a case is many times the L2 cache.
`burst` is the median of a few replays on a cool card; `sustained` the mean over `SUSTAIN_S` seconds, with the card's
power. Causal FLOPs are counted, that is half of the square. A lane of N multiprocessors is a green context.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanoflow.kernels.triton import layout
from nanoflow.kernels.triton.decode_attention import decode_attention
from nanoflow.kernels.triton.layout import DecodeShape, PrefillShape
from nanoflow.kernels.triton.prefill_attention import prefill_attention
from nanoflow.kernels.triton.work_lists import DecodePlanner, PrefillPlanner

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SUSTAIN_S = 2.0
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

    def launch(self, planner: DecodePlanner | PrefillPlanner) -> Callable[[], None]:
        """The kernel call for these requests, planned."""
        ints = np.zeros(planner.n_ints, np.int32)
        start = (np.cumsum(self.query_len) - self.query_len).astype(np.int32)
        planner.plan(start, self.query_len, self.context_len, self.page_start, ints)
        work = planner.bind(torch.from_numpy(ints).cuda())
        kernel = decode_attention if isinstance(planner, DecodePlanner) else prefill_attention

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


def green_stream(n_sms: int) -> tuple[torch.cuda.Stream, int]:
    """A stream on `n_sms` multiprocessors (rounded up by the driver) of the current device, and how many it got."""
    from cuda.bindings import driver

    def ok(result: tuple) -> object:
        assert result[0] == driver.CUresult.CUDA_SUCCESS, result[0]
        return result[1] if len(result) == 2 else result[1:]

    device = ok(driver.cuDeviceGet(torch.cuda.current_device()))
    resource = ok(driver.cuDeviceGetDevResource(device, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM))
    groups, _, _ = ok(driver.cuDevSmResourceSplitByCount(1, resource, 0, n_sms))
    descriptor = ok(driver.cuDevResourceGenerateDesc(groups[:1], 1))
    context = ok(
        driver.cuGreenCtxCreate(descriptor, device, driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM.value)
    )
    flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value
    stream = ok(driver.cuGreenCtxStreamCreate(context, flags, 0))
    return torch.cuda.ExternalStream(int(stream)), groups[0].sm.smCount


class PowerMeter(threading.Thread):
    """Samples what the card draws, every 20 ms, until `mean_w`; replays block the thread that issues them."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._samples: list[float] = []
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._done.wait(0.02):
            self._samples.append(torch.cuda.power_draw() / 1e3)

    def mean_w(self) -> float:
        """The mean over the last quarter so far: the driver's number is itself a mean over about a second."""
        self._done.set()
        self.join()
        return statistics.mean(self._samples[-max(1, len(self._samples) // 4) :] or [0.0])


def measure(run: Callable[[], None], stream: torch.cuda.Stream, sustain_s: float) -> tuple[float, float, float]:
    """Seconds of one call: burst and sustained (0 if not asked for), and the mean power in the latter."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            run()
        times = []
        for _ in range(12):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(stream)
            graph.replay()
            end.record(stream)
            stream.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        burst = statistics.median(times[2:])
        if not sustain_s:
            return burst, 0.0, 0.0
        n_replays = max(1, int(sustain_s / burst))
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        meter = PowerMeter()
        begin.record(stream)
        for _ in range(n_replays):
            graph.replay()
        end.record(stream)
        stream.synchronize()
        watts = meter.mean_w()
    return burst, begin.elapsed_time(end) / 1e3 / n_replays, watts


def report(name: str, amount: float, unit: str, times: tuple[float, float, float]) -> dict[str, object]:
    """Print one line and return its numbers: `amount` in units of 1e9 (GB) or 1e12 (TFLOP) a call."""
    burst, sustained, watts = times
    line = f"{name:58} {burst * 1e6:9.1f} us {amount / burst:8.1f} {unit}/s"
    if sustained:
        line += f"   sustained {sustained * 1e6:9.1f} us {amount / sustained:8.1f} {unit}/s {watts:4.0f} W"
    print(line, flush=True)
    return {
        "case": name,
        "unit": f"{unit}/s",
        "burst_us": burst * 1e6,
        "burst_rate": amount / burst,
        "sustained_us": sustained * 1e6,
        "sustained_rate": amount / sustained if sustained else 0.0,
        "power_w": watts,
    }


def planned(planner: str, load: Load, lane_sms: int, shape: DecodeShape | PrefillShape | None) -> Callable[[], None]:
    common = {"n_heads": HEADS, "n_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "lane_sms": lane_sms}
    rows = int(load.query_len.sum())
    if planner == "decode":
        assert shape is None or isinstance(shape, DecodeShape)
        return load.launch(DecodePlanner(n_rows=rows, shape=shape, **common))
    assert shape is None or isinstance(shape, PrefillShape)
    return load.launch(PrefillPlanner(n_rows=rows, n_requests=len(load.query_len), shape=shape, **common))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the first case of each kind")
    parser.add_argument("--sweep", action="store_true", help="every block shape on the first case, burst only")
    parser.add_argument("--lane-sms", type=int, default=0, help="run on a green context of this many multiprocessors")
    parser.add_argument("--bulk", action="store_true", help="sweep the decode kernel of the bulk copy engine")
    parser.add_argument("--only", choices=["decode", "prefill"])
    parser.add_argument("--page-tokens", type=int, default=16)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args()
    torch.manual_seed(0)
    n_sms = torch.cuda.get_device_properties(0).multi_processor_count
    stream = torch.cuda.Stream()
    if options.lane_sms:
        stream, n_sms = green_stream(options.lane_sms)
    gpu = torch.cuda.get_device_name(0)
    results: list[dict[str, object]] = []
    print(f"{gpu}, {n_sms} multiprocessors, pages of {options.page_tokens} tokens", flush=True)
    quick = options.quick or options.sweep
    sustain_s = 0.0 if options.sweep else SUSTAIN_S
    for kind in [options.only] if options.only else ["decode", "prefill"]:
        cases: dict[str, tuple[np.ndarray, np.ndarray]] = (
            {name: (np.ones_like(c), c) for name, c in decode_loads(quick).items()}
            if kind == "decode"
            else prefill_loads(quick)
        )
        for name, (query_len, context_len) in cases.items():
            load = Load.random(query_len, context_len, options.page_tokens)
            amount = (
                float(context_len.sum()) * 4 * KV_HEADS * HEAD_DIM / 1e9
                if kind == "decode"
                else causal_tflop(query_len, context_len)
            )
            shapes: list[DecodeShape | PrefillShape | None] = [None]
            if options.sweep:
                decode_sweep = BULK_SWEEP if options.bulk else DECODE_SWEEP
                shapes = [*(decode_sweep if kind == "decode" else PREFILL_SWEEP)]
            for shape in shapes:
                label = f"{kind} {name} {shape or ''}"
                try:
                    times = measure(planned(kind, load, n_sms, shape), stream, sustain_s)
                except Exception as error:  # a shape that does not fit must not end the sweep
                    print(f"{label}: {type(error).__name__}: {str(error)[:100]}", flush=True)
                    continue
                results.append(report(label, amount, "GB" if kind == "decode" else "TFLOP", times))
            del load
    if options.json:
        versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": gpu, "multiprocessors": n_sms}
        asked = {key: value for key, value in vars(options).items() if key != "json"}
        content = {"options": asked, **versions, "results": results}
        options.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
