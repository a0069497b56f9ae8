"""A store seen from outside: counted, verified, cleared; never behind its owner's back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.kvcache.ssd_pages import keys_of, open_small, page_of, pages_of, read_all

from nanoflow.core.errors import ConfigError
from nanoflow.kvcache.slab_index import INDEX_NAME
from nanoflow.kvcache.ssd_tools import clear_store, stat_store, verify_store

PAGE_BYTES = 3000


@pytest.fixture
def store(tmp_path: Path) -> Path:
    tier = open_small(tmp_path / "store", 100, PAGE_BYTES)
    keys = keys_of(range(80))
    assert tier.put_many(keys, pages_of(keys, PAGE_BYTES)).result().all()
    tier.close()
    return tmp_path / "store"


def damage(store: Path, number: int) -> None:
    slab = store / "slab-00000.nfkv"
    data = bytearray(slab.read_bytes())
    data[data.index(page_of(keys_of([number])[0], PAGE_BYTES).tobytes())] ^= 0x40
    slab.write_bytes(data)


def test_a_store_is_counted_and_verified(store: Path) -> None:
    report = stat_store(store)
    assert (report.pages, report.page_bytes, report.damaged_records, report.owner) == (80, PAGE_BYTES, 0, None)
    assert report.file_bytes == sum(path.stat().st_size for path in store.iterdir() if path.name != "lock.nfkv")
    steps: list[tuple[int, int]] = []
    assert verify_store(store, lambda done, total: steps.append((done, total))) == (80, 0)
    assert steps == [(64, 80), (80, 80)]
    damage(store, 7)
    damage(store, 70)
    assert verify_store(store) == (78, 2)
    assert verify_store(store) == (78, 0), "the damaged ones were dropped"
    tier = open_small(store, 100, PAGE_BYTES)
    assert read_all(tier, keys_of(range(80))) == set(keys_of(set(range(80)) - {7, 70}))
    tier.close()


def test_a_slab_that_is_gone_costs_its_pages(store: Path) -> None:
    (store / "slab-00000.nfkv").unlink()
    assert verify_store(store) == (0, 80)


def test_clearing_removes_the_store_and_nothing_else(store: Path) -> None:
    (store / "notes.txt").write_text("mine")
    assert clear_store(store) > 80 * 4096
    assert sorted(path.name for path in store.iterdir()) == ["lock.nfkv", "notes.txt"]
    with pytest.raises(ConfigError, match="there are no KV pages in"):
        stat_store(store)


def test_a_store_in_use_is_only_looked_at(store: Path) -> None:
    tier = open_small(store, 100, PAGE_BYTES)
    assert stat_store(store).owner == os.getpid()
    for act in (verify_store, clear_store):
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
            act(store)
    tier.close()


def test_what_is_no_store_is_an_error(store: Path) -> None:
    with pytest.raises(ConfigError, match="there are no KV pages in"):
        verify_store(store / "nowhere")
    (store / INDEX_NAME).write_bytes(b"something else" * 20)
    for act in (stat_store, verify_store):
        with pytest.raises(ConfigError, match="another version or not an index; clear them"):
            act(store)
    assert clear_store(store) > 0, "clearing needs no readable index"
