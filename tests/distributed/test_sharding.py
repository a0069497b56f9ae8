"""Which rank holds what: every part once, whole groups of heads, copies of KV heads where ranks exceed them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanoflow.core.errors import ConfigError
from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.presets import PRESETS
from nanoflow.distributed.sharding import partition, shard_of
from nanoflow.kernels.reference import ReferenceKernels
from nanoflow.models.loading import load_weights
from nanoflow.models.weights.random import RandomWeights

LLAMA = PRESETS["llama-3-70b"]


@given(st.integers(1, 500), st.integers(1, 16), st.sampled_from([1, 2, 16]))
def test_a_partition_covers_once_and_evenly(units: int, parts: int, unit: int) -> None:
    spans = partition(units * unit, parts, unit)
    assert [i for span in spans for i in range(span.start, span.stop)] == list(range(units * unit))
    assert max(map(len, spans)) - min(map(len, spans)) in (0, unit)
    assert sorted(map(len, spans), reverse=True) == list(map(len, spans))


@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 96))
def test_each_query_head_meets_its_kv_head(n_kv_heads: int, group: int, ranks: int) -> None:
    spec = replace(LLAMA, n_heads=n_kv_heads * group, n_kv_heads=n_kv_heads)
    crowded = ranks > n_kv_heads and -(-ranks // n_kv_heads) > group  # some KV head has more ranks than query heads
    if ranks > spec.n_heads or crowded:
        with pytest.raises(ConfigError, match="lower it"):
            shard_of(spec, 0, ranks)
        return
    shards = [shard_of(spec, rank, ranks) for rank in range(ranks)]
    heads = [head for shard in shards for head in range(shard.heads.start, shard.heads.stop)]
    assert heads == list(range(spec.n_heads))
    for shard in shards:
        assert len(shard.heads) > 0 and len(shard.heads) % len(shard.kv_heads) == 0
        own_group = len(shard.heads) // len(shard.kv_heads)
        for place, head in enumerate(range(shard.heads.start, shard.heads.stop)):
            assert shard.kv_heads.start + place // own_group == head // group
        assert shard.widest_heads == max(len(other.heads) for other in shards)


def test_the_usual_case_is_even() -> None:
    local = shard_of(LLAMA, 3, 8).local
    assert (local.n_heads, local.n_kv_heads, local.d_ff) == (8, 1, 3584)
    assert (local.d_model, local.vocab_size) == (LLAMA.d_model, LLAMA.vocab_size)
    sixteen = shard_of(LLAMA, 5, 16)
    assert (len(sixteen.heads), sixteen.kv_heads.start, len(sixteen.kv_heads)) == (4, 2, 1)


def tiny() -> ModelSpec:
    return replace(
        LLAMA, vocab_size=50, d_model=24, n_layers=1, n_heads=6, n_kv_heads=3, head_dim=4, d_ff=20, dtype="float32"
    )


class Counting(RandomWeights):
    """Random weights that count what is read."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.n_elements = 0

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> torch.Tensor:
        tensor = super().read(name, rows, cols)
        self.n_elements += tensor.numel()
        return tensor


def test_a_rank_reads_its_part_alone_and_the_parts_make_the_whole() -> None:
    spec, kernels, cpu = tiny(), ReferenceKernels(), torch.device("cpu")
    source = Counting(spec)
    whole = load_weights(spec, source, kernels, torch.float32, cpu, show_progress=False)
    read_by_one = source.n_elements
    read, parts = [], []
    for rank in range(2):
        source = Counting(spec)
        shard = shard_of(spec, rank, 2)
        parts.append(load_weights(spec, source, kernels, torch.float32, cpu, shard=shard, show_progress=False))
        read.append(source.n_elements)
    norms = 3 * spec.d_model
    assert sum(read) == read_by_one + norms
    o, down = whole.layers[0].o, whole.layers[0].down
    assert o is not None and down is not None
    joined_o = torch.cat([part.layers[0].o.data for part in parts], dim=1)  # type: ignore[union-attr]
    joined_down = torch.cat([part.layers[0].down.data for part in parts], dim=1)  # type: ignore[union-attr]
    assert torch.equal(joined_o, o.data) and torch.equal(joined_down, down.data)
    assert torch.equal(torch.cat([part.lm_head.data for part in parts]), whole.lm_head.data)
