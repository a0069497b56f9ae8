"""Random weights: a function of seed, name and place alone."""

import hashlib
import math
from dataclasses import replace

import pytest
import torch

from nanoflow.core.errors import ModelLoadError
from nanoflow.core.presets import PRESETS
from nanoflow.models.weights.base import check_complete, tensor_shapes
from nanoflow.models.weights.random import RandomWeights

SPEC = replace(PRESETS["smollm2"], n_layers=2, vocab_size=8192, dtype="float32")
EMBEDDING = "model.embed_tokens.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def test_has_every_tensor_of_every_kind_of_spec() -> None:
    for spec in PRESETS.values():
        small = replace(spec, n_layers=2)
        check_complete(RandomWeights(small), small, "random")


def test_equal_whatever_the_order_and_the_slice() -> None:
    first, second = RandomWeights(SPEC, seed=3), RandomWeights(SPEC, seed=3)
    whole = first.read(EMBEDDING)
    second.read(DOWN)
    assert torch.equal(second.read(EMBEDDING, rows=slice(0, 10)), whole[:10])
    assert torch.equal(second.read(EMBEDDING, rows=slice(4_000, 4_700)), whole[4_000:4_700])
    assert torch.equal(second.read(DOWN, rows=slice(100, 300), cols=slice(7, 500)), first.read(DOWN)[100:300, 7:500])
    assert torch.equal(second.read(EMBEDDING), whole)


def test_seed_and_name_matter() -> None:
    weights = RandomWeights(SPEC, seed=0)
    assert not torch.equal(weights.read(DOWN), RandomWeights(SPEC, seed=1).read(DOWN))
    assert not torch.equal(weights.read(DOWN), weights.read(DOWN.replace("1", "0")))


def test_neighbours_are_independent() -> None:
    values = RandomWeights(SPEC).read(EMBEDDING)[:4096] / 0.02
    for other in (values.roll(1, 0), values.roll(1, 1), values.roll(SPEC.d_model // 2, 1), values.roll(64, 0)):
        assert (values * other).mean().abs() < 4 / values.numel() ** 0.5
    largest = torch.linalg.matrix_norm(values[: SPEC.d_model], 2)  # of independent numbers: 2 sqrt(n)
    assert largest == pytest.approx(2 * SPEC.d_model**0.5, rel=0.05)


def test_a_value_is_a_hash_of_its_place() -> None:
    seed, row, col, wrap = 7, 4_000, 123, 1 << 64
    key = hashlib.blake2b(f"{seed} {EMBEDDING}".encode(), digest_size=8).digest()
    bits = (int.from_bytes(key, "little") + row * SPEC.d_model + col) % wrap
    for multiplier in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        bits = bits * multiplier % wrap
        bits ^= bits >> 32
    total = sum(bits >> shift & 0xFFFF for shift in (0, 16, 32, 48))
    expected = (total - 2 * 65535) * 0.02 / math.sqrt(4 * (65536**2 - 1) / 12)
    assert RandomWeights(SPEC, seed).read(EMBEDDING)[row, col].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.cuda
def test_a_gpu_makes_the_same() -> None:
    on_gpu = RandomWeights(SPEC).on(torch.device("cuda")).read(EMBEDDING, rows=slice(5, 4_000), cols=slice(3, 500))
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), RandomWeights(SPEC).read(EMBEDDING)[5:4_000, 3:500])


def test_rows_are_not_repeated() -> None:
    embedding = RandomWeights(SPEC).read(EMBEDDING)
    assert len(torch.unique(embedding[:, :8], dim=0)) == SPEC.vocab_size


def test_distribution_and_norms() -> None:
    weights = RandomWeights(SPEC)
    values = weights.read(EMBEDDING)
    assert values.mean().abs() < 1e-4
    assert values.std() == pytest.approx(0.02, rel=1e-3)
    assert torch.equal(weights.read("model.layers.0.input_layernorm.weight"), torch.ones(SPEC.d_model))
    qwen3 = replace(PRESETS["qwen3-8b"], n_layers=1)
    assert RandomWeights(qwen3).read("model.layers.0.self_attn.q_norm.weight").eq(1).all()


def test_dtype_is_the_specs_and_only_rounds() -> None:
    half = RandomWeights(replace(SPEC, dtype="bfloat16")).read(DOWN)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, RandomWeights(SPEC).read(DOWN).bfloat16())


def test_bias_is_a_vector() -> None:
    qwen2 = replace(PRESETS["qwen2.5-7b"], n_layers=1)
    bias = RandomWeights(qwen2).read("model.layers.0.self_attn.k_proj.bias", rows=slice(0, 100))
    assert bias.shape == (100,)
    assert bias.float().std() > 0.01


def test_unknown_name() -> None:
    with pytest.raises(ModelLoadError, match="no tensor lm_head"):
        RandomWeights(SPEC).read("lm_head.weight")


def test_shapes_count_the_parameters() -> None:
    for name in ("llama-3-8b", "mixtral-8x7b", "qwen3-30b-a3b"):
        total = sum(torch.Size(shape).numel() for _, shape in tensor_shapes(PRESETS[name]))
        assert total == pytest.approx(PRESETS[name].n_params, rel=1e-4)
