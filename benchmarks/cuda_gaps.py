"""How long the GPU waits between iterations, from a profiler's trace of the running engine.

    python benchmarks/cuda_gaps.py llama-3-8b --running 1000 --iterations 20

A model with random weights serves `--running` requests at once; in the steady state torch's profiler (CUPTI) notes when
every kernel and copy ran. The gap of an iteration is the time from the end of its last kernel to the start of the
next iteration's first; idle time is all time in which nothing ran. The profiler itself slows the host, so true gaps
are shorter.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from nanoflow.core.config import EngineConfig
from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.build import Engine, build_engine


def kernel_spans(engine: Engine, warm: int, iterations: int) -> tuple[np.ndarray, list[str], list[int]]:
    """Start and end (µs) of everything that ran on the GPU in `iterations` iterations, names, and batch sizes."""
    in_flight = None
    for _ in range(warm):
        in_flight = engine.core.step(in_flight)
    torch.cuda.synchronize()
    tokens = []
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(iterations):
            in_flight = engine.core.step(in_flight)
            assert in_flight is not None, "more iterations than the requests last"
            tokens.append(in_flight.scheduled.plan.n_tokens)
        torch.cuda.synchronize()
    events = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = np.array([(event.time_range.start, event.time_range.end) for event in events], dtype=np.float64)
    order = np.argsort(spans[:, 0])
    engine.core.fail_all("measured")
    return spans[order], [events[index].name for index in order], tokens


def gaps_of(spans: np.ndarray, names: list[str], iterations: int) -> np.ndarray:
    """Idle µs before the first kernel of each iteration but the first: iterations begin with the copy of the batch."""
    starts = [index for index, name in enumerate(names) if "Memcpy HtoD" in name]
    firsts = starts[:: max(1, len(starts) // iterations)][:iterations]
    ends = np.maximum.accumulate(spans[:, 1])
    return np.array([max(0.0, spans[first, 0] - ends[first - 1]) for first in firsts if first > 0])


def idle_us(spans: np.ndarray) -> float:
    """Time within the trace in which nothing ran."""
    ends = np.maximum.accumulate(spans[:, 1])
    return float(np.maximum(0.0, spans[1:, 0] - ends[:-1]).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="llama-3-8b")
    parser.add_argument("--running", type=int, default=1000)
    parser.add_argument("--prompt", type=int, default=300)
    parser.add_argument("--warm", type=int, default=400, help="iterations before, to reach the steady state")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    config = EngineConfig.from_options(
        model=args.model, load_format="random", tokenizer="bytes", dtype="bfloat16", dense_batch=2048,
        max_running=args.running, max_model_len=2048, device="cuda",
    )  # fmt: skip
    engine = build_engine(config, show_progress=False)
    rng = np.random.default_rng(0)
    vocab = engine.spec.vocab_size
    # Outputs of many lengths end all the time, so that prompts always fill what the decode tokens leave of a batch.
    for length in rng.integers(50, 551, 4 * args.running).tolist():
        params = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=length)
        for sequence in engine.submission.sequences(rng.integers(0, vocab, args.prompt).tolist(), params):
            engine.core.add(sequence)
    spans, names, tokens = kernel_spans(engine, args.warm, args.iterations)
    gaps, idle = gaps_of(spans, names, args.iterations), idle_us(spans)
    total = float(spans[:, 1].max() - spans[0, 0])
    found = {
        "gpu": torch.cuda.get_device_name(),
        "model": args.model,
        "iterations": args.iterations,
        "batch_tokens_mean": float(np.mean(tokens)),
        "running": int(engine.core.stats().n_running),
        "iteration_ms": total / args.iterations / 1e3,
        "gap_median_us": float(np.median(gaps)),
        "gap_largest_us": float(gaps.max()),
        "gap_percent_of_iteration": 100.0 * float(gaps.sum()) / total,
        "idle_percent_of_time": 100.0 * idle / total,
        "launches_per_iteration": len(spans) / args.iterations,
    }
    print(json.dumps(found, indent=1))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    engine.device.close()


if __name__ == "__main__":
    main()
