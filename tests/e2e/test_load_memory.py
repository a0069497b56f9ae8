"""Loading a model must not need much more memory than the model: peak resident size of a process that loads one.

Half a gigabyte of bfloat16 weights, random and from sharded safetensors. A loader that kept the whole model twice, or
read whole shards, would show at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nanoflow
from nanoflow.core.model_spec import ModelSpec
from nanoflow.models.registry import resolve_model

MIB = 1 << 20
KV_BYTES = 16 * MIB
ALLOWED_SHARE = 1.15
ALLOWED_BYTES = 200 * MIB
"""Above the weights: activations, logits, one matrix in flight, the allocator's slack."""

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 1536,
    "intermediate_size": 4608,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LOAD = """
import json, re, sys
import torch, nanoflow.engine.build
from nanoflow.core.config import EngineConfig

def peak_bytes(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10

before = peak_bytes("VmRSS")
config = EngineConfig.from_options(**json.loads(sys.argv[1]))
engine = nanoflow.engine.build.build_engine(config, show_progress=False)
print(json.dumps({"before": before, "peak": peak_bytes("VmHWM"), "kernels": engine.kernels_name}))
engine.device.close()
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mid-size")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def load(folder: Path, **options: object) -> dict[str, int]:
    """Memory of a fresh process that loads the model: before (imports done) and at its peak, in bytes."""
    fixed = {"model": str(folder), "tokenizer": "bytes", "dtype": "bfloat16", "kv_memory_bytes": KV_BYTES}
    env = {**os.environ, "PYTHONPATH": str(Path(nanoflow.__file__).parent.parent)}
    command = [sys.executable, "-c", LOAD, json.dumps(fixed | options)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def weight_bytes(spec: ModelSpec) -> int:
    return 2 * spec.n_params


def check(spec: ModelSpec, found: dict[str, int]) -> None:
    size, grown = weight_bytes(spec), found["peak"] - found["before"]
    assert size > 500 * MIB, "large enough to tell a copy from the rest"
    assert grown > 0.9 * size, "the weights are in memory"
    assert grown < ALLOWED_SHARE * size + ALLOWED_BYTES, (
        f"{grown / MIB:.0f} MiB at the peak for {size / MIB:.0f} MiB of weights ({found})"
    )


def test_random_weights(folder: Path) -> None:
    check(resolve_model(str(folder), "random").spec, load(folder, load_format="random"))


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_sharded_safetensors(folder: Path, kernels: str) -> None:
    files = resolve_model(str(folder), "random")
    write_shards(folder, files.spec)
    check(files.spec, load(folder, kernels=kernels))


def write_shards(folder: Path, spec: ModelSpec) -> None:
    """Zero weights of `spec` in two safetensors files with an index, unless they are there."""
    from safetensors.torch import save_file

    from nanoflow.models.weights.base import tensor_shapes

    index = folder / "model.safetensors.index.json"
    if index.exists():
        return
    shapes = list(tensor_shapes(spec))
    weight_map = {}
    for number, part in enumerate((shapes[: len(shapes) // 2], shapes[len(shapes) // 2 :]), start=1):
        name = f"model-{number:05}-of-00002.safetensors"
        save_file({key: torch.ones(shape, dtype=torch.bfloat16) for key, shape in part}, folder / name)
        weight_map |= {key: name for key, _ in part}
    index.write_text(json.dumps({"weight_map": weight_map}))
