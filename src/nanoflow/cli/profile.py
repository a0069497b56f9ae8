"""`nanoflow profile`: measure every operation of a model on this machine, alone and in pairs, into a profile file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nanoflow.cli import options
from nanoflow.core.config import EngineConfig
from nanoflow.core.ops import Op

if TYPE_CHECKING:
    from nanoflow.analysis.profile_table import ProfileTable

HELP = "measure a model's operations on this machine, alone and in pairs"
LOG_LEVEL = "WARNING"
DEFAULT_WORKLOAD = "512/512"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    options.add_engine_options(parser)
    group = parser.add_argument_group("profile")
    group.add_argument("-o", "--output", type=Path, metavar="FILE", help="profile file (default MODEL.profile.json)")
    add_workload(group)
    group.add_argument("--largest", type=int, metavar="N", help="largest size in tokens (default: 1024, if it fits)")
    group.add_argument("--step", type=int, metavar="N", help="grain of sizes (default: an eighth of the dense batch)")
    group.add_argument("--quick", action="store_true", help="fewer sizes and pairs, the engine's kernels only")


def add_workload(group: argparse._ArgumentGroup) -> None:
    """`--workload`, which `tune` has as well."""
    group.add_argument(
        "--workload",
        metavar="W",
        default=DEFAULT_WORKLOAD,
        help=f"whose batch to measure: splitwise, lmsys-chat, sharegpt, IN/OUT, .csv (default {DEFAULT_WORKLOAD})",
    )


def run(args: argparse.Namespace) -> int:
    """Measure with a progress bar, write the file, print the times."""
    config = EngineConfig.from_options(**options.engine_options(args))
    from nanoflow.cli.progress import TaskBar
    from nanoflow.engine.profiling import profile_model

    path = args.output or Path(f"{Path(config.model.model).name}.profile.json")
    with TaskBar("profiling", show=sys.stderr.isatty()) as bar:
        table = profile_model(
            config,
            path,
            workload=args.workload,
            largest=args.largest,
            step=args.step,
            quick=args.quick,
            on_task=bar.tasks,
        )
    print_table(table)
    print(f"written to {path}")
    return 0


def print_table(table: ProfileTable) -> None:
    """Times by operation and share in µs, then P(R)."""
    ranks = f", {table.ranks} ranks" if table.ranks > 1 else ""
    experts = ", expert parallel" if table.expert_parallel else ""
    print(f"{table.model}, {table.dtype}, {table.machine.get('processor', table.machine['device'])}{ranks}{experts}")
    sizes = sorted({entry.tokens for entry in table.solo})
    rows: dict[tuple[Op, str, float], dict[int, float]] = {}
    for entry in table.solo:
        rows.setdefault((entry.op, entry.implementation, entry.share), {})[entry.tokens] = entry.time_us
    print(f"{'µs alone':<20}{'kernels':<11}{'share':>6}" + "".join(f"{size:>10}" for size in sizes))
    for (op, implementation, share), times in rows.items():
        cells = "".join(f"{times[size]:>10.0f}" if size in times else f"{'':>10}" for size in sizes)
        print(f"{op:<20}{implementation:<11}{share:>6.2f}{cells}")
    for pair in table.interference:
        shares = ", ".join(f"P({r:.2f}) = {p:.2f}" for r, p in pair.by_share)
        points = ", ".join(f"P({r:.2f}) = {p:.2f}" for r, p in pair.points)
        plain = "" if pair.unshared is None else f"; P = {pair.unshared:.2f} on plain streams"
        print(f"{pair.resource} beside {pair.against}: by true share {shares}; by the paper's R {points}{plain}")
