"""Ranks as processes: they follow rank 0, end with it, and take the whole group with them when they fail."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanoflow.core.errors import ConfigError, EngineDeadError, PipelineError, RankFailedError
from nanoflow.core.sampling import SamplingParams
from nanoflow.engine import build
from nanoflow.engine.async_llm import AsyncLLM
from nanoflow.engine.build import Engine
from nanoflow.engine.ranks import RankGroup
from nanoflow.pipeline.graph import layer_graph
from tests.distributed.pipelines import DENSE_BATCH, overlapped
from tests.e2e.tiny_models import BACKENDS, make_tiny_engine, prompt_of, save_tiny_model

PROMPTS = [prompt_of(length, seed=length) for length in (23, 15, 33, 60, 5)]
MIXED = [
    SamplingParams(temperature=1.0, seed=3, max_tokens=12, n=3),
    SamplingParams(temperature=0, max_tokens=12),
    SamplingParams(temperature=1.3, seed=4, top_p=0.9, max_tokens=12),
    SamplingParams(temperature=0.8, seed=5, frequency_penalty=0.5, max_tokens=12),
    SamplingParams(temperature=1.0, seed=6, logprobs=2, max_tokens=12),
]
WITHIN_S = 10.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3-moe")
    save_tiny_model("qwen3-moe", folder)
    return folder


def make(folder: Path, **options: object) -> Engine:
    return make_tiny_engine(folder, BACKENDS[0], dense_batch=DENSE_BATCH, **options)  # type: ignore[arg-type]


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: list[int], seconds: float = WITHIN_S) -> bool:
    """Whether all processes end within `seconds`."""
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def choices(engine: Engine) -> list[list[int]]:
    """Output token ids of every choice of every prompt; those of one prompt share pages, and copy the last of it."""
    asked = zip(PROMPTS, MIXED, strict=True)
    sequences = [one for prompt, params in asked for one in engine.submission.sequences(prompt, params)]
    for sequence in sequences:
        engine.core.add(sequence)
    in_flight = None
    while engine.core.has_work or in_flight is not None:
        in_flight = engine.core.step(in_flight)
    return [sequence.output_ids for sequence in sequences]


def test_processes_give_the_tokens_of_one_rank(folder: Path, tmp_path: Path) -> None:
    one = make(folder)
    wanted = [choices(one), choices(one)]  # the second finds pages of the first
    one.close()
    replace(overlapped(layer_graph(one.spec, 2)), min_tokens=9).save(tmp_path / "pipeline.json")
    two = make_tiny_engine(folder, BACKENDS[0], pipeline=str(tmp_path / "pipeline.json"), tensor_parallel_size=2)
    assert two.ranks is not None
    try:
        assert [choices(two), choices(two)] == wanted
        assert two.core.stats().kv_hit_tokens == one.core.stats().kv_hit_tokens
    finally:
        two.close()
    assert gone(two.ranks.pids, 0.0)


@pytest.fixture
def serving(folder: Path) -> Iterator[AsyncLLM]:
    engine = AsyncLLM(make(folder, tensor_parallel_size=2, max_model_len=512))
    yield engine
    engine.close()


async def test_a_killed_rank_is_told_and_leaves_nothing(serving: AsyncLLM) -> None:
    ranks = serving.engine.ranks
    assert ranks is not None
    endless = SamplingParams(temperature=0, max_tokens=450, ignore_eos=True)
    streams = [serving.submit(prompt_of(9, seed=n), endless) for n in range(4)]
    first = await anext(streams[0])
    assert first.token_ids, "the requests are running"
    os.kill(ranks.pids[0], signal.SIGKILL)
    killed = time.monotonic()
    ends = await asyncio.wait_for(asyncio.gather(*map(last_delta, streams)), WITHIN_S)
    assert time.monotonic() - killed < WITHIN_S
    for end in ends:
        assert end.finish_reason == "error"
        assert "rank 1" in end.error and "SIGKILL" in end.error
    assert not serving.healthy
    with pytest.raises(EngineDeadError, match="rank 1"):
        serving.submit([1, 2], endless)
    assert gone(ranks.pids)


async def last_delta(stream: object) -> object:
    end = None
    async for delta in stream:  # type: ignore[attr-defined]
        end = delta
    return end


async def test_a_rank_killed_at_rest_is_noticed(serving: AsyncLLM) -> None:
    ranks = serving.engine.ranks
    assert ranks is not None and serving.healthy
    os.kill(ranks.pids[0], signal.SIGKILL)
    deadline = time.monotonic() + WITHIN_S
    while serving.healthy and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    assert not serving.healthy


def test_a_rank_that_cannot_start_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RankFailedError, match=r"rank 1 .* has ended with exit code 1"):
        make(folder, tensor_parallel_size=2)


def test_a_rank_that_dies_while_rank_0_gets_ready_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that wait for it would wait for ever."""
    groups: list[RankGroup] = []

    class Seen(RankGroup):
        def __init__(self, *values: Any, **options: Any) -> None:
            super().__init__(*values, **options)
            groups.append(self)

    def waits_for_ever(*_: Any, **__: Any) -> None:
        os.kill(groups[0].pids[0], signal.SIGKILL)
        time.sleep(60)

    monkeypatch.setattr(build, "RankGroup", Seen)
    monkeypatch.setattr(build, "load_and_place", waits_for_ever)
    began = time.monotonic()
    with pytest.raises(RankFailedError, match=r"rank 1 .* SIGKILL"):
        make(folder, tensor_parallel_size=2)
    assert time.monotonic() - began < 30


def test_a_rank_that_fails_says_why(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And where, if all is to be said."""
    logger = logging.getLogger("nanoflow")
    level = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        engine = make(folder, tensor_parallel_size=2)
    finally:
        logger.setLevel(level)
    assert engine.ranks is not None
    engine.ranks.send("prepare", "no pipeline")
    with pytest.raises(RankFailedError, match=r"rank 1 .* has failed \(PipelineError: "):
        engine.ranks.wait_for_all("making a pipeline ready", 60.0)
    engine.close()
    assert "Traceback" in capfd.readouterr().err


def test_what_ranks_cannot_do_is_refused(folder: Path) -> None:
    with pytest.raises(PipelineError, match="one rank has no network operations"):
        make(folder, pipeline="network-overlap")
    with pytest.raises(ConfigError, match="split into 4 parts at most"):
        make(folder, tensor_parallel_size=5)
    with pytest.raises(ConfigError, match="a DRAM tier of 4096 bytes holds no page"):
        make(folder, tensor_parallel_size=2, kv_dram_bytes=4096)


SLEEPER = """
import sys, time
from tests.distributed.test_rank_processes import make
engine = make(__import__("pathlib").Path(sys.argv[1]), tensor_parallel_size=2)
print(*engine.ranks.pids, flush=True)
time.sleep(60)
"""


def test_no_rank_outlives_a_killed_rank_0(folder: Path) -> None:
    paths = os.pathsep.join(path for path in sys.path if path)
    parent = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert parent.stdout is not None
    with parent:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert pids and all(map(alive, pids))
        parent.kill()
    assert gone(pids)
