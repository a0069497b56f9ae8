"""`nanoflow pipeline show FILE`: what a Pipeline does and when, predicted, as text."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nanoflow.cli.search import spec_of
from nanoflow.core.errors import ConfigError, PipelineError
from nanoflow.core.hardware_presets import HARDWARE, find_hardware

if TYPE_CHECKING:
    from nanoflow.analysis.profile_table import ProfileTable
    from nanoflow.core.hardware import MachineRates
    from nanoflow.core.model_spec import ModelSpec
    from nanoflow.pipeline.graph import LayerGraph
    from nanoflow.pipeline.known_times import KnownTimeline
    from nanoflow.pipeline.pipeline import Pipeline
    from nanoflow.pipeline.timeline import Timeline

HELP = "look at a pipeline file"
LOG_LEVEL = "WARNING"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("action", choices=("show",), help="show: the predicted timeline")
    parser.add_argument("file", metavar="FILE", type=Path, help="Pipeline JSON")
    parser.add_argument(
        "--model", metavar="MODEL", help="the model it is for (default: what the file says, else the profile)"
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="tensor-parallel ranks (default: what the file says, else the profile)"
    )
    parser.add_argument(
        "--profile", metavar="PROFILE", type=Path, help="predict with this profile, not the file's times"
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        default="cpu",
        help="a file without times is drawn by the cost model's least times on this device: cpu (this machine, "
        f"measured; the default), {', '.join(HARDWARE)}",
    )
    parser.add_argument(
        "--decode", type=int, metavar="N", help="with --profile: decode tokens of the batch (default: half)"
    )
    parser.add_argument("--plot", type=Path, metavar="OUT", help="also draw it, predicted over measured: .png or .svg")
    parser.add_argument("--width", type=int, metavar="N", default=100, help="characters of the chart (default 100)")


def run(args: argparse.Namespace) -> int:
    """Check the pipeline against its model and print the chart."""
    from nanoflow.analysis.profile_table import ProfileTable
    from nanoflow.pipeline.graph import layer_graph
    from nanoflow.pipeline.known_times import KnownTimeline
    from nanoflow.pipeline.pipeline import Pipeline
    from nanoflow.pipeline.render import render_timeline

    if args.width < 20:
        raise ConfigError(f"--width must be at least 20, not {args.width}.")
    pipeline = Pipeline.load(args.file)
    table = ProfileTable.load(args.profile) if args.profile else None
    model = args.model or pipeline.meta.get("model") or (table.model if table else None)
    if model is None:
        raise PipelineError(f"{args.file} does not say which model it is for; add --model MODEL.")
    spec, ranks = spec_of(model), args.ranks or int(pipeline.meta.get("ranks", table.ranks if table else 1))
    graph = layer_graph(spec, ranks)
    pipeline.validate(graph)
    if table is not None:
        known = KnownTimeline(_with_profile(args.decode, table, pipeline, graph), f"predicted from {args.profile}")
    else:
        known = _without_profile(args, pipeline, spec, ranks)
    if args.plot is not None:
        _plot(args.plot, known.timeline)
    print(render_timeline(known.timeline, args.width))
    print(f"\ntimes: {known.source}")
    return 0


def _plot(path: Path, predicted: Timeline) -> None:
    """Draw the predicted timeline, and the measured one where the file holds it (`nanoflow tune` writes it)."""
    from nanoflow.pipeline.plot import draw, measured_timeline

    measured = measured_timeline(predicted.pipeline)
    draw([("predicted", predicted), *([("measured", measured)] if measured is not None else [])], path)


def _without_profile(args: argparse.Namespace, pipeline: Pipeline, spec: ModelSpec, ranks: int) -> KnownTimeline:
    """By the predicted times that the file holds, else by the least that the cost model knows."""
    from nanoflow.pipeline.graph import layer_graph
    from nanoflow.pipeline.known_times import KnownTimeline, known_timeline
    from nanoflow.pipeline.timeline import from_durations

    durations = pipeline.meta.get("predicted", {}).get("durations_us", [])
    if len(durations) == len(pipeline.nano_ops):
        timeline = from_durations(pipeline, layer_graph(spec, ranks), durations)
        return KnownTimeline(timeline, f"predicted, as {args.file} has them")
    dtype = str(pipeline.meta.get("dtype", "bfloat16"))
    rates = _rates(args.gpu, dtype, ranks)
    devices = 1 if args.gpu == "cpu" else ranks
    known = known_timeline(pipeline, spec, dtype, rates, ranks=ranks, devices=devices)
    if known is None:
        raise PipelineError(f"the cost model knows no time for some operations of {args.file}; add --profile.")
    return replace(known, source=f"{known.source}; rates of {rates.name}")


def _rates(device: str, dtype: str, devices: int) -> MachineRates:
    """Measured rates of this CPU, or of a preset device where somebody measured them, else its published ones."""
    if device == "cpu":
        from nanoflow.profiling.machine import measure_rates

        return measure_rates("cpu", dtype)
    hardware = find_hardware(device)
    return hardware.attained_rates(dtype, devices) or hardware.rates(dtype, devices)


def _with_profile(decode: int | None, table: ProfileTable, pipeline: Pipeline, graph: LayerGraph) -> Timeline:
    from nanoflow.pipeline.timeline import predict
    from nanoflow.search.problem import Problem, RowMix

    mix = pipeline.meta.get("mix", {})
    decode = decode if decode is not None else int(mix.get("n_decode", pipeline.dense_batch // 2))
    shares = tuple({1.0, *(lane.share for lane in pipeline.lanes)})
    rows = RowMix(pipeline.dense_batch, decode, bool(mix.get("even", False)))
    problem = Problem(graph, table, rows, step=pipeline.dense_batch, shares=shares)
    return predict(pipeline, graph, problem.time_us)
