"""`nanoflow pipeline show FILE`: what a Pipeline does and when, predicted, as text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from nanoflow.cli.search import spec_of
from nanoflow.core.errors import ConfigError, PipelineError

if TYPE_CHECKING:
    from nanoflow.pipeline.graph import LayerGraph
    from nanoflow.pipeline.pipeline import Pipeline
    from nanoflow.pipeline.timeline import Timeline

HELP = "look at a pipeline file"
LOG_LEVEL = "WARNING"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("action", choices=("show",), help="show: the predicted timeline")
    parser.add_argument("file", metavar="FILE", type=Path, help="Pipeline JSON")
    parser.add_argument("--model", metavar="MODEL", help="the model it is for (default: what the file says)")
    parser.add_argument("--ranks", type=int, metavar="N", help="tensor-parallel ranks (default: what the file says)")
    parser.add_argument(
        "--profile", metavar="PROFILE", type=Path, help="predict with this profile, not the file's times"
    )
    parser.add_argument(
        "--decode", type=int, metavar="N", help="with --profile: decode tokens of the batch (default: half)"
    )
    parser.add_argument("--plot", type=Path, metavar="OUT", help="also draw it, predicted over measured: .png or .svg")
    parser.add_argument("--width", type=int, metavar="N", default=100, help="characters of the chart (default 100)")


def run(args: argparse.Namespace) -> int:
    """Check the pipeline against its model and print the chart."""
    from nanoflow.pipeline.graph import layer_graph
    from nanoflow.pipeline.pipeline import Pipeline
    from nanoflow.pipeline.render import render_timeline

    if args.width < 20:
        raise ConfigError(f"--width must be at least 20, not {args.width}.")
    pipeline = Pipeline.load(args.file)
    model = args.model or pipeline.meta.get("model")
    if model is None:
        raise PipelineError(f"{args.file} does not say which model it is for; add --model.")
    graph = layer_graph(spec_of(model), args.ranks or int(pipeline.meta.get("ranks", 1)))
    pipeline.validate(graph)
    timeline = _with_profile(args, pipeline, graph) if args.profile else _with_own_times(args.file, pipeline, graph)
    if args.plot is not None:
        _plot(args.plot, timeline)
    print(render_timeline(timeline, args.width))
    return 0


def _plot(path: Path, predicted: Timeline) -> None:
    """Draw the predicted timeline, and the measured one where the file holds it (`nanoflow tune` writes it)."""
    from nanoflow.pipeline.plot import draw, measured_timeline

    measured = measured_timeline(predicted.pipeline)
    draw([("predicted", predicted), *([("measured", measured)] if measured is not None else [])], path)


def _with_own_times(file: Path, pipeline: Pipeline, graph: LayerGraph) -> Timeline:
    from nanoflow.pipeline.timeline import from_durations

    durations = pipeline.meta.get("predicted", {}).get("durations_us", [])
    if len(durations) != len(pipeline.nano_ops):
        raise PipelineError(f"{file} holds no predicted time for each nano-operation; add --profile.")
    return from_durations(pipeline, graph, durations)


def _with_profile(args: argparse.Namespace, pipeline: Pipeline, graph: LayerGraph) -> Timeline:
    from nanoflow.analysis.profile_table import ProfileTable
    from nanoflow.pipeline.timeline import predict
    from nanoflow.search.problem import Problem, RowMix

    mix = pipeline.meta.get("mix", {})
    decode = args.decode if args.decode is not None else int(mix.get("n_decode", pipeline.dense_batch // 2))
    table = ProfileTable.load(args.profile)
    shares = tuple({1.0, *(lane.share for lane in pipeline.lanes)})
    rows = RowMix(pipeline.dense_batch, decode, bool(mix.get("even", False)))
    problem = Problem(graph, table, rows, step=pipeline.dense_batch, shares=shares)
    return predict(pipeline, graph, problem.time_us)
