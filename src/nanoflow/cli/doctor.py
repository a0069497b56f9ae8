"""`nanoflow doctor`: what this machine has, what the engine would use on it, and why."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
from dataclasses import dataclass
from typing import Any

from nanoflow import __version__
from nanoflow.core import env
from nanoflow.core.config import DEVICES

HELP = "tell what this machine has and what will be used"
LOG_LEVEL = "WARNING"
GIB = 1 << 30
COMPILERS = ("c++", "g++", "clang++")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="look at this device")
    parser.add_argument("--refresh", action="store_true", help="measure anew instead of reading the cached rates")


def run(args: argparse.Namespace) -> int:
    """Print the findings. Exit code 1 only if no kernel backend works."""
    findings = examine(args.device, refresh=args.refresh)
    if args.json:
        print(json.dumps(findings))
    else:
        print_findings(findings)
    return 0 if findings["use"] else 1


@dataclass(frozen=True)
class Choice:
    """What the engine would run with, and the reasons, in words."""

    device: str
    dtype: str
    kernels: str
    why: list[str]


def examine(device: str, *, refresh: bool = False) -> dict[str, Any]:
    """Everything that `doctor` knows, as plain values."""
    import torch

    from nanoflow.profiling.machine import measure_rates

    offers = kernel_offers("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")
    choice = choose(device, offers, torch.cuda.is_available())
    rates = measure_rates(choice.device, choice.dtype, refresh=refresh).to_dict() if choice else None
    return {
        "nanoflow": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "torch": torch.__version__,
        "cores": env.available_cores(),
        "memory_bytes": env.available_memory_bytes(),
        "compiler": next((path for name in COMPILERS if (path := shutil.which(name))), None),
        "cache_dir": str(env.cache_dir()),
        "gpus": gpus(),
        "kernels": offers,
        "use": vars(choice) if choice else None,
        "rates": rates,
    }
