"""Experts shared out by number: each rank adds what its own experts give, and together that is everything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanoflow.core.errors import ConfigError
from nanoflow.core.presets import PRESETS
from nanoflow.core.sampling import SamplingParams
from nanoflow.distributed.sharding import shard_of
from nanoflow.kernels.base import ExpertWeights
from nanoflow.kernels.registry import create
from nanoflow.pipeline.graph import layer_graph
from tests.distributed.in_process import sharded
from tests.distributed.pipelines import DENSE_BATCH, PIPELINES
from tests.e2e.tiny_models import BACKENDS, make_tiny_engine, prompt_of, run, save_tiny_model

N_EXPERTS, D, F = 5, 32, 24


@pytest.mark.parametrize("name", BACKENDS)
def test_what_ranks_add_is_what_one_adds(name: str) -> None:
    torch.manual_seed(1)
    kernels = create(name, "cpu", torch.float32)
    router = torch.randn(N_EXPERTS, D)
    gate_up, down = torch.randn(N_EXPERTS, 2 * F, D) / 6, torch.randn(N_EXPERTS, D, F) / 5
    x = torch.randn(9, D)

    def added(first: int, stop: int) -> torch.Tensor:
        out = torch.zeros(9, D)
        weights = ExpertWeights(
            kernels.linear_weight(router.clone()),
            kernels.expert_weights((w.clone() for w in gate_up[first:stop]), stop - first, gate_up=True),
            kernels.expert_weights((w.clone() for w in down[first:stop]), stop - first, gate_up=False),
            2,
            True,
            first,
        )
        kernels.experts(x, weights, out)
        return out

    whole = added(0, N_EXPERTS)
    assert float(whole.abs().max()) > 0.1
    torch.testing.assert_close(added(0, 2) + added(2, 3) + added(3, N_EXPERTS), whole, atol=1e-5, rtol=1e-5)


def test_ranks_hold_whole_experts() -> None:
    spec = next(spec for spec in PRESETS.values() if spec.experts is not None)
    assert spec.experts is not None
    shards = [shard_of(spec, rank, 2, expert_parallel=True) for rank in range(2)]
    assert [number for s in shards if s.experts for number in range(s.experts.start, s.experts.stop)] == list(
        range(spec.experts.n_experts)
    )
    assert all(s.expert_ff is not None and len(s.expert_ff) == spec.experts.d_ff for s in shards)
    with pytest.raises(ConfigError, match="has no experts"):
        shard_of(replace(spec, experts=None), 0, 2, expert_parallel=True)


def test_expert_parallel_ranks_give_the_tokens_of_one(tmp_path: Path) -> None:
    save_tiny_model("qwen3-moe", tmp_path)
    prompts = [prompt_of(length, seed=length) for length in (1, 15, 33)]
    greedy = SamplingParams(temperature=0, max_tokens=9)
    engine = make_tiny_engine(tmp_path, BACKENDS[0], dense_batch=DENSE_BATCH, enable_prefix_caching=False)
    wanted = run(engine, prompts, greedy)
    config = engine.config.with_options("device", tensor_parallel_size=2, threads=2, expert_parallel=True)
    with sharded(config, PIPELINES["network-overlap"](layer_graph(engine.spec, 2)), tmp_path) as launcher:
        engine.core.relaunch_with(launcher, asynchronous=True)
        assert run(engine, prompts, greedy) == wanted
    engine.close()
