"""`nanoflow analyze`: which resource bounds a model on a machine, and the throughput that nothing can exceed there."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoflow.analysis import plots
from nanoflow.analysis.describe import describe
from nanoflow.analysis.lengths import BUILT_IN, AnyWorkload, find_workload
from nanoflow.analysis.maps import Machine, ServedModel, memory_map, network_map, paper_columns, published_machine
from nanoflow.analysis.roofline import roofline_points
from nanoflow.analysis.serving import Analysis, Group, analyse, with_link
from nanoflow.cli.files import make_folder_of
from nanoflow.core import env
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.hardware_presets import HARDWARE, find_hardware
from nanoflow.core.model_spec import DTYPE_BYTES, ModelSpec
from nanoflow.core.presets import find_preset

HELP = "compute the bounding resource and the optimal throughput of a model on a machine"
LOG_LEVEL = "WARNING"
SAMPLES = 10_000
THIS_CPU = "cpu"


@dataclass(frozen=True)
class Target:
    """The machine that was asked for: rates by their kind (published, measured), memory of one device, sources."""

    name: str
    rates: dict[str, MachineRates]
    memory_bytes: float
    sources: dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    gpus = f"{THIS_CPU} (this machine, measured; the default), {', '.join(HARDWARE)}"
    parser.add_argument("model", metavar="MODEL", help="preset, model folder, config.json or .gguf file")
    parser.add_argument("--gpu", "--hardware", dest="gpu", metavar="NAME", default=THIS_CPU, help=gpus)
    parser.add_argument(
        "--gpus", type=int, metavar="N", default=1, help="devices that hold one copy of the model (default 1)"
    )
    parser.add_argument(
        "--dense-batch", type=int, metavar="N", default=2048, help="tokens of an iteration (default 2048)"
    )
    parser.add_argument(
        "--workload",
        metavar="W",
        default="512/512",
        help=f"{', '.join(BUILT_IN)}, IN/OUT tokens, MEAN~DEVIATION for either, or a .csv trace (default 512/512)",
    )
    parser.add_argument("--dtype", choices=DTYPE_BYTES, default="bfloat16", help="precision (default bfloat16)")
    parser.add_argument(
        "--link-gb", type=float, metavar="X", help="link between devices, GB/s one way, instead of the device's own"
    )
    parser.add_argument("--attained-tflops", type=float, metavar="X", help="GEMM rate measured on the device, TFLOP/s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON object to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw maps and a roofline to this .png or .svg file")


def run(args: argparse.Namespace) -> int:
    """Analyse by published peaks and, where known, by measured rates; print both."""
    _check(args)
    spec, workload, target = spec_of(args.model), find_workload(args.workload), _target(args)
    prompts, answers = workload.sample(SAMPLES)
    link = None if args.link_gb is None else args.link_gb * 1e9
    found: dict[str, tuple[Group, Analysis]] = {}
    for kind, rates in target.rates.items():
        group = with_link(Group(rates, target.memory_bytes, args.gpus), link)
        found[kind] = (group, analyse(spec, group, args.dtype, args.dense_batch, prompts, answers))
    result: dict[str, Any] = {
        "model": spec.name,
        "dtype": args.dtype,
        "gpus": args.gpus,
        "workload": {"name": args.workload, "mean_in": float(prompts.mean()), "mean_out": float(answers.mean())},
        **{kind: describe(group, analysis) for kind, (group, analysis) in found.items()},
        "sources": target.sources,
    }
    text = json.dumps(result)
    if args.output is not None:
        args.output.write_text(text + "\n")
    if args.json:
        print(text)
    else:
        for kind in found:
            print_table(result, kind, "CPU" if target.name == THIS_CPU else "GPU")
    if args.plot is not None:
        plots.draw_analysis(_drawing(args, spec, workload, target, found), args.plot)
        if not args.json:
            print(f"drawn to {args.plot}")
    return 0


def print_table(result: dict[str, Any], kind: str, each: str) -> None:
    """One row an operation, then the totals, the bound and the paper's formulas; `each` is what a device is called."""
    found, workload = result[kind], result["workload"]
    rates, batch, paper, iteration = (found[key] for key in ("rates", "batch", "paper", "iteration"))
    limits = list(iteration["floors_ms"])
    joules = iteration["energy_j"] is not None
    print(f"{result['model']} on {result['gpus']} x {rates['name']}, {rates['dtype']}, {kind} rates")
    means = f"mean prompt {workload['mean_in']:.0f}, mean output {workload['mean_out']:.0f} tokens"
    print(f"workload: {workload['name']} ({means})")
    print(
        f"batch: {batch['n_decode']} decode + {batch['n_prefill']} prefill tokens"
        + (" (as many as memory holds)" if batch["limited_by_memory"] else "")
    )
    head = f"{'OPERATION':<20}{'GFLOP':>12}{'GB':>10}{'wire GB':>10}" + (f"{'J':>9}" if joules else "")
    print(head + "".join(f"{limit + ' ms':>13}" for limit in limits))
    for name, op in {**found["ops"], "all": iteration}.items():
        work = f"{op['flops'] / 1e9:>12.1f}{op['mem_bytes'] / 1e9:>10.2f}{op['wire_bytes'] / 1e9:>10.2f}"
        energy = f"{op['energy_j']:>9.2f}" if joules else ""
        print(f"{name:<20}{work}{energy}" + "".join(f"{op['floors_ms'].get(limit, 0.0):>13.2f}" for limit in limits))
    print(f"bound by {iteration['bound']}: at most {iteration['tokens_per_s_per_gpu']:.0f} tokens/s/{each} (in + out)")
    if joules:
        print(f"energy above idle: {iteration['energy_mj_per_token']:.1f} mJ a token")
    print(
        f"paper's formulas: T_compute {paper['t_compute_ms']:.1f} ms, T_mem {paper['t_mem_ms']:.1f} ms, "
        f"T_R {paper['t_r']:.2f} ({paper['bound']}-bound; compute-bound from {paper['compute_bound_from_tokens']} "
        f"tokens), optimal {paper['optimal_tokens_per_s_per_gpu']:.0f} tokens/s/{each}\n"
    )


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot be right before any work is done."""
    if args.gpus < 1:
        raise ConfigError(f"--gpus must be at least 1, not {args.gpus}.")
    for option in ("link_gb", "attained_tflops"):
        value = getattr(args, option)
        if value is not None and not value > 0:
            raise ConfigError(f"--{option.replace('_', '-')} must be above 0, not {value}.")
    for path in (args.output, args.plot):
        if path is not None:
            make_folder_of(path)
    if args.plot is not None:
        plots.check_plot_path(args.plot)


def _target(args: argparse.Namespace) -> Target:
    """Published and measured rates of the machine that was asked for; of this CPU measured ones alone."""
    if args.gpu.lower() == THIS_CPU:
        from nanoflow.profiling.machine import measure_rates

        rates = measure_rates("cpu", args.dtype)
        return Target(THIS_CPU, {"measured": rates}, float(env.available_memory_bytes()), {"measured": rates.source})
    hardware = find_hardware(args.gpu)
    published = hardware.rates(args.dtype, args.gpus)
    measured = hardware.attained_rates(args.dtype, args.gpus)
    if args.attained_tflops is not None:
        given = {"flops_per_s": args.attained_tflops * 1e12, "measured": True, "source": "given by --attained-tflops"}
        measured = MachineRates(**((measured or published).to_dict() | given))
    kinds = {"published": published} | ({} if measured is None else {"measured": measured})
    return Target(hardware.name, kinds, hardware.memory_bytes, dict(hardware.sources))


def _drawing(
    args: argparse.Namespace,
    spec: ModelSpec,
    workload: AnyWorkload,
    target: Target,
    found: dict[str, tuple[Group, Analysis]],
) -> plots.Drawing:
    """The maps of all presets by published peaks, and the roofline of the machine by its best known rates."""
    asked = ServedModel(spec, args.gpus)
    columns = paper_columns(asked)
    machines = [_machine(name, args, target, found) for name in HARDWARE]
    if target.name == THIS_CPU:
        machines.append(_machine(THIS_CPU, args, target, found))
    workloads = [*BUILT_IN.values(), *([] if args.workload in BUILT_IN else [workload])]
    group, analysis = found.get("measured") or found["published"]
    batch = analysis.batch
    return plots.Drawing(
        memory=[memory_map(columns, machines, args.dtype, each, SAMPLES) for each in workloads],
        network=network_map(columns, machines, args.dtype),
        asked=(target.name, asked.label),
        rates=group.rates,
        points=roofline_points(analysis.costs, group.rates),
        caption=(
            f"Maps: published peaks (cpu: measured), {args.dtype}; yellow with a mark: compute-bound; blue: not; "
            "– : the model does not fit, or there is no link.   "
            f"Roofline: {spec.name} ×{args.gpus}, {batch.n_decode} decode + {batch.n_prefill} prefill tokens."
        ),
    )


def _machine(name: str, args: argparse.Namespace, target: Target, found: dict[str, tuple[Group, Analysis]]) -> Machine:
    """A row of the maps; in the one that was asked for, groups of the size asked for have the link asked for."""
    preset = None if name == THIS_CPU else published_machine(HARDWARE[name], args.dtype)
    group = found.get("published", found.get("measured"))

    def groups(devices: int) -> Group | None:
        if name == target.name and group is not None and devices == args.gpus:
            return group[0]
        return None if preset is None else preset.group(devices)

    return Machine(name, groups)


def spec_of(model: str) -> ModelSpec:
    """The shape of a preset, a folder, a config.json or a .gguf file; no weights are read."""
    found = find_preset(model)
    if found is not None:
        return found
    path = Path(model).expanduser()
    if path.suffix == ".json" and path.is_file():
        from nanoflow.models.hf_config import read_json, spec_from_hf_config

        return spec_from_hf_config(read_json(path), path.absolute().parent.name)
    from nanoflow.models.registry import resolve_model

    return resolve_model(model, "random").spec
