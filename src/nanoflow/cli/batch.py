"""`nanoflow batch`: answer a file of requests, however large, and go on where a killed run stopped."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoflow.cli import options
from nanoflow.cli.engines import start_engine
from nanoflow.cli.parser import SentenceParser, add_log_level
from nanoflow.core.config import EngineConfig, ModelConfig
from nanoflow.scaleout.config import ScaleoutConfig
from nanoflow.text.tool_calls.formats import PARSERS

if TYPE_CHECKING:
    from nanoflow.batch.job import BatchJob
    from nanoflow.batch.status import JobStatus

HELP = "answer a file of requests, resumable after any kill"
LOG_LEVEL = "WARNING"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `run` and `status`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=SentenceParser)
    run_help = "answer the requests of a file in OpenAI's batch format"
    child = actions.add_parser("run", help=run_help, description=run_help, allow_abbrev=False)
    add_log_level(child, below=True)
    _add_run_arguments(child)
    status_help = "how far a job is"
    child = actions.add_parser("status", help=status_help, description=status_help, allow_abbrev=False)
    add_log_level(child, below=True)
    child.add_argument("output", metavar="OUT.jsonl", type=Path, help="the job's output file")
    child.add_argument("--json", action="store_true", help="print one JSON object")


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_engine_options(parser)
    group = parser.add_argument_group("batch")
    group.add_argument("input", metavar="IN.jsonl", type=Path, help="a request a line")
    group.add_argument("output", metavar="OUT.jsonl", type=Path, help="answers; OUT.jsonl.journal is kept beside it")
    group.add_argument("--errors", metavar="FILE", type=Path, help="what failed (default OUT.errors.jsonl)")
    group.add_argument("--in-flight", metavar="N", type=int, help="most answers at once (default: chosen)")
    group.add_argument("--window", metavar="N", type=int, default=2048, help="requests ordered together (default 2048)")
    group.add_argument("--keep-order", action="store_true", help="send requests in the file's order")
    group.add_argument(
        "--tool-call-parser", choices=PARSERS, help="how the model writes calls of tools (default: found by the model)"
    )
    group.add_argument("--restart", action="store_true", help="drop what OUT.jsonl holds and begin anew")
    group.add_argument("--json", action="store_true", help="print the result as one JSON object")
    options.add_dataclass_options(parser.add_argument_group("replicas on Ray"), ScaleoutConfig)


def run(args: argparse.Namespace) -> int:
    """Run the action."""
    return show_status(args) if args.action == "status" else run_job(args)


def run_job(args: argparse.Namespace) -> int:
    """Answer what has no answer yet. Exit code 1 if a line failed, in this run or an earlier one."""
    config = EngineConfig.from_options(**options.engine_options(args))
    options.check_positive("window", args.window)
    if args.in_flight is not None:
        options.check_positive("in_flight", args.in_flight)
    from nanoflow.batch.job import BatchJob
    from nanoflow.batch.paths import JobPaths
    from nanoflow.batch.status import read_status
    from nanoflow.cli.batch_progress import SurveyCounter

    paths = JobPaths.beside(args.input, args.output, args.errors)
    with SurveyCounter(show=sys.stderr.isatty()) as counter:
        job = BatchJob.open(paths, identity_of(config.model), restart=args.restart, on_survey=counter)
    try:
        report = None if job.ended else _answer_all(job, config, args)
    finally:
        job.close()
    status = read_status(paths.output)
    print_status(status, as_json=args.json, report=report)
    return 1 if status.counts.failed else 0


def _answer_all(job: BatchJob, config: EngineConfig, args: argparse.Namespace) -> dict[str, Any] | None:
    """Load the model and run the job; the report of the run."""
    import asyncio

    from nanoflow.batch.runner import BatchRunner, RunLimits
    from nanoflow.cli.batch_progress import ProgressBar
    from nanoflow.server.batch_responder import offline_responder

    engine = start_engine(config, ScaleoutConfig(**options.chosen(args, ScaleoutConfig)))
    try:
        scheduler = engine.config.scheduler
        in_flight = args.in_flight or 2 * (scheduler.max_running or 1)
        limits = RunLimits(in_flight, window_lines=args.window, reorder=not args.keep_order)
        with ProgressBar(job, engine, show=sys.stderr.isatty()) as bar:

            async def answer() -> None:
                responder = offline_responder(engine, tool_call_parser=args.tool_call_parser)
                await BatchRunner(job, responder, limits, bar.update).run()

            asyncio.run(answer())
            return bar.report()
    finally:
        engine.close()


def identity_of(model: ModelConfig) -> dict[str, Any]:
    """What answers depend on: every option of the model."""
    return asdict(model)


def show_status(args: argparse.Namespace) -> int:
    """Print how far a job is. Exit code 1 if it has not ended or a line failed."""
    from nanoflow.batch.status import read_status

    status = read_status(args.output)
    print_status(status, as_json=args.json)
    return 0 if status.state == "finished" and not status.counts.failed else 1


def print_status(status: JobStatus, *, as_json: bool, report: dict[str, Any] | None = None) -> None:
    """One line for people, or one object."""
    if as_json:
        print(json.dumps(status.to_dict() | ({} if report is None else {"run": report})))
        return
    print(status.summary())
    if report is not None and status.counts.tokens.output:  # nothing computed has no speed
        print(f"computed in this run: {report['summary']}")
