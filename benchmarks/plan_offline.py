"""Does the cost model behind `nanoflow plan` predict an offline benchmark that somebody ran? It needs no machine.

Takes a result of `nanoflow bench offline`, simulates the same requests on an engine of the same sizes, with iteration
times by the cost model, and prints both sides. Run with `python benchmarks/plan_offline.py RESULT.json --gpu h200`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nanoflow.analysis.work import iteration_work
from nanoflow.bench.result import BenchResult, load_result
from nanoflow.bench.workloads import Limits, make_requests
from nanoflow.core.hardware_presets import find_hardware
from nanoflow.core.presets import preset
from nanoflow.engine.scheduler import SchedulerLimits
from nanoflow.planning.plan import PUBLISHED_EFFICIENCY
from nanoflow.planning.simulate import Simulation, simulate
from nanoflow.planning.times import FloorTimes


def simulated(result: BenchResult, gpu: str, workload: str) -> Simulation:
    """The same requests at once on the same sizes."""
    engine, spec = result.engine, preset(result.model.name)
    dtype, page = str(engine["dtype"]), int(engine["page_tokens"])
    hardware = find_hardware(gpu)
    rates = hardware.attained_rates(dtype) or hardware.rates(dtype)
    limits = SchedulerLimits(
        dense_batch=int(engine["dense_batch"]),
        max_running=int(engine["max_running"]),
        max_model_len=int(engine["max_model_len"]),
        page_tokens=page,
        n_pages=int(engine["kv_memory_bytes"]) // (page * spec.kv_bytes_per_token(dtype)),
        caching=False,
    )
    info = result.workload
    requests = make_requests(workload, info.n_requests, seed=info.seed, limits=Limits(info.max_total_tokens))
    times = FloorTimes(spec, dtype, rates, efficiency=1.0 if rates.measured else PUBLISHED_EFFICIENCY)
    return simulate(requests, limits, times, iteration_work(spec, dtype))


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="a result of nanoflow bench offline")
    parser.add_argument("--gpu", required=True, help="the preset of the device that it ran on")
    parser.add_argument("--workload", help="its workload, if the result's name for it is not enough (a .csv)")
    options = parser.parse_args()
    result = load_result(options.result)
    run = simulated(result, options.gpu, options.workload or result.workload.name)
    measured = result.series[0].numbers
    rows = {
        "tokens_per_s": (measured["tokens_per_s"], run.numbers()["tokens_per_s"]),
        "iterations": (measured["iterations"], float(len(run.took_s))),
        "iteration_mean_ms": (measured["iteration_mean_ms"], 1e3 * float(run.took_s.mean())),
    }
    print(result.title)
    for name, (there, here) in rows.items():
        print(f"{name:<20} measured {there:>10.1f}   simulated {here:>10.1f}   {100 * (here / there - 1):+.1f} %")


if __name__ == "__main__":
    main()
