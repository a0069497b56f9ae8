"""The entry point: finds the command, runs it, and turns errors into one sentence and an exit code.

Exit codes: 0 done, 1 the command ran and says no, 2 a user error, 130 interrupted. Command modules import nothing
heavy until they run, so that help and errors come at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Protocol

from nanoflow import __version__
from nanoflow.cli import (
    analyze,
    batch,
    bench,
    chat,
    doctor,
    generate,
    kv,
    models,
    pipeline,
    plan,
    profile,
    report,
    search,
    serve,
    tune,
)
from nanoflow.cli.parser import SentenceParser, add_log_level
from nanoflow.core import env
from nanoflow.core.errors import ConfigError, NanoflowError
from nanoflow.core.log import setup_logging

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class Command(Protocol):
    """What each command module offers."""

    HELP: str
    LOG_LEVEL: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's options."""
        ...

    def run(self, args: argparse.Namespace) -> int:
        """Do it; the return value is the exit code."""
        ...


COMMANDS: dict[str, Command] = {
    "generate": generate,
    "batch": batch,
    "chat": chat,
    "serve": serve,
    "models": models,
    "doctor": doctor,
    "analyze": analyze,
    "plan": plan,
    "bench": bench,
    "report": report,
    "profile": profile,
    "search": search,
    "tune": tune,
    "pipeline": pipeline,
    "kv": kv,
}


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = SentenceParser(
        prog="nanoflow",
        description="Serve language models close to the limit of the machine.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nanoflow {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        child = commands.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        add_log_level(child)
        module.add_arguments(child)
        child.set_defaults(run=module.run, default_log_level=module.LOG_LEVEL)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit code."""
    args = build_parser().parse_args(argv)
    try:
        setup_logging(_log_level(args))
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except NanoflowError as error:
        print(f"nanoflow: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("nanoflow: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`| head`). Nothing may be written to stdout any more, not even by the interpreter's exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run() -> None:
    """The command `nanoflow`: `main`, and the end of the process.

    One that shared a model with other GPUs ends without tidying up: the destructors of torch's and CUDA's objects may
    wait there for processes that have gone.
    """
    code = main()
    groups = sys.modules.get("nanoflow.distributed.group")
    if groups is not None and groups.left_behind:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _log_level(args: argparse.Namespace) -> str:
    """`--log-level`, else the environment's, else what suits the command."""
    level: str = (args.log_level or env.log_level(default=args.default_log_level)).upper()
    if level not in logging.getLevelNamesMapping():
        raise ConfigError(f"NANOFLOW_LOG_LEVEL={level!r} is no log level; use debug, info, warning or error.")
    return level


if __name__ == "__main__":
    run()
