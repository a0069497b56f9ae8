"""What an ablation compares, and the launcher that runs each variant on one loaded model.

Variants that differ by their pipeline or by the loop share weights, KV pages and scheduler: only the executor is made
anew, on a device of its own, on every rank. So they can take turns without loading anything, and nothing else differs
between them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import cast

from nanoflow.bench.overlaps import Overlaps
from nanoflow.core.errors import ConfigError, DeviceMemoryError
from nanoflow.device.base import Device
from nanoflow.engine.beside import executor_beside
from nanoflow.engine.build import Engine
from nanoflow.engine.core import Launcher
from nanoflow.engine.ranks import GroupLauncher
from nanoflow.engine.resolve import open_device
from nanoflow.engine.small_batches import with_threshold
from nanoflow.pipeline.baselines import nano_batches, network_overlap, sequential
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.pipeline import Pipeline

SEQUENTIAL = "sequential"
NANO_BATCHES = "nano-batches only"
NETWORK = "network overlap"
MEMORY = "memory overlap"
BOTH = "network + memory overlap"
SYNCHRONOUS = "synchronous scheduling"
TUNED = "tuned"
ONE_RANK = "one rank has no network operations"
NO_OVERLAP = "no overlapping pipeline is known here: run nanoflow tune first, or give --tune or --overlap FILE"
NO_BOTH = (
    "no pipeline is known here that overlaps memory too: run nanoflow tune, or give --overlap FILE if it made none"
)

NOTHING_TUNED = (
    "nothing is tuned here for this model, dense batch and number of ranks: run nanoflow tune, or give --tune"
)
BY_HAND = "pipelines are given by --overlap"
SEVERAL = "several pipelines are given by --overlap; each has a row of its own"
OFFLOAD = "KV offload"
ROWS = (SEQUENTIAL, NANO_BATCHES, NETWORK, BOTH, MEMORY, SYNCHRONOUS, TUNED, OFFLOAD)
"""What `--variants` may name, in the order of the table."""
PLAIN, OFFLOAD_OFF, OFFLOAD_ON = "plain engine", f"{OFFLOAD} off", f"{OFFLOAD} on"
RESERVED = frozenset({*ROWS, PLAIN, OFFLOAD_OFF, OFFLOAD_ON})
"""Names that rows have, which no pipeline may take."""
_TAIL = re.compile(r" (only|overlap|scheduling)$")


def short(row: str) -> str:
    """A row's name as one types it: `network + memory overlap` → `network+memory`."""
    return _TAIL.sub("", row.strip().lower()).replace(" ", "")


def rows_named(names: Sequence[str]) -> frozenset[str]:
    """The rows that are meant, by short or whole names, with `sequential`. Raises `ConfigError` for an unknown one."""
    known = {short(row): row for row in ROWS}
    for name in names:
        if short(name) not in known:
            raise ConfigError(f"--variants: {name!r} is no row; choose of {', '.join(known)}.")
    return frozenset({SEQUENTIAL, *(known[short(name)] for name in names)})


@dataclass(frozen=True)
class Variant:
    """`pipeline` None means: not applicable, for the reason given."""

    name: str
    pipeline: Pipeline | None
    asynchronous: bool = True
    reason: str = ""


def variants_for(engine: Engine, overlaps: Overlaps, rows: Collection[str] = ROWS) -> list[Variant]:
    """The variants of an ablation that share an engine, with the overlapping pipelines that are known.

    Of the `rows` that are wanted, and whatever was given by hand. With several ranks network overlap needs none that is
    known: the hand-written one will do. But for those given by hand, small batches run the sequential order, below what
    tuning has measured or else the device's rates tell.
    """
    by_hand = overlaps.by_hand
    found = [
        one
        for one in _known_rows(engine, overlaps)
        if one.name in rows or any(one.pipeline is given for given in by_hand)
    ]
    if TUNED in rows:
        found.append(_tuned(overlaps, found))
    return [*found, *(Variant(one.name, one) for one in _several(overlaps))]


def _several(overlaps: Overlaps) -> tuple[Pipeline, ...]:
    """Those of files, where they have rows of their own."""
    return overlaps.by_hand if len(overlaps.by_hand) > 1 else ()


def _tuned(overlaps: Overlaps, others: Sequence[Variant]) -> Variant:
    """What tuning chose, if it is none of the other rows."""
    chosen = overlaps.chosen
    if chosen is None:
        return Variant(TUNED, None, reason=BY_HAND if overlaps.by_hand else NOTHING_TUNED)
    for one in others:
        if one.pipeline and (one.pipeline.lanes, one.pipeline.nano_ops) == (chosen.lanes, chosen.nano_ops):
            row = "" if chosen.name == one.name else f", the row {one.name}"
            return Variant(TUNED, None, reason=f"tuning chose {chosen.name}{row}")
    return Variant(TUNED, chosen)


def check_names(overlaps: Overlaps, compared: Collection[str]) -> None:
    """Raise `ConfigError` if one of several pipelines of files would have the name of another row."""
    for one in _several(overlaps):
        if one.name in RESERVED or one.name in compared:
            raise ConfigError(f"a pipeline of --overlap has the name of another row, {one.name!r}; rename it.")


def _known_rows(engine: Engine, overlaps: Overlaps) -> list[Variant]:
    ranks, dense_batch = engine.config.device.tensor_parallel_size, engine.pipeline.dense_batch
    graph = layer_graph(engine.spec, ranks)
    known = {one.name: one for one in overlaps.baselines}
    base = known.get("sequential") or sequential(graph, dense_batch)
    split = known.get("nano-batches")
    if split is None and dense_batch >= 2:
        split = nano_batches(graph, dense_batch, [dense_batch // 2])
    network = overlaps.network
    if network is None and ranks > 1 and dense_batch >= 2:
        network = network_overlap(graph, dense_batch)
    several = _several(overlaps)
    rates = engine.rates
    split, network, both, memory = (
        one if one is None or any(one is given for given in overlaps.by_hand) else with_threshold(one, rates)
        for one in (split, network, overlaps.both, overlaps.memory)
    )
    return [
        Variant(SEQUENTIAL, base),
        Variant(NANO_BATCHES, split, reason="" if split else "a batch of one token cannot be split"),
        Variant(NETWORK, network, reason="" if network else ONE_RANK),
        _or_why_not(BOTH, both, f"{ONE_RANK}; see {MEMORY}" if ranks == 1 else SEVERAL if several else NO_BOTH),
        _or_why_not(
            MEMORY,
            memory,
            f"with several ranks see {BOTH}" if ranks > 1 else SEVERAL if several else NO_OVERLAP,
        ),
        Variant(SYNCHRONOUS, base, asynchronous=False),
    ]


def _or_why_not(name: str, pipeline: Pipeline | None, reason: str) -> Variant:
    return Variant(name, pipeline, reason="" if pipeline else reason)


@dataclass(frozen=True)
class Ready:
    """A variant with what runs it; the engine's own device stays open beside it."""

    variant: Variant
    pipeline: Pipeline
    launcher: Launcher
    device: Device


def make_ready(engine: Engine, variant: Variant) -> Ready:
    """An executor for the variant, on a device of its own (on every rank).

    Raises `DeviceMemoryError` if there is no room left.
    """
    assert variant.pipeline is not None
    device = open_device(engine.config)
    device_out_of_memory: type[BaseException] = MemoryError
    if device.kind == "cuda":
        import torch

        device_out_of_memory = torch.cuda.OutOfMemoryError
    try:
        return Ready(variant, variant.pipeline, _launcher(engine, variant.pipeline, device), device)
    except device_out_of_memory as error:
        raise DeviceMemoryError(
            "there is no memory left for the buffers of another pipeline; lower --kv-memory-fraction."
        ) from error


def _launcher(engine: Engine, pipeline: Pipeline, device: Device) -> Launcher:
    group, own = engine.ranks, engine.core.launcher

    def make() -> Launcher:
        return executor_beside(engine.config, own, pipeline, device, engine.rank)

    if group is None:
        return make()
    number = group.prepare(pipeline)
    return cast(Launcher, GroupLauncher(group, group.together(make), number))
