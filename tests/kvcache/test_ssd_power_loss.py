"""Power failures at every step of the SSD tier's work: the order of its writes alone keeps what it promised.

No checksum may be needed for that: a page whose record is on the disk is on the disk as well. That the test would
notice a wrong order is tested too.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kvcache.ssd_disk_model import RecordedDisk
from tests.kvcache.ssd_pages import keys_of, open_small, pages_of, read_all

from nanoflow.kvcache import slab_files, slab_index
from nanoflow.kvcache.slab_files import SlabFiles

N_PAGES, N_KEYS, PAGE_BYTES = 8, 16, 2000
EVERY_KEY = keys_of(range(N_KEYS))


def work(disk: RecordedDisk, seed: int) -> None:
    """Random puts and evictions; notes the keys held at each quiet moment, and how many an operation may cost."""
    choose = random.Random(seed)
    tier = open_small(disk.folder, N_PAGES, PAGE_BYTES)
    for _ in range(12):
        keys = choose.sample(EVERY_KEY, choose.randint(1, 5))
        disk.note(("operation", len(keys)))
        if choose.random() < 0.8:
            tier.put_many(keys, pages_of(keys, PAGE_BYTES)).result()
        else:
            tier.evict(keys)
        held = {key for key, is_held in zip(EVERY_KEY, tier.contains(EVERY_KEY).tolist(), strict=True) if is_held}
        disk.note(("held", held))
    disk.note(("operation", 0))
    tier.close()


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab_files, "_TARGET_SLAB_BYTES", 4 * 4096)
    monkeypatch.setattr(slab_index, "_MIN_RECORDS_TO_COMPACT", 10)
    monkeypatch.setattr(slab_index, "_CHUNK_BYTES", 150)


def crashes(disk: RecordedDisk, tmp_path: Path, n_crashes: int, seed: int) -> Iterator[tuple[int, int, int]]:
    """(pages refused by their checksum, pages lost, most that may be lost) after each of `n_crashes` crashes."""
    choose = random.Random(seed)
    points = range(1, len(disk.events) + 1)
    for point in choose.sample(points, min(n_crashes, len(points))):
        folder = tmp_path / "after"
        disk.lay_out(point, folder, choose)
        held: set[bytes] = set()
        may_be_lost = 0
        for kind, first, *_ in disk.events[:point]:
            if kind == "note" and first[0] == "held":
                held, may_be_lost = first[1], 0
            elif kind == "note":
                may_be_lost = first[1]
        tier = open_small(folder, N_PAGES, PAGE_BYTES)
        served = read_all(tier, EVERY_KEY)
        yield tier.stats().corrupt_pages, len(held - served), may_be_lost
        tier.close()
        shutil.rmtree(folder)


@pytest.mark.usefixtures("small_files")
def test_any_step_may_be_the_last(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with pytest.MonkeyPatch.context() as patched:
        disk = RecordedDisk(tmp_path / "store", patched)
        work(disk, seed=1)
    assert {kind for kind, *_ in disk.events} >= {"write", "sync", "create", "rename", "note"}
    for n_corrupt, n_lost, may_be_lost in crashes(disk, tmp_path, 80, seed=2):
        assert n_corrupt == 0, "a record was durable before its page"
        assert n_lost <= may_be_lost, "a page that was stored is gone"


@pytest.mark.usefixtures("small_files")
def test_a_wrong_order_would_be_noticed(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SlabFiles, "sync", lambda *_: None)
        disk = RecordedDisk(tmp_path / "store", patched)
        work(disk, seed=1)
    assert any(n_corrupt for n_corrupt, _, _ in crashes(disk, tmp_path, 120, seed=2))
