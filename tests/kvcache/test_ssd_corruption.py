"""Damage anywhere in the store's files (a cut, a flipped byte, bytes overwritten): nothing wrong is ever served."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.kvcache.ssd_pages import keys_of, open_small, pages_of, read_all

from nanoflow.kvcache import slab_index
from nanoflow.kvcache.slab_index import HEADER_BYTES, INDEX_NAME, RECORD_BYTES

N_PAGES, PAGE_BYTES = 6, 3000
EVERY_KEY = keys_of(range(10))
SLAB_NAME = "slab-00000.nfkv"


@pytest.fixture(scope="module")
def patched() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patched:
        yield patched


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, patched: pytest.MonkeyPatch) -> Path:
    """A folder whose index has seen pages come, go, and come back elsewhere; left without a clean end."""
    folder = tmp_path_factory.mktemp("store")
    patched.setattr(slab_index, "_CHUNK_BYTES", 2 * RECORD_BYTES)
    tier = open_small(folder, N_PAGES, PAGE_BYTES)
    for numbers in ([0, 1, 2, 3], [4, 5, 6], [0, 7], [8]):
        keys = keys_of(numbers)
        assert tier.put_many(keys, pages_of(keys, PAGE_BYTES)).result().all()
        if numbers != [8]:  # what was evicted last might still be on its way to the disk
            tier.evict(keys[-1:])
    crashed = folder.with_name("crashed")
    shutil.copytree(folder, crashed)
    tier.close()
    return crashed


def after(store: Path, folder: Path, name: str, data: bytes) -> set[bytes]:
    """The keys served, checked, from a copy of the store whose file `name` has other bytes; a put works afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(store, folder)
    (folder / name).write_bytes(data)
    tier = open_small(folder, N_PAGES, PAGE_BYTES)
    served = read_all(tier, EVERY_KEY)
    assert tier.put_many(EVERY_KEY[:3], pages_of(EVERY_KEY[:3], PAGE_BYTES)).result().all()
    assert read_all(tier, EVERY_KEY) >= set(EVERY_KEY[:3])
    tier.close()
    return served


def test_the_undamaged_store_serves_something(store: Path, tmp_path: Path) -> None:
    assert len(after(store, tmp_path / "copy", SLAB_NAME, (store / SLAB_NAME).read_bytes())) == 6


def test_the_index_cut_at_and_around_every_record(store: Path, tmp_path: Path) -> None:
    data = (store / INDEX_NAME).read_bytes()
    boundaries = range(HEADER_BYTES, len(data) + 1, RECORD_BYTES)
    for end in [0, 1, HEADER_BYTES - 1, *(end + off for end in boundaries for off in (0, -7))]:
        after(store, tmp_path / "copy", INDEX_NAME, data[:end])


def test_the_slab_cut_at_and_inside_every_slot(store: Path, tmp_path: Path) -> None:
    data = (store / SLAB_NAME).read_bytes()
    for end in range(0, len(data), 2048):
        served = after(store, tmp_path / "copy", SLAB_NAME, data[:end])
        assert len(served) <= max(0, end - 4096) // 4096


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from([INDEX_NAME, SLAB_NAME]),
    kind=st.sampled_from(["cut", "flip", "overwrite", "shift"]),
    where=st.floats(0, 1, exclude_max=True),
    noise=st.binary(min_size=1, max_size=600),
)
def test_random_damage(store: Path, tmp_path: Path, name: str, kind: str, where: float, noise: bytes) -> None:
    data = (store / name).read_bytes()
    at = int(where * len(data))
    damaged = {
        "cut": data[:at],
        "flip": data[:at] + bytes([data[at] ^ (noise[0] or 1)]) + data[at + 1 :],
        "overwrite": data[:at] + noise + data[at + len(noise) :],
        "shift": data[:at] + noise + data[at:],
    }[kind]
    after(store, tmp_path / "copy", name, damaged)


def test_a_slab_of_another_store_is_refused(store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = open_small(tmp_path / "other", N_PAGES, PAGE_BYTES)
    other.put_many(EVERY_KEY[:5], pages_of(EVERY_KEY[:5], PAGE_BYTES)).result()
    other.close()
    assert after(store, tmp_path / "copy", SLAB_NAME, (tmp_path / "other" / SLAB_NAME).read_bytes()) == set()
    assert "of another store" in caplog.text
