"""KV pages below the device, with ranks as processes: wherever pages come from, greedy tokens are those of one rank."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoflow.cli.main import main
from nanoflow.core.errors import RankFailedError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.ops import Op
from nanoflow.core.sampling import SamplingParams
from nanoflow.distributed.channel import SLOTS
from nanoflow.engine import ranks
from nanoflow.engine.build import Engine
from nanoflow.models.hf_config import read_hf_spec
from nanoflow.pipeline.graph import layer_graph
from nanoflow.pipeline.pipeline import LaneSpec, NanoOp, Pipeline
from tests.distributed.pipelines import overlapped
from tests.e2e import tiny_models
from tests.e2e.tiny_models import BACKENDS, VOCAB, make_tiny_engine, prompt_of, run, save_tiny_model

GREEDY = SamplingParams(temperature=0, max_tokens=6)
LONG = SamplingParams(temperature=0, max_tokens=50)
PROMPTS = [prompt_of(length, seed=length) for length in (40, 64, 75)]
IN_FULL_PAGES = 32 + 48 + 64
SLOW = MachineRates("slow", "float32", flops_per_s=1.0, mem_bytes_per_s=1.0, measured=True)
WITHIN_S = 10.0


@pytest.fixture(autouse=True)
def reloading_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoflow.engine.build.measure_rates", lambda *_: SLOW)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with three KV heads: the pages of one rank are twice as large as those of the other."""
    folder = tmp_path_factory.mktemp("three-heads")
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_models.ARCHITECTURES, "three-heads", ("Llama", heads))
        save_tiny_model("three-heads", folder)
    return folder


def make(folder: Path, **options: Any) -> Engine:
    return make_tiny_engine(folder, BACKENDS[0], max_model_len=128, **options)


def cold(folder: Path, params: SamplingParams) -> list[list[int]]:
    engine = make(folder, enable_prefix_caching=False)
    outputs = run(engine, PROMPTS, params)
    engine.close()
    return outputs


def hits(engine: Engine) -> dict[str, int]:
    return {tier: tokens for tier, tokens in engine.core.stats().kv_hit_tokens.items() if tokens}


def forget_dram(engine: Engine) -> None:
    """Write everything to the SSDs, then drop what is above them."""
    residency = engine.core.scheduler.residency
    while residency.has_writes:
        engine.core.step(None)
    assert residency.loader is not None
    residency.loader.lower.dram.evict(list(engine.core.scheduler.pool._page_of))
    engine.core.scheduler.pool.clear()


def expect_short_answers(engine: Engine) -> None:
    """Let the scheduler predict answers of one token, which may end at any token as far as it knows: it admits all."""
    scheduler = engine.core.scheduler
    scheduler.lengths._sum = scheduler.lengths._count
    scheduler.limits = replace(scheduler.limits, eos_ids=(VOCAB + 1,))


def kv(capsys: pytest.CaptureFixture[str], action: str, path: Path) -> list[dict[str, Any]]:
    """What `nanoflow kv` says of each rank's store."""
    capsys.readouterr()
    main(["kv", action, str(path), "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return sorted(rows, key=lambda row: row["about"])  # type: ignore[no-any-return]


def test_every_tier_a_restart_and_a_damaged_page_give_the_tokens_of_one_rank(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted, page_bytes = cold(folder, GREEDY), 16 * read_hf_spec(folder).kv_bytes_per_token("float32")
    tiers = {"kv_dram_bytes": 1 << 22, "kv_ssd_path": str(tmp_path), "kv_ssd_bytes": 1 << 24}
    two = make(folder, tensor_parallel_size=2, **tiers)
    assert run(two, PROMPTS, GREEDY) == wanted
    assert run(two, PROMPTS, GREEDY) == wanted
    assert hits(two)["device"] >= IN_FULL_PAGES
    two.core.scheduler.pool.clear()
    assert run(two, PROMPTS, GREEDY) == wanted
    assert hits(two)["dram"] == IN_FULL_PAGES
    forget_dram(two)
    assert run(two, PROMPTS, GREEDY) == wanted
    assert hits(two)["ssd"] == IN_FULL_PAGES
    dram, ssd = two.core.stats().kv_tiers
    assert dram.capacity_pages == (1 << 22) // (20 << 10), "sizes are of all ranks: slots of 12 and 8 KiB"
    assert dram.read_bytes == 2 * IN_FULL_PAGES // 16 * page_bytes, "and so are the bytes"
    assert (ssd.read_bytes, ssd.written_bytes) == (IN_FULL_PAGES // 16 * page_bytes, ssd.pages * page_bytes)
    two.close()

    stores = kv(capsys, "stat", tmp_path)
    assert [store["about"].rsplit(", ", 1)[1] for store in stores] == ["rank 0 of 2", "rank 1 of 2"]
    assert [store["page_bytes"] for store in stores] == [2 * page_bytes // 3, page_bytes // 3]
    assert [store["pages"] for store in stores] == [ssd.pages] * 2
    slab = Path(stores[1]["store"]) / "slab-00000.nfkv"
    data = bytearray(slab.read_bytes())
    data[4096] ^= 1  # a byte of the first page, behind the header
    slab.write_bytes(data)
    fresh = make(folder, tensor_parallel_size=2, **tiers)
    assert run(fresh, PROMPTS, GREEDY) == wanted
    assert 0 < hits(fresh)["ssd"] < IN_FULL_PAGES
    assert fresh.core.stats().kv_tiers[1].corrupt_pages == 1
    fresh.close()
    assert [(store["whole_pages"], store["damaged_pages"]) for store in kv(capsys, "verify", tmp_path)] == [
        (ssd.pages, 0)
    ] * 2, "what was computed again is stored again"
    assert len(kv(capsys, "clear", tmp_path)) == 2
    assert not list(tmp_path.rglob("slab-*"))


def test_swapped_requests_go_on_and_a_killed_rank_ends_them(folder: Path, tmp_path: Path) -> None:
    spec = read_hf_spec(folder)
    plain = overlapped(layer_graph(spec, 2))
    ops = (*plain.nano_ops, NanoOp(Op.KV_OFFLOAD, 0, plain.dense_batch, "copies"))
    path = tmp_path / "pipeline.json"
    Pipeline("with copies", plain.dense_batch, (*plain.lanes, LaneSpec("copies", 0.25)), ops).save(path)
    sizes = {"kv_dram_bytes": 1 << 22, "kv_memory_bytes": 16 * 16 * spec.kv_bytes_per_token("float32") * 2 // 3}
    two = make(folder, tensor_parallel_size=2, pipeline=str(path), **sizes)
    scheduler = two.core.scheduler
    assert scheduler.pool.n_pages == 16 and two.ranks is not None
    expect_short_answers(two)
    assert run(two, PROMPTS, LONG) == cold(folder, LONG)
    assert scheduler.preemptions > 0
    assert hits(two)["dram"] > 0
    assert two.core.stats().work.recomputed_tokens <= 16 * scheduler.preemptions

    for prompt in PROMPTS:
        two.core.add(two.submission.sequences(prompt[::-1], LONG)[0])
    expect_short_answers(two)
    in_flight, before = None, scheduler.preemptions
    while scheduler.preemptions == before:
        in_flight = two.core.step(in_flight)
    os.kill(two.ranks.pids[0], signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(RankFailedError, match=r"rank 1 .* SIGKILL"):
        while two.core.has_work or in_flight is not None:
            in_flight = two.core.step(in_flight)
    two.core.fail_all("a rank has failed")
    two.close()
    assert time.monotonic() - started < WITHIN_S
    assert not scheduler.live_sequences()


def test_a_rank_that_hangs_while_only_pages_move_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = make(folder, tensor_parallel_size=2, kv_dram_bytes=1 << 20)
    assert two.ranks is not None
    pid, mover = two.ranks.pids[0], two.core.scheduler.residency._mover
    assert mover is not None
    pages, slots = np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.int64)
    assert mover.offload(pages, slots).result().all(), "it answers"
    monkeypatch.setattr(ranks, "HUNG_S", 1.0)
    time.sleep(1.5)
    two.check()
    os.kill(pid, signal.SIGSTOP)
    assert not mover.offload(pages, slots).result().any()
    with pytest.raises(RankFailedError, match=rf"rank 1 .*process {pid}.* hangs: what moves KV pages \(offload\)"):
        two.check()
    two.close()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("messages", [1, SLOTS + 1])
def test_a_rank_that_hangs_while_serving_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, messages: int) -> None:
    """Also where it takes no more messages."""
    two = make(folder, tensor_parallel_size=2)
    assert two.ranks is not None
    pid = two.ranks.pids[0]
    monkeypatch.setattr(ranks, "HUNG_S", 2.2)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(RankFailedError, match=rf"rank 1 .*process {pid}.* hangs: "):
        for _ in range(messages - 1):
            two.ranks.send("posted")
        run(two, PROMPTS, GREEDY)
    two.core.fail_all("a rank has failed")
    two.close()
    assert not Path(f"/proc/{pid}").exists()
