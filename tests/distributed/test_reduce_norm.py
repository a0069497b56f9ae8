"""The fused all-reduce and norm: its very kernels in Triton's interpreter, and the pipelines that use it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanoflow.core.sampling import SamplingParams
from nanoflow.distributed.collectives import NormingCollectives
from nanoflow.distributed.group import open_groups
from nanoflow.distributed.implementations import open_collectives
from nanoflow.engine.build import Engine
from nanoflow.pipeline.graph import layer_graph
from tests.distributed.in_process import on_each, sharded
from tests.distributed.pipelines import DENSE_BATCH, PIPELINES
from tests.e2e.tiny_models import BACKENDS, make_tiny_engine, prompt_of, run, save_tiny_model


def run_ranks(kind: str, ranks: int, folder: Path, timeout_s: float) -> None:
    """Run `reduce_norm_rank` of all ranks; all must succeed."""
    paths = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "tests.distributed.reduce_norm_rank", kind]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(folder)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(ranks)
    ]
    try:
        ends = [process.communicate(timeout=timeout_s)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(ends)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted")
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_both_forms_equal_all_reduce_then_norm(ranks: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    run_ranks("cpu", ranks, tmp_path, 90.0)


def test_the_librarys_form_norms_what_it_reduced(tmp_path: Path) -> None:
    device = torch.device("cpu")
    weight = torch.linspace(0.5, 1.5, 8)
    parts = [torch.randn(5, 8, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]

    def work(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        groups = open_groups(tmp_path / "store", rank, 2, device, [0])
        lanes, _ = open_collectives(groups, device, {"", "two_shot_norm"})
        one = lanes.at(0, "two_shot_norm")
        assert isinstance(one, NormingCollectives)
        x, h = parts[rank].clone(), torch.empty(5, 8)
        one.all_reduce_norm(x, weight, 1e-5, h)
        return x, h

    for x, h in on_each(2, work):
        assert torch.equal(x, parts[0] + parts[1])
        torch.testing.assert_close(h, torch.nn.functional.rms_norm(x, (8,), weight, 1e-5))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One rank, whose scheduler the others borrow."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model("qwen2", folder)
    engine = make_tiny_engine(folder, BACKENDS[0], dense_batch=DENSE_BATCH, enable_prefix_caching=False)
    yield engine
    engine.close()


@pytest.mark.parametrize(
    ("name", "normed"),
    [("sequential", 2 * 3), ("fused", 1), ("partly-fused", 3)],
    ids=["two a layer", "the first layer's", "those of QKV"],
)
def test_norms_that_came_with_an_all_reduce_are_left_out(
    engine: Engine, name: str, normed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How often each row of a full batch is normed in three layers; nano-batches have parts of the rows."""
    rows: list[int] = []
    config = engine.config.with_options("device", tensor_parallel_size=2, threads=2)
    one = engine.core.launcher
    with sharded(config, PIPELINES[name](layer_graph(engine.spec, 2)), tmp_path) as launcher:
        kernels = launcher.executors[0].decoder.kernels
        norm = kernels.rms_norm

        def counting(x_td: torch.Tensor, *rest: object) -> None:
            rows.append(len(x_td))
            norm(x_td, *rest)

        monkeypatch.setattr(kernels, "rms_norm", counting)
        engine.core.relaunch_with(launcher, asynchronous=True)
        try:
            run(engine, [prompt_of(DENSE_BATCH, seed=1)], SamplingParams(temperature=0, max_tokens=1))
        finally:
            engine.core.relaunch_with(one, asynchronous=True)
    final_norm = 1
    assert sum(rows) == normed * DENSE_BATCH + final_norm
