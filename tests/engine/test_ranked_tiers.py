"""KV tiers of a model that ranks share, with all ranks in one process, which must say the same."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoflow.core.errors import ConfigError, RankFailedError
from nanoflow.engine.rank_link import GroupLink
from nanoflow.executor.stream_copies import StreamMover
from nanoflow.kvcache import slab_files, ssd_store
from nanoflow.kvcache.dram import open_dram
from nanoflow.kvcache.rank_link import Held, TiersToOpen, joined
from nanoflow.kvcache.ranked_mover import RankedMover
from nanoflow.kvcache.ranked_ssd import held_by_all
from nanoflow.kvcache.slab_index import Entry
from nanoflow.kvcache.slab_jobs import PoolRows, rows_at
from nanoflow.kvcache.ssd_folders import rank_layout, store_folder
from nanoflow.kvcache.ssd_io import open_io
from nanoflow.kvcache.ssd_tools import stat_store, verify_store
from tests.engine.ranked_bench import LAYOUT, LIMITS, RANKS, SLOT, Bench, LocalGroup, check, request


@pytest.fixture(autouse=True)
def threads_for_io(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same to all but speed, and quicker to open and close."""
    monkeypatch.setattr(ssd_store, "open_io", lambda depth, _: open_io(depth, "threads"))


def stores(folder: Path) -> list[Path]:
    """By rank."""
    return [store_folder(folder, rank_layout(LAYOUT, rank, RANKS)) for rank in range(RANKS)]


def filled(folder: Path, n_prompts: int = 3) -> None:
    bench = Bench(folder)
    for number in range(n_prompts):
        bench.run(request(number))
    bench.close()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_pages_come_back_on_all_ranks(tmp_path: Path, asynchronous: bool) -> None:
    bench = Bench(tmp_path, dram=22, asynchronous=asynchronous, answer_after_s=0.001)
    for number in range(5):
        bench.run(request(number))
        bench.write_all()
    assert bench.hits == {}, "five prompts of ten pages do not fit into twenty-four"
    assert bench.run(request(4)) == 1
    bench.scheduler.pool.clear()
    assert bench.run(request(4)) == 1
    assert bench.run(request(0)) == 1
    assert bench.hits == {"device": 40, "dram": 40, "ssd": 40}
    dram, ssd = bench.core.stats().kv_tiers
    page_bytes = RANKS * bench.movers[0].page_bytes
    assert (dram.written_bytes, ssd.read_bytes, ssd.pages) == (50 * page_bytes, 10 * page_bytes, 50)
    bench.close()
    assert [stat_store(store).pages for store in stores(tmp_path)] == [50] * RANKS
    fresh = Bench(tmp_path)
    for number in range(5):
        assert fresh.run(request(number)) == 1
    assert fresh.hits == {"ssd": 5 * 40}
    fresh.close()


def test_commands_travel_with_batches(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.group.messages.clear()
    bench.run(*(request(number) for number in range(6)))
    launches = [posted for kind, posted in bench.group.messages if kind == "launch"]
    assert sum(launches) > 0
    assert len(launches) == bench.core.stats().work.iterations
    bench.close()


def damage(store: Path, slot: int) -> None:
    slab = next(store.glob("slab-*.nfkv"))
    data = bytearray(slab.read_bytes())
    data[SLOT * (1 + slot)] ^= 1  # behind the header
    slab.write_bytes(data)


def test_a_page_that_one_rank_has_damaged_is_computed_again_by_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path)
    damage(stores(tmp_path)[2], 4)
    bench = Bench(tmp_path)
    computed = [bench.run(request(number)) for number in range(3)]
    assert sorted(computed) == [1, 1, 41 - 4 * 4], "the fifth of ten pages"
    ssd = bench.core.stats().kv_tiers[1]
    assert ssd.corrupt_pages == 1
    assert "rank 2 cannot read its part of 1 of 10 pages" in caplog.text
    bench.close()
    assert [verify_store(store) for store in stores(tmp_path)] == [(30, 0)] * RANKS, "it was written again"
    fresh = Bench(tmp_path)
    assert [fresh.run(request(number)) for number in range(3)] == [1, 1, 1]
    fresh.close()


def test_what_verify_drops_from_one_rank_is_gone_from_all(tmp_path: Path) -> None:
    filled(tmp_path)
    damage(stores(tmp_path)[1], 0)
    assert verify_store(stores(tmp_path)[1]) == (29, 1)
    bench = Bench(tmp_path)
    assert bench.core.stats().kv_tiers[1].pages == 29
    bench.close()
    assert [stat_store(store).pages for store in stores(tmp_path)] == [29] * RANKS


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_whose_store_is_lost_has_nothing(tmp_path: Path, lost: int) -> None:
    filled(tmp_path)
    shutil.rmtree(stores(tmp_path)[lost])
    bench = Bench(tmp_path)
    assert [bench.run(request(number)) for number in range(3)] == [41, 41, 41]
    bench.close()
    fresh = Bench(tmp_path)
    assert [fresh.run(request(number)) for number in range(3)] == [1, 1, 1]
    fresh.close()


def test_another_number_of_ranks_reads_nothing(tmp_path: Path) -> None:
    filled(tmp_path)
    layouts = {rank_layout(LAYOUT, rank, n_ranks) for n_ranks in (1, 2, RANKS) for rank in range(n_ranks)}
    assert len({store_folder(tmp_path, layout) for layout in layouts}) == 1 + 2 + RANKS


def test_ranks_stopped_at_different_moments_agree_on_what_is_left(tmp_path: Path) -> None:
    """Each rank's files are copied at another point of the same run, as a crash would leave them."""
    bench = Bench(tmp_path / "live", ssd=17, dram=12)
    rng = np.random.default_rng(3)
    for number in range(5):
        bench.run(request(int(rng.integers(4)), length=int(rng.integers(9, 42))))
        bench.write_all()
        late = number % RANKS  # one rank is a round behind the others
        for rank, (live, kept) in enumerate(zip(stores(tmp_path / "live"), stores(tmp_path / "left"), strict=True)):
            if rank != late or number < RANKS:
                shutil.copytree(live, kept, dirs_exist_ok=True)
        restarted = tmp_path / f"restarted{number}"
        shutil.copytree(tmp_path / "left", restarted)
        fresh = Bench(restarted, ssd=17)
        n_pages = fresh.core.stats().kv_tiers[1].pages
        assert n_pages <= min(stat_store(store).pages for store in stores(tmp_path / "left"))
        fresh.run(*(request(other) for other in range(4)))
        fresh.close()
        whole, damaged = zip(*(verify_store(store) for store in stores(restarted)), strict=True)
        assert not any(damaged) and len(set(whole)) == 1
    bench.close()


def test_pages_of_different_sizes_go_down_and_come_back_on_two_ranks() -> None:
    """With the mover of GPUs, which works at once on a CPU."""
    kv = [[torch.randn(8, 2, heads, 5) for _ in range(3)] for heads in (2, 1)]
    before = [[layer.clone() for layer in layers] for layers in kv]
    movers = [StreamMover(layers, None) for layers in kv]
    group = LocalGroup([], list(movers))
    link = GroupLink(group)  # type: ignore[arg-type]
    mover = RankedMover(movers[0], link)
    assert (mover.page_bytes, link.ask("page_bytes")()) == (240, [120])
    link.ask("open", TiersToOpen(2, 4, 0, None, LAYOUT))()
    tier = open_dram(4 * SLOT, 240)
    mover.attach(tier.pool)
    pages, targets = np.array([6, 1, 3], dtype=np.int32), np.array([0, 7, 2], dtype=np.int32)
    slots = np.array([2, 0, 1], dtype=np.int64)
    down = mover.offload(pages, slots)
    assert not down.poll(), "the other rank has not heard of it"
    assert down.result().all() and down.poll()
    mover.copy(np.array([5], dtype=np.int32), np.array([6], dtype=np.int32))
    assert mover.reload(slots, targets).result().all()
    for layers, old in zip(kv, before, strict=True):
        for layer, was in zip(layers, old, strict=True):
            assert torch.equal(layer[targets], was[pages])
            assert torch.equal(layer[6], was[5])
    assert (mover.stats.offloaded_bytes, mover.stats.reloaded_bytes) == (3 * 360, 3 * 360)
    tier.close()


def test_chosen_rows_of_a_pool_know_their_slots() -> None:
    pool = np.arange(12, dtype=np.uint8).reshape(6, 2)
    chosen = rows_at(PoolRows(pool, np.array([4, 0, 5])), [2, 0])
    assert isinstance(chosen, PoolRows)
    assert chosen.slots.tolist() == [5, 4]
    assert np.array_equal(chosen, pool[[5, 4]])


def test_only_what_all_hold_in_the_same_slot_counts() -> None:
    a, b, c, d = (bytes([n]) * 16 for n in range(4))
    entries = [Entry(7, a, 0), Entry(0, b, 0), Entry(3, c, 0), Entry(4, d, 0)]
    first = Held(np.array([0, 3, 7, 4]), joined([b, a, a, d]))
    second = Held(np.array([4, 9, 0]), joined([d, a, b]))
    assert [entry.slot for entry in held_by_all(entries, [first])] == [7, 0, 4]
    assert [entry.slot for entry in held_by_all(entries, [first, second])] == [0, 4]


def test_a_copy_that_fails_on_one_rank_is_computed_instead() -> None:
    bench = Bench()
    bench.run(request(0))
    bench.scheduler.pool.clear()
    bench.movers[1].failing = True
    assert bench.run(request(0)) == 41
    bench.run(request(1))
    assert bench.core.stats().kv_tiers[0].pages == 10, "what one rank could not copy down is not there"
    bench.close()


def test_a_full_disk_on_one_rank_limits_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(slab_files, "_TARGET_SLAB_BYTES", 5 * SLOT)
    real, full = slab_files._allocate, str(stores(tmp_path)[1])

    def two_slabs_fit(fd: int, n_bytes: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        if path.startswith(full) and not path.endswith(("00000.nfkv", "00001.nfkv")):
            raise OSError(28, "No space left on device")
        real(fd, n_bytes)

    monkeypatch.setattr(slab_files, "_allocate", two_slabs_fit)
    bench = Bench(tmp_path, ssd=20)
    for number in range(4):
        bench.run(request(number))
        bench.write_all()
    ssd = bench.core.stats().kv_tiers[1]
    assert ssd.capacity_pages == 10 and 0 < ssd.pages <= 10 and ssd.errors > 0
    assert "rank 1 cannot write its part" in caplog.text and "stays at 10 pages" in caplog.text
    bench.close()
    assert {stat_store(store).pages for store in stores(tmp_path)} == {ssd.pages}


def test_what_a_rank_cannot_open_is_said(tmp_path: Path) -> None:
    folder = stores(tmp_path)[1]
    lock = slab_files.lock_folder(folder)
    with pytest.raises(ConfigError, match=r"rank 1: the KV pages in .* are in use"):
        Bench(tmp_path)
    os.close(lock)
    with pytest.raises(ConfigError, match=f"a DRAM tier of .* holds no page of {RANKS * 16}"):
        Bench(dram=0.9)  # type: ignore[arg-type]


@pytest.fixture
def broken(tmp_path: Path) -> Iterator[Bench]:
    """A bench whose ranks answer late, and which has pages to bring up from the SSD."""
    filled(tmp_path)
    bench = Bench(tmp_path, answer_after_s=0.05)
    yield bench
    bench.group.close()


def test_a_lost_rank_leaves_nobody_waiting(broken: Bench) -> None:
    broken.core.add(request(0))
    broken.core.step(None)
    broken.group.lose()
    with pytest.raises(RankFailedError, match="rank 1"):
        for _ in range(100):
            broken.core.step(None)
    broken.core.fail_all("a rank was lost")
    started = time.monotonic()
    broken.scheduler.residency.close()
    assert time.monotonic() - started < 2
    assert not broken.scheduler.live_sequences()


def test_a_rank_lost_while_closing_leaves_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path)
    bench.run(request(0))
    assert bench.scheduler.residency.has_writes
    bench.group.lose()
    monkeypatch.setattr(bench.movers[0], "close", lambda: pytest.fail("the device may still copy"))
    started = time.monotonic()
    bench.scheduler.residency.close()
    assert time.monotonic() - started < 2
    bench.group.close()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rounds=st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=8),
        min_size=1,
        max_size=4,
    ),
    n_pages=st.integers(20, 40),
    dram=st.integers(1, 40),
    ssd=st.sampled_from([0, 5, 100]),
    late=st.booleans(),
    asynchronous=st.booleans(),
    aborted=st.sets(st.integers(0, 7)),
)
def test_no_rank_changes_a_text(
    rounds: list[list[tuple[int, int, int]]],
    n_pages: int,
    dram: int,
    ssd: int,
    late: bool,
    asynchronous: bool,
    aborted: set[int],
    tmp_path: Path,
) -> None:
    bench = Bench(
        tmp_path / f"store{ssd}" if ssd else None,
        dram=dram,
        ssd=ssd,
        limits=replace(LIMITS, n_pages=n_pages),
        asynchronous=asynchronous,
        answer_after_s=0.0005 if late else 0.0,
    )
    for asked in rounds:
        sequences = [request(*one) for one in asked]
        for sequence in sequences:
            bench.core.add(sequence)
        in_flight = bench.core.step(bench.core.step(None))
        for number in aborted.intersection(range(len(sequences))):
            bench.core.abort(sequences[number])
        bench.run(in_flight=in_flight)
        check(*sequences)
    bench.close()
