"""From how many tokens on it pays to cut a batch: measured when tuning, else told by the device's rates.

Nano-batches of a partly filled dense batch read all weights once each. Below the pipeline's `min_tokens` executors run
the sequential order instead (`pipeline/small_batches.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanoflow.core.config import EngineConfig
from nanoflow.core.hardware import MachineRates
from nanoflow.core.hardware_presets import preset_of
from nanoflow.core.model_spec import DTYPE_BYTES
from nanoflow.core.ops import RESOURCE, Resource
from nanoflow.device.base import Device
from nanoflow.engine.verification import Contender, Measure, Measured, OnRound, verify
from nanoflow.executor.bucket import bucket_sizes
from nanoflow.pipeline.graph import LayerGraph
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.pipeline.small_batches import filled, sequential_beside
from nanoflow.profiling.machine import kept_rates

MEASURED = "small_batches"
"""The entry of `meta` that holds what was measured, where `min_tokens` comes from a measurement."""

PARTS = (0.75, 0.5, 0.25, 0.125)
"""Of the dense batch: the sizes that are measured, until one is slower."""

ROUNDS = 5

PART_OF_TIME = 0.6
"""Of the verification's time: after it no size but the first is begun, nor a round beyond three."""


@dataclass(frozen=True)
class SmallBatch:
    """A batch of `n_tokens` in nano-batches and in sequential order."""

    n_tokens: int
    cut: Measured
    sequential: Measured

    @property
    def pays(self) -> bool:
        """Whether the nano-batches were not slower."""
        return self.cut.ratio <= 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "tokens": self.n_tokens,
            "iteration_us": self.cut.iteration_us,
            "sequential_iteration_us": self.sequential.iteration_us,
            "ratio_to_sequential": self.cut.ratio,
            "ratio_interval": [self.cut.low, self.cut.high],
        }


def measure_small(
    pipeline: Pipeline,
    graph: LayerGraph,
    measure: Measure,
    *,
    seconds: float,
    seed: int = 0,
    on_round: OnRound | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[SmallBatch]:
    """`pipeline` (of several nano-batches) beside what would run in its place, at falling sizes until it is slower."""
    deadline = clock() + PART_OF_TIME * seconds
    found: list[SmallBatch] = []
    beside = sequential_beside(pipeline, graph)
    for n_tokens in dict.fromkeys(int(part * pipeline.dense_batch) for part in PARTS):
        cut, whole = filled(pipeline, n_tokens), filled(beside, n_tokens)
        if cut is None or whole is None or (found and clock() > deadline):
            break
        verdict = verify(
            [Contender(whole, 0.0), Contender(cut, 0.0)],
            measure,
            rounds=ROUNDS,
            seed=seed,
            on_round=on_round,
            out_of_time=lambda: clock() > deadline,
        )
        found.append(SmallBatch(n_tokens, verdict.measured[1], verdict.measured[0]))
        if not found[-1].pays:
            break
    return found


def with_measured_threshold(pipeline: Pipeline, found: Sequence[SmallBatch]) -> Pipeline:
    """`pipeline` from the smallest size on that was measured and paid; from the whole dense batch on if none did."""
    paying = [one.n_tokens for one in found if one.pays]
    table = [one.to_dict() for one in found]
    return replace(
        pipeline, min_tokens=min(paying, default=pipeline.dense_batch), meta={**pipeline.meta, MEASURED: table}
    )


def with_threshold(pipeline: Pipeline, rates: MachineRates | None) -> Pipeline:
    """`pipeline` from so many tokens on that the products of its smallest nano-batch are not bound by reading weights.

    One of m tokens computes 2·m FLOPs for each weight that it reads, so that takes m ≥ FLOP/s ÷ bytes/s · bytes of a
    weight / 2; rounded up to a size that recordings are made for. Unchanged where rates are unknown, nothing is cut, or
    a threshold is given or was measured.
    """
    products = [nano.stop - nano.start for nano in pipeline.nano_ops if RESOURCE[nano.op] is Resource.COMPUTE]
    least = min(products, default=0)
    known = pipeline.min_tokens or MEASURED in pipeline.meta
    if rates is None or known or not 0 < least < pipeline.dense_batch:
        return pipeline
    balance = rates.flops_per_s / rates.mem_bytes_per_s * DTYPE_BYTES[rates.dtype] / 2
    wanted = math.ceil(balance * pipeline.dense_batch / least)
    sizes = bucket_sizes(pipeline.dense_batch)
    return replace(pipeline, min_tokens=next((size for size in sizes if size >= wanted), pipeline.dense_batch))


def known_rates(config: EngineConfig, device: Device) -> MachineRates | None:
    """The device's rates if they are known without measuring: those kept from before, else those of its preset.

    `config.model.dtype` is settled.
    """
    dtype = config.model.dtype
    kept, preset = kept_rates(device.kind, dtype, config.device.threads), preset_of(device.name)
    if kept is not None or device.kind == "cpu" or preset is None or dtype not in preset.peak_flops:
        return kept
    return preset.attained_rates(dtype) or preset.rates(dtype)
