"""SmolLM2 (9 heads, 3 KV heads: nothing divides by two) on two ranks, and the server over ranks that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nanoflow.core.config import EngineConfig
from nanoflow.core.ops import Op
from nanoflow.core.sampling import SamplingParams
from nanoflow.distributed.sharding import Shard
from nanoflow.engine.build import Engine, build_engine
from nanoflow.models.decoder import DecoderWeights
from nanoflow.models.loading import load_weights
from nanoflow.pipeline.graph import layer_graph
from tests.distributed.in_process import sharded
from tests.distributed.pipelines import DENSE_BATCH, PIPELINES
from tests.e2e.real_model import read_once
from tests.e2e.tiny_models import BACKENDS, run, save_tiny_model

TEXTS = ("The capital of France is", "1, 2, 3, 4, 5,", "Water boils at")
GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    options = {"dtype": "float32", "kv_memory_bytes": 1 << 26, "device": "cpu", "dense_batch": DENSE_BATCH}
    config = EngineConfig.from_options(model="smollm2", enable_prefix_caching=False, max_model_len=512, **options)
    with read_once():
        engine = build_engine(config, show_progress=False)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def loaded() -> dict[int, DecoderWeights]:
    """The weights of each rank, which all pipelines share: reading them takes longer than the rest of the test."""
    return {}


@pytest.fixture
def _read_once(loaded: dict[int, DecoderWeights], monkeypatch: pytest.MonkeyPatch) -> None:
    def load_once(*args: Any, shard: Shard, ops: Any, **options: Any) -> DecoderWeights:
        if shard.rank not in loaded:
            loaded[shard.rank] = load_weights(*args, shard=shard, ops=(Op.O, Op.O_COLUMN), **options)
        return loaded[shard.rank]

    monkeypatch.setattr("nanoflow.engine.placing.load_weights", load_once)


@pytest.mark.usefixtures("_read_once")
@pytest.mark.parametrize("name", ["sequential", "nano-batches", "overlapped"])
def test_two_ranks_answer_like_one(engine: Engine, name: str, tmp_path: Path) -> None:
    prompts = [engine.tokenizer.encode(text) for text in TEXTS]
    wanted = run(engine, prompts, GREEDY)
    assert "Paris" in engine.tokenizer.decode(wanted[0])
    config = engine.config.with_options("device", tensor_parallel_size=2, threads=2)
    one = engine.core.launcher
    with sharded(config, PIPELINES[name](layer_graph(engine.spec, 2)), tmp_path) as launcher:
        engine.core.relaunch_with(launcher, asynchronous=True)
        try:
            assert run(engine, prompts, GREEDY) == wanted
        finally:
            engine.core.relaunch_with(one, asynchronous=True)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """`nanoflow serve` of a tiny model on two ranks."""
    save_tiny_model("qwen2", tmp_path / "model")
    words = ["serve", str(tmp_path / "model"), "--tp", "2", "--restart-on-failure", "--port", "0"]
    words += ["--tokenizer", "bytes", "--dtype", "float32", "--device", "cpu", "--kernels", BACKENDS[0]]
    words += ["--kv-memory-bytes", str(1 << 22), "--data-dir", str(tmp_path / "data"), "--drain-s", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nanoflow.cli.main", *words],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    with process, httpx.Client(timeout=20.0, trust_env=False) as client:
        yield process, client
        process.kill()


def address(process: subprocess.Popen[str]) -> str:
    """Where the server says that it listens; every start says it anew."""
    assert process.stderr is not None
    for line in process.stderr:
        if "Serving" in line:
            return line.split(" on ")[1].strip()
    raise AssertionError("the server has ended")


def children(pid: int) -> list[int]:
    """Process ids of the direct children of `pid`."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_server_restarts_its_ranks(server: tuple[subprocess.Popen[str], httpx.Client]) -> None:
    process, client = server
    url = address(process)
    ask = {"model": "x", "prompt": "abc", "max_tokens": 4, "temperature": 0}
    ask["model"] = client.get(f"{url}/models").json()["data"][0]["id"]
    first = client.post(f"{url}/completions", json=ask)
    assert first.status_code == 200, first.text
    (worker,) = children(process.pid)
    os.kill(worker, signal.SIGKILL)
    again = address(process)
    second = client.post(f"{again}/completions", json=ask)
    assert second.json()["choices"] == first.json()["choices"]
    (other,) = children(process.pid)
    assert other != worker
    process.terminate()
    assert process.wait(20) == 0
    assert not Path(f"/proc/{other}").exists()
