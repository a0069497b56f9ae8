"""`nanoflow search`: from a profile to the best pipelines, as Pipeline files."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nanoflow.core.errors import ConfigError
from nanoflow.core.presets import find_preset

if TYPE_CHECKING:
    from nanoflow.core.model_spec import ModelSpec
    from nanoflow.core.ops import Resource
    from nanoflow.search.milp import Progress
    from nanoflow.search.search import Candidate

HELP = "search the best pipelines for a profile"
LOG_LEVEL = "WARNING"
SECONDS_BETWEEN_REPORTS = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("profile", metavar="PROFILE", type=Path, help="profile file (from `nanoflow profile`)")
    parser.add_argument("--model", metavar="MODEL", help="preset, folder or .gguf file (default: the profile's)")
    parser.add_argument("--dense-batch", type=int, metavar="N", required=True, help="tokens of one iteration")
    parser.add_argument("--decode", type=int, metavar="N", help="how many of them are decode tokens (default: half)")
    parser.add_argument("--even", action="store_true", help="spread decode rows evenly instead of putting them first")
    parser.add_argument("--step", type=int, metavar="N", default=128, help="grain of nano-batch sizes (default 128)")
    parser.add_argument("--max-nano-ops", type=int, metavar="N", default=4, help="most pieces of an op (default 4)")
    parser.add_argument(
        "--shares", metavar="R,R,…", help="shares that lanes may have (default 0.1 to 1 in steps of 0.1)"
    )
    parser.add_argument("--overlap", metavar="RESOURCE,…", help="resources that may overlap (default: all)")
    parser.add_argument("--seconds", type=float, metavar="X", default=600.0, help="time limit (default 600)")
    parser.add_argument("--best", type=int, metavar="K", default=3, help="how many pipelines to give (default 3)")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="write each pipeline as FOLDER/NAME.json (default: none is)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a pipeline")


def run(args: argparse.Namespace) -> int:
    """Search, print the candidates fastest first, write the pipelines."""
    from nanoflow.analysis.profile_table import ProfileTable
    from nanoflow.core.ops import Resource
    from nanoflow.pipeline.graph import layer_graph
    from nanoflow.pipeline.render import render_timeline
    from nanoflow.search.problem import DEFAULT_SHARES, Problem, RowMix
    from nanoflow.search.search import SearchLimits, search

    table = ProfileTable.load(args.profile)
    decode = args.dense_batch // 2 if args.decode is None else args.decode
    problem = Problem(
        graph=layer_graph(spec_of(args.model or table.model), table.ranks),
        table=table,
        mix=RowMix(args.dense_batch, decode, args.even),
        step=args.step,
        max_nano_ops=args.max_nano_ops,
        shares=_numbers(args.shares) if args.shares else DEFAULT_SHARES,
        overlapping=_resources(args.overlap) if args.overlap else tuple(Resource),
    )
    found = search(problem, SearchLimits(seconds=args.seconds, best=args.best), _Reporter())
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        for candidate in found:
            candidate.pipeline.save(args.output / f"{candidate.pipeline.name}.json")
    for candidate in found:
        print(json.dumps(candidate.summary()) if args.json else _line(candidate, found[-1]))
    if not args.json:
        print()
        print(render_timeline(found[0].timeline))
    print(_where(args.output, len(found)), file=sys.stderr)
    return 0


def spec_of(model: str) -> ModelSpec:
    """The spec of a preset, folder or file. Raises `ModelLoadError` for anything else."""
    spec = find_preset(model)
    if spec is None:
        from nanoflow.models.registry import resolve_model

        spec = resolve_model(model, "random").spec
    return spec


class _Reporter:
    """Progress on stderr, not more often than one can read."""

    def __init__(self) -> None:
        self.last_s = -SECONDS_BETWEEN_REPORTS

    def __call__(self, p: Progress) -> None:
        if p.stage != "found" and p.seconds < self.last_s + SECONDS_BETWEEN_REPORTS:
            return
        self.last_s = p.seconds
        where = f"best {p.incumbent_us:.1f} µs a layer"
        if math.isfinite(p.bound_us):
            where += f", this solve's bound {p.bound_us:.1f} µs, gap {100 * p.gap:.1f} %"
        print(f"{p.seconds:6.1f} s  {p.stage}  {where}  {p.note}", file=sys.stderr)


def _where(folder: Path | None, n: int) -> str:
    """Where the pipelines are now."""
    if folder is None:
        return "no pipeline was written: give --output FOLDER to keep them"
    return f"{n} pipeline{'s' * (n != 1)} written to {folder}"


def _line(candidate: Candidate, slowest: Candidate) -> str:
    return (
        f"{candidate.pipeline.name:<40} {candidate.period_us:>10.1f} µs a layer  "
        f"{slowest.period_us / candidate.period_us:.3f}× the last one's speed  "
        f"{100 * candidate.gap:.1f} % over the lower bound of its sizes"
    )


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--shares {text!r} must be numbers with commas, e.g. 0.25,0.5,0.75,1.") from error


def _resources(text: str) -> tuple[Resource, ...]:
    from nanoflow.core.ops import Resource

    try:
        return tuple(Resource(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--overlap {text!r} must name resources: {', '.join(Resource)}.") from error
