"""How long an iteration takes by a measured profile: per-operation times for any batch, also a partly filled one.

A profile times each operation at a few sizes of one steady batch. Here its sizes become what an operation's time really
depends on: rows for products, keys for decode attention, pairs of query and key for prefill attention. What was not
profiled, embedding, logits and sampling, takes its bound times the factor by which the largest product exceeds its own;
with several ranks, times shrink as the bounds do and collectives take their bound.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from nanoflow.analysis.batch_shape import BatchShape
from nanoflow.analysis.cost import OpCost, iteration_costs
from nanoflow.analysis.curve import Curve
from nanoflow.analysis.profile_table import TIME_NOISE, ProfileTable
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.ops import RESOURCE, Op
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.known_times import part_of
from nanoflow.pipeline.pipeline import NanoOp, Pipeline
from nanoflow.pipeline.timeline import Cost, predict
from nanoflow.planning.times import FloorTimes
from nanoflow.profiling.synthetic import SteadyMix

ENDS = (Op.EMBED, Op.LM_HEAD, Op.SAMPLE)
PRODUCTS = (Op.GATE_UP, Op.EXPERTS, Op.QKV, Op.O, Op.DOWN)
"""Products by their usual size, largest first."""
LEAST_PERFORMANCE = 0.001
FILLS = (0.0625, 0.125, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Profile:
    """A profile table with the steady batch that it was measured on."""

    table: ProfileTable
    mix: SteadyMix


def load_profile(path: Path) -> Profile:
    """A file written by `nanoflow profile`. Raises `ConfigError` if it cannot be read or does not say its batch."""
    table = ProfileTable.load(path)
    mix = json.loads(path.read_text(encoding="utf-8")).get("mix")
    try:
        return Profile(table, SteadyMix(**mix))
    except TypeError as error:
        raise ConfigError(f"{path} does not say which batch it was measured on; run nanoflow profile again.") from error


class ProfiledTimes:
    """Times of `spec` by `profile`. `rates` give the bounds that fill its gaps; `pipeline` None is the sequential one.

    Raises `ConfigError` if an operation of the layer was not profiled.
    """

    def __init__(
        self, profile: Profile, spec: ModelSpec, rates: MachineRates, ranks: int = 1, pipeline: Pipeline | None = None
    ) -> None:
        table = profile.table
        if table.ranks != 1:
            raise ConfigError(f"the profile is of {table.ranks} ranks; plan from one of a single rank.")
        self._spec, self._dtype, self._profile = spec, table.dtype, profile
        self._one = FloorTimes(spec, table.dtype, rates)
        self._ranks = FloorTimes(spec, table.dtype, rates, ranks)
        graph = layer_graph(spec)
        self._ops = tuple(op for op in graph.ops_of_form() if op not in ENDS)
        self._curves = {op: self._curve(op) for op in self._ops}
        self._pipeline = pipeline

    @property
    def source(self) -> str:
        name = "sequential" if self._pipeline is None else self._pipeline.name
        scaled = "" if self._ranks.ranks == 1 else f", scaled to {self._ranks.ranks} ranks by the cost model"
        return f"profile of {self._profile.table.model} ({name} pipeline){scaled}"

    def seconds(self, batch: BatchShape) -> float:
        """Layers by the profile, ends by scaled bounds; with ranks each operation in the ratio of its bounds."""
        one = iteration_costs(self._spec, batch, self._dtype)
        layer_s = {op: 1e-6 * self._spec.n_layers * self.op_us(op, batch) for op in self._ops}
        if self._ranks.ranks == 1:
            layers_s, ends_s = sum(layer_s.values()), self._ends_s(one, self._one)
            return layers_s * self._overlap(batch.n_tokens) + ends_s
        several = iteration_costs(self._spec, batch, self._dtype, self._ranks.ranks)
        shares = {op: self._ranks.bound_s(several[op]) / (self._one.bound_s(one[op]) or 1.0) for op in self._ops}
        layers_s = sum(layer_s[op] * shares[op] for op in self._ops) * self._overlap(batch.n_tokens)
        wires_s = sum(self._ranks.bound_s(cost) for op, cost in several.items() if op not in (*self._ops, *ENDS))
        return layers_s + wires_s + self._ends_s(several, self._ranks)

    def op_us(self, op: Op, batch: BatchShape) -> float:
        """Time of one layer's operation alone, in µs; 0 if the batch has no work for it."""
        size = _size(op, batch)
        return _extended(self._curves[op], size) if size else 0.0

    def _curve(self, op: Op) -> Curve:
        """Time in µs over rows, keys or pairs."""
        table, mix = self._profile.table, self._profile.mix
        measured = table.measured_op(op)
        sizes = sorted({entry.tokens for entry in table.solo if entry.op == measured and entry.share == 1.0})
        if not sizes:
            raise ConfigError(f"the profile holds no time of {op} on the whole device; run nanoflow profile again.")
        decode = op is Op.DECODE_ATTENTION
        points = [
            (float(_size(op, _profiled_batch(mix, tokens, decode=decode))), table.time_us(op, tokens))
            for tokens in sizes
        ]
        return Curve.rising(points, str(op), TIME_NOISE, relative=True)

    def _ends_s(self, costs: dict[Op, OpCost], floor: FloorTimes) -> float:
        return self._inefficiency * sum(floor.bound_s(costs[op]) for op in ENDS)

    @cached_property
    def _inefficiency(self) -> float:
        """Measured time over bound of the largest product, at half the profiled dense batch."""
        op = next(op for op in PRODUCTS if op in self._curves)
        batch = _profiled_batch(self._profile.mix, max(1, self._profile.mix.dense_batch // 2))
        bound_s = self._one.bound_s(iteration_costs(self._spec, batch, self._dtype)[op])
        return max(1.0, 1e-6 * self._spec.n_layers * self.op_us(op, batch) / bound_s)

    def _overlap(self, n_tokens: int) -> float:
        """Time of the pipeline's layer over that of the sequential one, at this fill."""
        if self._pipeline is None or n_tokens < self._pipeline.min_tokens:
            return 1.0
        return float(np.interp(n_tokens / self._pipeline.dense_batch, FILLS, self._factors))

    @cached_property
    def _factors(self) -> list[float]:
        """`_overlap` at some fills, by the pipeline's predicted timeline on the profiled mix."""
        assert self._pipeline is not None
        graph = layer_graph(self._spec)
        return [predict(self._pipeline, graph, self._cost_at(fill)).period_us / self._alone_us(fill) for fill in FILLS]

    def _sizes_at(self, fill: float) -> dict[Op, float]:
        assert self._pipeline is not None
        mix = self._profile.mix
        scale = fill * self._pipeline.dense_batch / mix.dense_batch
        decode, prefill = _profiled_batch(mix, mix.n_decode, decode=True), _profiled_batch(mix, mix.n_prefill)
        whole = replace(prefill, n_decode=decode.n_decode, decode_context=decode.decode_context)
        return {op: scale * _size(op, whole) for op in self._ops}

    def _alone_us(self, fill: float) -> float:
        return sum(_extended(self._curves[op], size) for op, size in self._sizes_at(fill).items())

    def _cost_at(self, fill: float) -> Cost:
        """Time in µs of a nano-operation on a lane with a share, in a batch filled so far."""
        pipeline, mix, table = self._pipeline, self._profile.mix, self._profile.table
        assert pipeline is not None
        sizes = self._sizes_at(fill)
        n_decode = round(pipeline.dense_batch * mix.n_decode / mix.dense_batch)

        def cost(nano: NanoOp, share: float) -> float:
            size = sizes[nano.op] * part_of(nano, n_decode, pipeline.dense_batch)
            alone = _extended(self._curves[nano.op], size) if size else 0.0
            return alone / max(table.performance(RESOURCE[nano.op], share), LEAST_PERFORMANCE)

        return cost


def _profiled_batch(mix: SteadyMix, tokens: int, *, decode: bool = False) -> BatchShape:
    """The batch in which the profiler timed an operation on `tokens` tokens (`Subject.step`)."""
    if decode:
        return BatchShape(n_decode=tokens, decode_context=tokens * mix.context, n_sampled=tokens)
    chunks = mix.chunks(tokens)
    pairs = sum(count * before + count * (count + 1) // 2 for count, before in chunks)
    return BatchShape(n_prefill=tokens, prefill_pairs=pairs, prefill_context=sum(map(sum, chunks)))


def _size(op: Op, batch: BatchShape) -> int:
    """What the time of an operation depends on."""
    if op is Op.DECODE_ATTENTION:
        return batch.decode_context
    if op is Op.PREFILL_ATTENTION:
        return batch.prefill_pairs
    return batch.n_tokens


def _extended(curve: Curve, size: float) -> float:
    """The curve, and beyond its last point proportional to the size."""
    return curve(size) if size <= curve.last_x else curve.ys[-1] * size / curve.last_x
