"""What a measurement is true of: the machine, its software, and this package's kernels, as a flat dictionary.

Two fingerprints are equal exactly where a profile or a tuned pipeline made under one may be used under the other.
"""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from pathlib import Path

import torch

import nanoflow
from nanoflow.core import env
from nanoflow.device.base import Device
from nanoflow.device.cpu import cpu_model

KERNELS_DIR = Path(nanoflow.__file__).parent / "kernels"
SOURCE_SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh")


def machine_fingerprint(device: Device, ranks: int = 1) -> dict[str, str]:
    """Device, cores, driver, torch, a hash of the kernels' sources, this package's version, and several ranks' number.

    `device` is rank 0's.
    """
    found = {
        "device": device.kind,
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "kernels": kernels_hash(),
        "nanoflow": nanoflow.__version__,
    }
    if ranks > 1:
        found["ranks"] = str(ranks)
    if device.kind == "cuda":
        return found | {
            "processor": torch.cuda.get_device_name(),
            "sms": str(torch.cuda.get_device_properties(0).multi_processor_count),
            "driver": f"CUDA {torch.version.cuda}, {_nvidia_driver()}",
        }
    return found | {
        "processor": cpu_model(),
        "cores": str(env.available_cores()),
        "shares": ", ".join(f"{share:.3g}" for share in device.shares()),
    }


def _nvidia_driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return "driver unknown"


@cache
def kernels_hash() -> str:
    """A short hash over the sources of all kernels."""
    digest = hashlib.sha256()
    for path in sorted(KERNELS_DIR.rglob("*")):
        if path.suffix in SOURCE_SUFFIXES:
            digest.update(str(path.relative_to(KERNELS_DIR)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
