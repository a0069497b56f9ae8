"""Several ranks of one model in this process, a thread each to start with: what processes do, without their start.

Each rank has its own device, groups, weights and executor, made by the code that rank processes run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from nanoflow.core.batch import BatchPlan, BatchResult
from nanoflow.core.config import EngineConfig
from nanoflow.distributed.collectives import Collectives, LibraryCollectives
from nanoflow.distributed.group import open_groups
from nanoflow.engine.placing import join, load_and_place
from nanoflow.engine.resolve import TORCH_DTYPES, open_device
from nanoflow.kernels.registry import create
from nanoflow.models.registry import resolve_model
from nanoflow.pipeline.pipeline import Pipeline

T = TypeVar("T")


def on_each(ranks: int, work: Callable[[int], T]) -> list[T]:
    """`work(rank)` of all ranks at once; they may wait for each other."""
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(work, range(ranks)))


def collectives(folder: Path, ranks: int) -> list[Collectives]:
    """The library's collectives of `ranks` ranks on the CPU."""

    def open_one(rank: int) -> Collectives:
        groups = open_groups(folder / "store", rank, ranks, torch.device("cpu"), [0])
        return LibraryCollectives(groups.lanes[0])

    return on_each(ranks, open_one)


class _Pending:
    def __init__(self, each: list[Any]) -> None:
        self._each = each

    def result(self) -> BatchResult:
        """Rank 0's result; the others must have chosen the same tokens."""
        results = [pending.result() for pending in self._each]
        for result in results[1:]:
            np.testing.assert_array_equal(result.tokens, results[0].tokens)
        return results[0]  # type: ignore[no-any-return]


class AllRanks:
    """A launcher that launches every batch on all ranks."""

    def __init__(self, executors: list[Any]) -> None:
        self.executors = executors

    def launch(self, plan: BatchPlan) -> _Pending:
        """Start an iteration on all ranks."""
        return _Pending([executor.launch(plan) for executor in self.executors])


@contextlib.contextmanager
def sharded(config: EngineConfig, pipeline: Pipeline, folder: Path) -> Iterator[AllRanks]:
    """`pipeline` on as many ranks as `config` says. Device, kernels and dtype of `config` must be settled."""
    ranks = config.device.tensor_parallel_size
    dtype = TORCH_DTYPES[config.model.dtype]
    devices = [open_device(config, rank) for rank in range(ranks)]

    def place(number: int) -> Any:
        files = resolve_model(config.model.model, config.model.load_format, seed=config.model.seed)
        rank = join(config, files, devices[number], pipeline, folder / f"store-{pipeline.name}", number)
        kernels = create(config.device.kernels, "cpu", dtype)
        _, executor = load_and_place(config, files, kernels, devices[number], pipeline, rank, show_progress=False)
        return executor

    try:
        yield AllRanks(on_each(ranks, place))
    finally:
        for device in devices:
            device.close()
