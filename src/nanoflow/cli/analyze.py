"""`nanoflow analyze`: which resource bounds a model on a machine, and the throughput that nothing can exceed there."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nanoflow.analysis.bound import energy_j
from nanoflow.analysis.lengths import find_workload
from nanoflow.analysis.serving import Analysis, Group, analyse, with_link
from nanoflow.core import env
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.hardware_presets import HARDWARE, find_hardware
from nanoflow.core.model_spec import DTYPE_BYTES, ModelSpec
from nanoflow.core.presets import find_preset

HELP = "compute the bounding resource and the optimal throughput of a model on a machine"
LOG_LEVEL = "WARNING"
SAMPLES = 10_000
MS = 1e3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help="preset, model folder or .gguf file; no weights are read")
    parser.add_argument("--gpu", default="cpu", help=f"cpu (this machine, measured), {', '.join(HARDWARE)}")
    parser.add_argument("--gpus", type=int, default=1, help="devices that hold one copy of the model (default 1)")
    parser.add_argument("--dense-batch", type=int, default=2048, help="tokens of an iteration (default 2048)")
    parser.add_argument("--workload", default="512/512", help="splitwise, lmsys-chat, sharegpt, IN/OUT or a .csv trace")
    parser.add_argument("--dtype", choices=DTYPE_BYTES, default="bfloat16", help="precision (default bfloat16)")
    parser.add_argument("--link-gb", type=float, help="link between devices, GB/s one way, instead of the device's own")
    parser.add_argument("--attained-tflops", type=float, help="GEMM rate measured on the device, TFLOP/s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output", type=Path, help="also write the JSON object to this file")


def run(args: argparse.Namespace) -> int:
    """Analyse by published peaks and, where known, by measured rates; print both."""
    if args.gpus < 1:
        raise ConfigError(f"--gpus must be at least 1, not {args.gpus}.")
    spec = _spec(args.model)
    prompts, answers = find_workload(args.workload).sample(SAMPLES)
    published, measured, memory_bytes, sources = _machine(args)
    link = None if args.link_gb is None else args.link_gb * 1e9
    found = {}
    for name, rates in (("published", published), ("measured", measured)):
        if rates is not None:
            group = with_link(Group(rates, memory_bytes, args.gpus), link)
            found[name] = (group, analyse(spec, group, args.dtype, args.dense_batch, prompts, answers))
    result: dict[str, Any] = {
        "model": spec.name,
        "dtype": args.dtype,
        "gpus": args.gpus,
        "workload": {"name": args.workload, "mean_in": float(prompts.mean()), "mean_out": float(answers.mean())},
        **{name: describe(group, analysis) for name, (group, analysis) in found.items()},
        "sources": sources,
    }
    text = json.dumps(result)
    if args.output is not None:
        args.output.write_text(text + "\n")
    if args.json:
        print(text)
    else:
        for name in found:
            print_table(spec, name, result[name], args.gpus)
    return 0


def describe(group: Group, analysis: Analysis) -> dict[str, Any]:
    """Plain values of an analysis; times in ms, throughput per device, energy above idle."""
    paper, batch, rates = analysis.paper, analysis.batch, group.rates
    ops = {}
    for op, cost in analysis.costs.items():
        floors_ms = {str(limit): MS * s for limit, s in analysis.op_floors[op].by_limit.items()}
        energy = energy_j(cost.flops, cost.mem_bytes, rates)
        ops[str(op)] = {
            "flops": cost.flops,
            "mem_bytes": cost.mem_bytes,
            "wire_bytes": cost.wire_bytes,
            "energy_j": energy,
            "floors_ms": floors_ms,
        }
    return {
        "rates": rates.to_dict(),
        "batch": vars(batch) | {"dense_batch": batch.n_tokens, "limited_by_memory": analysis.limited_by_memory_size},
        "paper": {
            "t_compute_ms": MS * paper.compute_s,
            "t_mem_ms": MS * paper.mem_s,
            "t_r": paper.ratio,
            "bound": "compute" if paper.ratio < 1 else "memory",
            "optimal_tokens_per_s_per_gpu": paper.optimal_tokens_per_s / group.devices,
        },
        "iteration": {
            "floors_ms": {str(limit): MS * s for limit, s in analysis.floors.by_limit.items()},
            "bound": str(analysis.floors.limit),
            "tokens_per_s_per_gpu": analysis.tokens_per_s / group.devices,
        },
        "ops": ops,
    }


def print_table(spec: ModelSpec, kind: str, found: dict[str, Any], gpus: int) -> None:
    """One row an operation, then the totals and the paper's formulas."""
    rates, batch, paper, iteration = (found[key] for key in ("rates", "batch", "paper", "iteration"))
    print(f"{spec.name} on {gpus} x {rates['name']}, {rates['dtype']}, {kind} rates")
    print(
        f"batch: {batch['n_decode']} decode + {batch['n_prefill']} prefill tokens"
        + (" (as many as memory holds)" if batch["limited_by_memory"] else "")
    )
    limits = list(iteration["floors_ms"])
    print(f"{'OPERATION':<20}{'GFLOP':>12}{'GB':>10}{'wire GB':>10}" + "".join(f"{x + ' ms':>13}" for x in limits))
    for name, op in found["ops"].items():
        work = f"{op['flops'] / 1e9:>12.1f}{op['mem_bytes'] / 1e9:>10.2f}{op['wire_bytes'] / 1e9:>10.2f}"
        print(f"{name:<20}{work}" + "".join(f"{op['floors_ms'].get(limit, 0.0):>13.2f}" for limit in limits))
    print(f"{'all':<52}" + "".join(f"{ms:>13.2f}" for ms in iteration["floors_ms"].values()))
    print(f"bound by {iteration['bound']}: at most {iteration['tokens_per_s_per_gpu']:.0f} tokens/s/GPU (in + out)")
    print(
        f"paper's formulas: T_compute {paper['t_compute_ms']:.1f} ms, T_mem {paper['t_mem_ms']:.1f} ms, "
        f"T_R {paper['t_r']:.2f} ({paper['bound']}-bound), optimal {paper['optimal_tokens_per_s_per_gpu']:.0f} "
        "tokens/s/GPU\n"
    )


def _machine(args: argparse.Namespace) -> tuple[MachineRates | None, MachineRates | None, float, dict[str, str]]:
    """Published rates, measured rates, memory of one device, and the sources of the figures."""
    if args.gpu == "cpu":
        from nanoflow.profiling.machine import measure_rates

        rates = measure_rates("cpu", args.dtype)
        return None, rates, float(env.available_memory_bytes()), {"measured": rates.source}
    hardware = find_hardware(args.gpu)
    measured = hardware.attained_rates(args.dtype)
    if args.attained_tflops is not None:
        base = (measured or hardware.rates(args.dtype)).to_dict()
        given = {"flops_per_s": args.attained_tflops * 1e12, "measured": True, "source": "given by --attained-tflops"}
        measured = MachineRates(**(base | given))
    return hardware.rates(args.dtype), measured, hardware.memory_bytes, dict(hardware.sources)


def _spec(model: str) -> ModelSpec:
    found = find_preset(model)
    if found is not None:
        return found
    from nanoflow.models.registry import resolve_model

    return resolve_model(model, "random").spec
