"""Serving a workload on a machine, before anything runs: the steady batch, its floors, and the optimal throughput.

In a steady state every request that ends makes room for another, so an iteration holds decode and prefill tokens in the
ratio of answer to prompt lengths. The dense batch is what was asked for, or as many tokens as the memory left by
the weights can hold the keys and values for; a long-decode workload is memory-bound for that reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from nanoflow.analysis.batch_shape import BatchShape
from nanoflow.analysis.bound import Floors, floors
from nanoflow.analysis.cost import OpCost, element_bytes, iteration_costs, kv_copies, total
from nanoflow.analysis.lengths import Lengths
from nanoflow.analysis.optimum import PaperTimes, paper_times, params_by_name
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.ops import Op


@dataclass(frozen=True)
class Group:
    """`devices` equal devices that hold one copy of the model, tensor-parallel."""

    rates: MachineRates
    memory_bytes: float
    devices: int = 1


@dataclass(frozen=True)
class Analysis:
    """One iteration in the steady state: costs over all devices, floors in seconds, tokens/s over all devices."""

    batch: BatchShape
    wanted_batch: int
    costs: dict[Op, OpCost]
    op_floors: dict[Op, Floors]
    floors: Floors
    paper: PaperTimes

    @property
    def tokens_per_s(self) -> float:
        """Input and output tokens a second at the bound."""
        return self.batch.n_tokens / self.floors.bound_s

    @property
    def limited_by_memory_size(self) -> bool:
        """Whether the memory holds fewer requests than the dense batch asked for."""
        return self.batch.n_tokens < 0.99 * self.wanted_batch


def analyse(
    spec: ModelSpec, group: Group, dtype: str, dense_batch: int, prompts: Lengths, answers: Lengths
) -> Analysis:
    """Analyse serving requests of these sampled lengths. Raises `ConfigError` if the model does not fit the memory."""
    batch = steady_batch(spec, group, dtype, dense_batch, prompts, answers)
    costs = iteration_costs(spec, batch, dtype, group.devices)
    rates, devices = group.rates, group.devices
    op_floors = {
        op: floors(cost.flops, cost.mem_bytes, rates, wire_bytes=cost.wire_bytes, devices=devices)
        for op, cost in costs.items()
    }
    whole = total(costs.values())
    paper = paper_times(
        params_by_name(spec), batch.n_tokens, rates.flops_per_s, rates.mem_bytes_per_s, group.memory_bytes, devices
    )
    found = floors(whole.flops, whole.mem_bytes, rates, wire_bytes=whole.wire_bytes, devices=devices)
    return Analysis(batch, dense_batch, costs, op_floors, found, paper)


def steady_batch(
    spec: ModelSpec, group: Group, dtype: str, dense_batch: int, prompts: Lengths, answers: Lengths
) -> BatchShape:
    """The average batch of a steady state; prompts are taken to be prefilled whole.

    A decode token sees its prompt and on average half its answer, long answers counting for as many iterations as
    they run. Raises `ConfigError` if weights and one request do not fit.
    """
    if dense_batch < 1:
        raise ConfigError(f"the dense batch must be at least 1 token, not {dense_batch}.")
    p, d = prompts.astype(np.float64), answers.astype(np.float64)
    decode_context = float((p * d + d * (d + 1) / 2).sum() / d.sum())
    room = group.memory_bytes * group.devices - spec.n_params * element_bytes(dtype)
    kv_bytes = spec.kv_bytes_per_token(dtype) * kv_copies(spec, group.devices)
    held = int(room // (kv_bytes * decode_context))
    if held < 1:
        raise ConfigError(
            f"{spec.name} in {dtype} and one average request need more than the memory of {group.devices} x "
            f"{group.rates.name}; use more devices, a smaller dtype or shorter requests."
        )
    per_decode = p.mean() / d.mean()
    n_decode = min(held, max(1, round(dense_batch / (1.0 + per_decode))))
    n_prefill = round(n_decode * per_decode)
    seen = decode_context if spec.sliding_window is None else min(decode_context, spec.sliding_window)
    pairs_per_token = float((p * (p + 1) / 2).sum() / p.sum())
    return BatchShape(
        n_decode=n_decode,
        decode_context=round(n_decode * seen),
        n_prefill=n_prefill,
        prefill_pairs=round(n_prefill * pairs_per_token),
        prefill_context=n_prefill,
        n_sampled=n_decode + round(n_prefill / p.mean()),
    )


def with_link(group: Group, link_bytes_per_s: float | None) -> Group:
    """The group with another link between its devices, if one is given."""
    if link_bytes_per_s is None:
        return group
    return replace(group, rates=replace(group.rates, link_bytes_per_s=link_bytes_per_s))
