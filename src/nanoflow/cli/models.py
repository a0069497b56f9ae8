"""`nanoflow models`: the presets, how large they are, and which of them this machine could hold or has at hand."""

from __future__ import annotations

import argparse
import json
from typing import Any

from nanoflow.core import env
from nanoflow.core.model_spec import DTYPE_BYTES, ModelSpec
from nanoflow.core.presets import PRESETS

HELP = "list presets and what is at hand"
LOG_LEVEL = "WARNING"
GIB = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")


def run(args: argparse.Namespace) -> int:
    """Print one line a model."""
    from nanoflow.models.registry import list_cached

    cached = {entry.name: str(entry.path) for entry in list_cached()}
    memory_bytes = env.available_memory_bytes()
    rows = [describe(name, spec, cached.pop(name, None), memory_bytes) for name, spec in PRESETS.items()]
    rows += [{"name": name, "path": path} for name, path in cached.items()]
    for row in rows:
        print(json.dumps(row) if args.json else line(row))
    if not args.json:
        print("\nMODEL is one of these names, a Hugging Face folder or a .gguf file.")
        print("A preset without weights here runs with seeded random ones: --load-format random.")
    return 0


def describe(name: str, spec: ModelSpec, path: str | None, memory_bytes: int) -> dict[str, Any]:
    """Facts of a preset. Sizes are of the weights in bfloat16; `fits` leaves out the KV cache."""
    weight_bytes = spec.n_params * DTYPE_BYTES["bfloat16"]
    return {
        "name": name,
        "architecture": spec.architecture,
        "parameters": spec.n_params,
        "active_parameters": spec.n_active_params,
        "bf16_bytes": weight_bytes,
        "kv_bytes_per_token": spec.kv_bytes_per_token("bfloat16"),
        "max_context_tokens": spec.max_context_tokens,
        "path": path,
        "fits_in_memory": weight_bytes < memory_bytes,
    }


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    if "parameters" not in row:
        return f"{row['name']:<16} {'':>29}   weights in {row['path']}"
    if row["path"]:
        state = f"weights in {row['path']}"
    elif row["fits_in_memory"]:
        state = "random weights only"
    else:
        state = "random weights only; larger than this machine's memory"
    size = f"{row['parameters'] / 1e9:8.2f} B parameters {row['bf16_bytes'] / GIB:7.1f} GiB"
    return f"{row['name']:<16} {size}   {state}"
