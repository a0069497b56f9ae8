"""What a result must say about where it was made: versions, machine, model, and the command that made it."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING, Any

import nanoflow
from nanoflow.bench.result import MachineInfo, ModelInfo
from nanoflow.core import env
from nanoflow.core.config import EngineConfig
from nanoflow.core.hardware import MachineRates
from nanoflow.profiling.fingerprint import machine_fingerprint

if TYPE_CHECKING:
    from nanoflow.engine.build import Engine

PACKAGES = ("torch", "triton", "numpy", "tokenizers", "aiohttp")


def now_text() -> str:
    """The present moment, UTC, ISO 8601 in seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Python, nanoflow and the libraries that numbers depend on, as far as they are installed."""
    found = {"nanoflow": nanoflow.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def command_line(argv: Sequence[str] | None = None) -> tuple[str, ...]:
    """The command as a user would type it."""
    return ("nanoflow", *(sys.argv[1:] if argv is None else argv))


def shown(command: Sequence[str]) -> str:
    """A command quoted for a shell."""
    return shlex.join(command)


def machine_info(engine: Engine, rates: MachineRates | None) -> MachineInfo:
    """The machine of an engine in this process."""
    device = engine.device
    return MachineInfo(
        name=device.name,
        device=device.kind,
        devices=engine.devices,
        memory_bytes=_memory_bytes(device.kind),
        rates=rates,
        fingerprint=machine_fingerprint(device, engine.config.device.tensor_parallel_size),
    )


def client_machine() -> MachineInfo:
    """What is known where the engine runs behind a URL: the machine that sends."""
    fingerprint = {
        "client_system": f"{platform.system()} {platform.machine()}",
        "client_cores": str(env.available_cores()),
    }
    return MachineInfo(name="behind the endpoint", device="unknown", fingerprint=fingerprint)


def model_info(engine: Engine) -> ModelInfo:
    """The model of an engine in this process."""
    config, spec = engine.config.model, engine.spec
    origin = "random weights" if config.load_format == "random" else config.model
    return ModelInfo(spec.name, config.dtype, origin, spec.n_params, asdict(spec))


def engine_options(config: EngineConfig) -> dict[str, Any]:
    """The resolved options, flat, by the names of docs/configuration.md."""
    flat: dict[str, Any] = {}
    for value in asdict(config).items():
        name, content = value
        flat |= content if isinstance(content, dict) else {name: content}
    return flat


def _memory_bytes(kind: str) -> float:
    if kind == "cuda":
        import torch

        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(env.available_memory_bytes())
