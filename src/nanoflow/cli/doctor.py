"""`nanoflow doctor`: what this machine has, what the engine would use on it, and why.

The choices and their reasons are the engine's own (`engine.resolve`), asked with nothing but a device; doctor decides
nothing itself.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from nanoflow import __version__
from nanoflow.core import env
from nanoflow.core.config import DEVICES, EngineConfig
from nanoflow.core.errors import ConfigError
from nanoflow.core.presets import PRESETS

HELP = "tell what this machine has and what will be used"
LOG_LEVEL = "WARNING"
GIB = 1 << 30
PROBE_MODEL = "smollm2"
SEQUENTIAL = "sequential"
ELSEWHERE = "; for another machine or other kernels, not used here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="look at this device")
    parser.add_argument("--refresh", action="store_true", help="measure anew instead of taking the cached rates")


def run(args: argparse.Namespace) -> int:
    """Print the findings. Exit code 1 only if no kernel backend works here."""
    findings = examine(args.device, refresh=args.refresh)
    if args.json:
        print(json.dumps(findings))
    else:
        print_findings(findings)
    return 0 if findings["use"]["kernels"] is not None else 1


def examine(device: str, *, refresh: bool = False) -> dict[str, Any]:
    """Everything that `doctor` knows, as plain values."""
    import torch

    return {
        "nanoflow": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "torch": torch.__version__,
        "cores": env.available_cores(),
        "memory_bytes": env.available_memory_bytes(),
        "compiler": compiler(),
        "cache_dir": str(env.cache_dir()),
        "gpus": gpus(),
        **engine_choices(device, refresh=refresh),
    }


def compiler() -> str | None:
    """The C++ compiler that the native kernels would be built with."""
    from nanoflow.kernels.native.build import BuildError, find_compiler

    try:
        return find_compiler()
    except BuildError:
        return None


def gpus() -> list[dict[str, Any]]:
    """The CUDA devices that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": gpu.name, "memory_bytes": gpu.total_memory, "sms": gpu.multi_processor_count} for gpu in found]


def engine_choices(device_option: str, *, refresh: bool) -> dict[str, Any]:
    """Device, precision and kernels that the engine would take for a bfloat16 model, why, the measured rates, and the
    tuned pipelines (`machine`: whether it is this one, with these kernels; None if not known).
    """
    from nanoflow.engine import tuned
    from nanoflow.engine.resolve import TORCH_DTYPES, open_device, resolve_dtype
    from nanoflow.kernels.registry import available
    from nanoflow.profiling.fingerprint import machine_fingerprint
    from nanoflow.profiling.machine import measure_rates

    config = EngineConfig.from_options(model=PROBE_MODEL, device=device_option)
    with collected_logs("nanoflow.engine.resolve") as reasons:
        device = open_device(config)
        dtype = resolve_dtype(config, PRESETS[PROBE_MODEL], device).model.dtype
    offers = available(device.kind, TORCH_DTYPES[dtype])
    rates = measure_rates(device.kind, dtype, refresh=refresh)
    use = {
        "device": device.kind,
        "device_name": device.name,
        "dtype": dtype,
        "kernels": next((name for name, refusal in offers if refusal is None), None),
        "why": reasons,
    }
    kept = tuned.summaries()
    machines = {1: machine_fingerprint(device)}
    for ranks in {one["ranks"] for one in kept} - {None, 1}:  # each has its part of a CPU, or a GPU of its own
        shared = config.with_options("device", device=device.kind, tensor_parallel_size=ranks)
        with suppress(ConfigError):  # more than there are GPUs here
            machines[ranks] = machine_fingerprint(open_device(shared), ranks)
    return {
        "tuned": [
            {**one, "machine": one["machine"] and one["machine"] == machines.get(one["ranks"] or 1)} for one in kept
        ],
        "kernels": [{"name": name, "usable": refusal is None, "refusal": refusal} for name, refusal in offers],
        "use": use,
        "rates": rates.to_dict(),
    }


@contextmanager
def collected_logs(logger_name: str) -> Iterator[list[str]]:
    """The messages that a logger gets in the block, at INFO and above; they are not printed."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger(logger_name), Collect()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def print_findings(found: dict[str, Any]) -> None:
    """The findings for people."""
    use, rates = found["use"], found["rates"]
    memory = f"{found['memory_bytes'] / GIB:.1f} GiB free memory"
    print(f"nanoflow {found['nanoflow']}, Python {found['python']}, torch {found['torch']}, {found['system']}")
    print(f"machine   {use['device_name']}, {found['cores']} cores, {memory}")
    print(f"compiler  {found['compiler'] or 'none found: kernels that need one are left out'}")
    for gpu in found["gpus"]:
        print(f"GPU       {gpu['name']}, {gpu['memory_bytes'] / GIB:.0f} GiB, {gpu['sms']} SMs")
    if not found["gpus"]:
        print("GPU       none that torch can use")
    print(f"cache     {found['cache_dir']}")
    print(f"measured  {rates['flops_per_s'] / 1e9:.0f} GFLOP/s GEMM, {rates['mem_bytes_per_s'] / 1e9:.1f} GB/s memory")
    print("kernels   " + "; ".join(_offer(offer) for offer in found["kernels"]))
    print(f"will use  {use['device']}, {use['dtype']}, {use['kernels'] or 'no'} kernels")
    for reason in use["why"]:
        print(f"          {reason}")
    for line in _tuned_lines(found["tuned"]):
        print(f"tuned     {line}")
    if not found["tuned"]:
        print(f"tuned     nothing yet; nanoflow tune {PROBE_MODEL} makes a pipeline for this machine")


def _tuned_lines(kept: list[dict[str, Any]]) -> Iterator[str]:
    """A line each; those of one model and size that are not used here have one together, where the newest stands."""
    unused: dict[str, list[dict[str, Any]]] = {}
    for one in kept:
        if one["machine"] is False:
            unused.setdefault(_subject(one), []).append(one)
    for one in kept:
        group = unused.get(_subject(one), []) if one["machine"] is False else [one]
        if len(group) == 1:
            yield _tuned(one)
        elif one is group[0]:
            dates = " to ".join(sorted({group[-1]["date"], group[0]["date"]}))
            yield f"{_subject(one)} ({dates}): {len(group)} pipelines{ELSEWHERE}"


def _subject(one: dict[str, Any]) -> str:
    """What a pipeline is for, e.g. `smollm2 bfloat16, 1 rank, batches of 512`."""
    ranks = "" if one["ranks"] is None else f", {one['ranks']} rank{'s' * (one['ranks'] != 1)}"
    ranks += ", expert parallel" if one["expert_parallel"] else ""
    batch = "" if one["dense_batch"] is None else f", batches of {one['dense_batch']}"
    return f"{one['model']} {one['dtype'] or ''}{ranks}{batch}"


def _tuned(one: dict[str, Any]) -> str:
    """e.g. `smollm2 bfloat16, 1 rank, batches of 512 (2026-11-22): 1.07 × sequential with 2-nano-batches`."""
    gain = "its report cannot be read"
    if one["gain"] is not None:
        gain = f"{one['gain']:.2f} × sequential with {one['pipeline']}"
    if one["pipeline"] == SEQUENTIAL:
        gain = "nothing was faster than sequential"
    elsewhere = ELSEWHERE if one["machine"] is False else ""
    return f"{_subject(one)} ({one['date']}): {gain}{elsewhere}"


def _offer(offer: dict[str, Any]) -> str:
    return f"{offer['name']} (works)" if offer["usable"] else f"{offer['name']} (no: {offer['refusal']})"
