"""The benchmark of collectives between GPUs, where it needs none: sizes, data that stays finite, its refusals."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (it is in the dev extra)")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ROWS_BYTES = 2 * 8192


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as it is imported when it runs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import collectives_cuda  # type: ignore[import-not-found]

    return collectives_cuda


def test_messages_are_whole_rows_that_all_ranks_can_share(script: Any) -> None:
    for mebibytes in (0.001, 0.5, 1, 2, 4, 8, 16, 32, 64):
        n_bytes = script.bytes_of(mebibytes)
        assert n_bytes % ROWS_BYTES == 0 and n_bytes > 0
        assert n_bytes == mebibytes * 2**20 or mebibytes == 0.001
        for ranks in (2, 4, 8):
            assert n_bytes % (16 * ranks) == 0, "whole vectors for each rank: else two_shot is left to the library"


class Graph:
    """A recording that calls again."""

    def __init__(self, call: Callable[[], object], n: int) -> None:
        self._call, self._n = call, n

    def replay(self) -> None:
        for _ in range(self._n):
            self._call()


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_message_stays_finite_however_often_it_is_reduced(
    script: Any, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each all-reduce of equal parts multiplies a message by the number of ranks."""

    class OnCpu(script.Bench):  # type: ignore[misc]
        def __init__(self) -> None:
            self.groups = SimpleNamespace(size=ranks, rank=0, smallest=lambda value: value)
            self.x = self.fused_x = torch.zeros(4 * 8192, dtype=torch.bfloat16)
            self.normed, self.out = torch.empty_like(self.x), torch.empty(ranks * 4 * 8192, dtype=torch.bfloat16)
            self.fused: dict[str, Any] = {}
            self.network = self.compute = None
            self.gemms, self.gemm_us = Graph(lambda: None, 1), 1.0
            self.collectives = {"two_shot": SimpleNamespace(all_reduce=lambda x: x.mul_(ranks))}

        def together(self) -> None:
            assert torch.isfinite(self.x).all()

        def captured(self, call: Callable[[], object], stream: object, n: int) -> Graph:
            Graph(call, 3).replay()
            return Graph(call, n)

        def _check(self, *_: object) -> None:
            pass

    def timed(graph: Graph, stream: object, n: int) -> Callable[[], float]:
        for _ in range(n):
            graph.replay()
        return lambda: 10.0

    monkeypatch.setattr(script, "_timed", timed)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    bench = OnCpu()
    row = bench.measure("all_reduce", "two_shot", ROWS_BYTES * 4, 2)
    bench.together()
    assert (row.run, row.mebibytes, row.us) == (2, 4 * ROWS_BYTES / 2**20, 10.0 / script.CALLS)
    assert row.wire_gb_per_s == pytest.approx(2 * (ranks - 1) / ranks * 4 * ROWS_BYTES / row.us / 1e3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ranks", "1"], "2 ranks or more"),
        (["--sizes", "0"], "sizes above 0"),
        (["--ranks", "4"], "--ranks 4 needs as many GPUs; here are 3"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    script: Any, options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(sys, "argv", ["collectives_cuda.py", *options])
    with pytest.raises(SystemExit):
        script.main()
    assert said in capsys.readouterr().err
