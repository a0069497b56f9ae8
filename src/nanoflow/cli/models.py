"""`nanoflow models`: the presets, how large they are, and which of them has weights on this machine."""

from __future__ import annotations

import argparse
import json
from typing import Any

from nanoflow.core import env
from nanoflow.core.errors import ModelLoadError
from nanoflow.core.model_spec import DTYPE_BYTES, ModelSpec
from nanoflow.core.presets import PRESETS

HELP = "list presets and what is at hand"
LOG_LEVEL = "WARNING"
GIB = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")


def run(args: argparse.Namespace) -> int:
    """Print one line a preset, then the converted models in the cache."""
    from nanoflow.engine.tuned import list_tuned
    from nanoflow.models.registry import list_cached

    memory_bytes = env.available_memory_bytes()
    rows = [describe(spec, weights_of(name), memory_bytes) for name, spec in PRESETS.items()]
    cached: list[dict[str, Any]] = [{"cached_file": str(entry.path), "bytes": entry.n_bytes} for entry in list_cached()]
    kept = [{"tuned_pipeline": str(path)} for path in list_tuned()]
    if args.json:
        for row in [*rows, *cached, *kept]:
            print(json.dumps(row))
        return 0
    print(f"{'MODEL':<22}{'parameters':>12}{'bf16 weights':>15}{'KV a token':>13}   here")
    for row in rows:
        print(line(row))
    for entry in cached:
        print(f"cached: {entry['cached_file']} ({entry['bytes'] / GIB:.2f} GiB)")
    for path in list_tuned():
        print(f"tuned: {path}")
    print("\nMODEL is one of these names, a Hugging Face folder or a .gguf file.")
    print("A preset without weights here runs with seeded random ones: --load-format random.")
    return 0


def weights_of(name: str) -> str | None:
    """Where the real weights of a preset lie on this machine; None if it has none."""
    from nanoflow.models.registry import resolve_model

    try:
        return resolve_model(name).origin
    except ModelLoadError:
        return None


def describe(spec: ModelSpec, weights: str | None, memory_bytes: int) -> dict[str, Any]:
    """Facts of a preset. Sizes are in bfloat16; `fits_in_memory` compares weights alone with the free memory."""
    weight_bytes = spec.n_params * DTYPE_BYTES["bfloat16"]
    return {
        "name": spec.name,
        "architecture": spec.architecture,
        "parameters": spec.n_params,
        "active_parameters": spec.n_active_params,
        "bf16_bytes": weight_bytes,
        "kv_bytes_per_token": spec.kv_bytes_per_token("bfloat16"),
        "max_context_tokens": spec.max_context_tokens,
        "weights": weights,
        "fits_in_memory": weight_bytes < memory_bytes,
    }


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    here = row["weights"] or "random weights only"
    if not row["fits_in_memory"]:
        here += ", larger than the free memory"
    size = f"{row['parameters'] / 1e9:>10.2f} B{row['bf16_bytes'] / GIB:>11.2f} GiB"
    return f"{row['name']:<22}{size}{row['kv_bytes_per_token'] / 1024:>9.0f} KiB   {here}"
