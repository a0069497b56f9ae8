"""`nanoflow bench`: measure this engine, or any server with OpenAI's API, under a stated load."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nanoflow.analysis.lengths import BUILT_IN
from nanoflow.cli import options
from nanoflow.core.config import EngineConfig

if TYPE_CHECKING:
    from nanoflow.bench.result import BenchResult
    from nanoflow.bench.workloads import Limits

HELP = "measure throughput and latency, of this engine or of any OpenAI endpoint"
LOG_LEVEL = "WARNING"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmarks and their options."""
    kinds = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    offline = kinds.add_parser("offline", help="all requests at once: throughput", allow_abbrev=False)
    options.add_engine_options(offline)
    group = offline.add_argument_group("benchmark")
    add_workload(group, requests=200)
    group.add_argument("--runs", type=int, default=3, metavar="N", help="measured repeats (default 3)")
    group.add_argument("--warmup", type=int, default=16, metavar="N", help="requests to run before (default 16)")
    group.add_argument("--trace", type=int, default=5, metavar="N", help="iterations to trace at the end (default 5)")
    add_output(group)
    offline.set_defaults(bench=run_offline)


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark, write its JSON, print its numbers."""
    from nanoflow.bench.show import lines_of

    if args.output is not None and args.output.is_dir():
        args.output = args.output / f"{args.benchmark}.json"
    result: BenchResult = args.bench(args)
    if args.output is not None:
        result.save(args.output)
    if args.json:
        print(result.to_json())
        return 0
    for line in lines_of(result):
        print(line)
    if args.output is not None:
        print(f"written to {args.output}")
    return 0


def run_offline(args: argparse.Namespace) -> BenchResult:
    """Build the options of an offline run and do it."""
    config = EngineConfig.from_options(**options.engine_options(args))
    from nanoflow.bench.environment import command_line
    from nanoflow.bench.offline import OfflineOptions, run_offline
    from nanoflow.bench.workloads import make_requests
    from nanoflow.cli.progress import TaskBar

    settings = OfflineOptions(args.runs, config.model.seed, args.warmup, args.trace)
    requests = make_requests(args.workload, args.requests, seed=config.model.seed, limits=limits_of(args))
    show = sys.stderr.isatty()
    with TaskBar("benchmark", show=show) as bar:
        return run_offline(
            config,
            requests,
            settings,
            command=command_line(),
            on_progress=bar.tasks if show else None,
            show_progress=show,
        )


def add_workload(group: argparse._ArgumentGroup, *, requests: int) -> None:
    """What is sent."""
    known = f"{', '.join(BUILT_IN)}, IN/OUT tokens, MEAN~DEVIATION for either, or a .csv trace (default 512/512)"
    group.add_argument("--workload", default="512/512", help=known)
    group.add_argument(
        "--requests", type=int, default=requests, metavar="N", help=f"how many requests (default {requests})"
    )
    for side, text in (
        ("total", "leave out requests with more tokens, prompt and output together"),
        ("prompt", "leave out requests with a longer prompt"),
        ("output", "leave out requests with a longer output"),
    ):
        group.add_argument(f"--max-{side}-tokens", type=int, metavar="N", help=text)


def add_output(group: argparse._ArgumentGroup) -> None:
    """Where the result goes."""
    group.add_argument("--output", "-o", type=Path, metavar="FILE", help="write the result, raw samples and all, here")
    group.add_argument("--json", action="store_true", help="print the result's JSON and nothing else")


def limits_of(args: argparse.Namespace) -> Limits:
    """The filter that the options ask for."""
    from nanoflow.bench.workloads import Limits

    return Limits(args.max_total_tokens, args.max_prompt_tokens, args.max_output_tokens)
