"""Ranks agree on whether they have symmetric memory, and count torch's exchanges alike: torch's part is made up."""

from __future__ import annotations

import gc
import importlib
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nanoflow.core.errors import ConfigError, RankFailedError
from nanoflow.distributed import group, implementations, symmetric
from nanoflow.distributed.group import Groups, open_groups
from nanoflow.distributed.symmetric import SymmetricMemory, open_symmetric
from tests.distributed.in_process import on_each

CPU = torch.device("cpu")
bindings = importlib.import_module("torch._C._distributed_c10d")


def groups_of(folder: Path, ranks: int = 2) -> list[Groups]:
    def named(rank: int) -> Groups:
        opened = open_groups(folder / "store", rank, ranks, CPU, [0])
        lane = replace(opened.lanes[0], handle=SimpleNamespace(group_name="lane"))
        return replace(opened, lanes={0: lane})

    return on_each(ranks, named)


class Torch:
    """Torch's symmetric memory without GPUs; `meet` is what an exchange does."""

    def __init__(self, meet: Callable[[Any], None]) -> None:
        self.met: list[Any] = []
        self._meet = meet
        self._SymmetricMemory = SimpleNamespace(
            empty_strided_p2p=lambda shape, strides, dtype, device: torch.empty(shape, dtype=dtype),
        )

    def rendezvous(self, buffer: Tensor, where: Any) -> None:
        """An exchange in the group `where`, a name or torch's handle."""
        self._meet(where)
        self.met.append(where)


Pretend = Callable[[Callable[[Any], None]], Torch]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    def started(meet: Callable[[Any], None]) -> Torch:
        made = Torch(meet)
        monkeypatch.setattr(symmetric, "_symm_mem", lambda: made)
        return made

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(SymmetricMemory, "_n_meetings", 0)
    monkeypatch.setattr(SymmetricMemory, "_alone", None)
    monkeypatch.setattr(group, "AGREE_TIMEOUT", timedelta(seconds=0.5))
    return started


def test_a_new_rank_catches_up_in_a_group_of_its_own(
    tmp_path: Path, pretend: Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after torch has forgotten all names, and although nobody else keeps that group."""

    def as_torch_finds_it(name: str) -> None:
        gc.collect()
        found = bindings._resolve_process_group(name)
        assert (found.rank(), found.size()) == (0, 1)

    fake = pretend(as_torch_finds_it)
    (alone,) = groups_of(tmp_path, 1)
    for turn in range(2):
        monkeypatch.setattr(Groups, "largest", lambda self, values, meetings=3 * (turn + 1): [meetings])
        monkeypatch.setattr(Groups, "smallest", lambda self, value: value)
        SymmetricMemory(CPU, alone)
        assert len(fake.met) == 3 * (turn + 1)
        bindings._unregister_process_group(fake.met[0])
    assert len(set(fake.met)) == 1


def test_a_failure_of_one_rank_is_everybodys(tmp_path: Path, pretend: Pretend) -> None:
    """None has symmetric memory then: those who name nothing get the library's collectives, others the reason."""
    both = groups_of(tmp_path)

    def meet(where: Any) -> None:
        if where is both[1].lanes[0].handle:
            raise RuntimeError("no way to the other card\nand a long trace")

    pretend(meet)

    opened = on_each(2, lambda rank: implementations._by_default(both[rank], CPU, ())[0].at(0).name)
    assert opened == ["library", "library"]

    def refused(rank: int) -> str:
        with pytest.raises(ConfigError, match="use a pipeline without the variants one_shot") as caught:
            open_symmetric(both[rank], CPU, ["one_shot"])
        return str(caught.value)

    first, second = on_each(2, refused)
    assert "another rank" in first and "no way to the other card)" in second


def test_a_failure_that_others_wait_for_ends_the_group(tmp_path: Path, pretend: Pretend) -> None:
    both = groups_of(tmp_path)
    ended = threading.Event()

    def meet(where: Any) -> None:
        if where is both[0].lanes[0].handle:
            ended.wait(20)
        raise RuntimeError("no way to the other card")

    pretend(meet)

    def work(rank: int) -> BaseException | None:
        try:
            implementations._by_default(both[rank], CPU, ())
        except RuntimeError as error:
            return error
        finally:
            ended.set()
        return None

    _, second = on_each(2, work)
    assert isinstance(second, RankFailedError)
    assert "failed on rank 1: no way to the other card" in str(second)


def test_ranks_that_have_it_get_it(tmp_path: Path, pretend: Pretend) -> None:
    both = groups_of(tmp_path)
    fake = pretend(lambda where: None)
    opened = on_each(2, lambda rank: open_symmetric(both[rank], CPU, ["two_shot"], default="two_shot"))
    assert [collectives.at(0).name for collectives, _ in opened] == ["two_shot", "two_shot"]
    assert len(fake.met) == 2
