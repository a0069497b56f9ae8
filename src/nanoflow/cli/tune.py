"""`nanoflow tune`: profile this machine, search a pipeline, verify it by running, and keep the fastest."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoflow.cli import options
from nanoflow.cli.profile import add_workload
from nanoflow.core.config import EngineConfig

if TYPE_CHECKING:
    from nanoflow.engine.tune import Tuning

HELP = "find the fastest pipeline for a model on this machine and keep it"
LOG_LEVEL = "WARNING"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    options.add_engine_options(parser)
    group = parser.add_argument_group("tuning")
    add_workload(group)
    group.add_argument("--profile", type=Path, metavar="FILE", help="use this profile instead of measuring a quick one")
    group.add_argument("--search-seconds", type=float, metavar="X", help="time limit of the search (default 75)")
    group.add_argument("--verify-seconds", type=float, metavar="X", help="time limit of the verification (default 90)")
    group.add_argument("--rounds", type=int, metavar="N", help="rounds of the verification (default 12)")
    group.add_argument("--best", type=int, metavar="K", help="candidates of the search to verify (default 3)")
    group.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Tune with progress bars, then print the table of predictions and measurements."""
    config = EngineConfig.from_options(**options.engine_options(args))
    from nanoflow.cli.progress import TaskBar
    from nanoflow.engine.searching import TuneLimits
    from nanoflow.engine.tune import tune

    given = {
        "search_seconds": args.search_seconds,
        "verify_seconds": args.verify_seconds,
        "rounds": args.rounds,
        "best": args.best,
    }
    limits = TuneLimits(seed=config.model.seed, **{name: value for name, value in given.items() if value is not None})
    show = sys.stderr.isatty()
    with TaskBar("tuning", show=show) as bar:
        tuning = tune(
            config, workload=args.workload, limits=limits, profile=args.profile, on_phase=bar, show_progress=show
        )
    if args.json:
        print(json.dumps({**tuning.report, "pipeline": str(tuning.path)}))
    else:
        print_report(tuning)
    return 0


def print_report(tuning: Tuning) -> None:
    """One row a contender: predicted and measured time a layer, their difference, and the ratio to sequential."""
    report, mix = tuning.report, tuning.report["workload"]
    n_decode = mix["n_decode"]
    batch = f"{n_decode} decode tokens of {mix['context']} keys + {mix['dense_batch'] - n_decode} prefill tokens"
    ranks = f", {report['ranks']} ranks" if report["ranks"] > 1 else ""
    ranks += ", expert parallel" if report["expert_parallel"] else ""
    print(f"{report['model']}, {report['dtype']}, {report['kernels']} kernels{ranks}; {mix['workload']}: {batch}")
    width = max(40, *(len(one["name"]) + 2 for one in report["candidates"]))
    head = f"{'PIPELINE':<{width}}{'predicted':>11}{'measured':>11}{'error':>8}{'iteration':>12}{'spread':>8}"
    print(f"{'':<{width}}{'a layer':>11}{'a layer':>11}")
    print(f"{head}   time / sequential (interval)")
    for one in report["candidates"]:
        low, high = one["ratio_interval"]
        print(
            f"{one['name']:<{width}}{one['predicted_layer_us']:>8.0f} µs{one['measured_layer_us']:>8.0f} µs"
            f"{one['prediction_error']:>+8.1%}{one['measured_iteration_us'] / 1e3:>9.1f} ms{one['spread']:>8.1%}"
            f"   {one['ratio_to_sequential']:.3f} ({low:.3f} to {high:.3f})"
        )
    for one in report["candidates"]:
        if "form_of" in one:
            saved_us = one["saved_layer_us"]
            compared = f"{abs(saved_us):.1f} µs a layer {'less' if saved_us >= 0 else 'more'} than"
            print(f"{one['name']} takes {compared} {one['form_of']}")
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in report["seconds"].items())
    print(f"winner after {report['rounds']} rounds: {report['winner']} ({seconds})")
    print_small_batches(report)
    print(f"kept in {tuning.path}; --pipeline auto uses it from now on")


def print_small_batches(report: dict[str, Any]) -> None:
    """What the winner takes in smaller batches, one row a size, and from which on it runs; nothing if it cuts none."""
    for one in report["small_batches"]:
        low, high = one["ratio_interval"]
        print(
            f"in batches of {one['tokens']} tokens {one['iteration_us'] / 1e3:.1f} ms, sequential "
            f"{one['sequential_iteration_us'] / 1e3:.1f} ms: {one['ratio_to_sequential']:.3f} ({low:.3f} to {high:.3f})"
        )
    if report["min_tokens"]:
        print(f"batches of fewer than {report['min_tokens']} tokens will run the sequential order")
