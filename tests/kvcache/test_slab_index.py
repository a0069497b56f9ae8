"""The index file under every cut and every flipped byte: what is read back is a state that once was, or less."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kvcache.ssd_pages import key_of

from nanoflow.kvcache import slab_index
from nanoflow.kvcache.slab_index import HEADER_BYTES, RECORD_BYTES, Entry, Geometry, SlabIndex, StoreRefusedError

GEOMETRY = Geometry(4096, 4096, 8, "model-a")
STEPS: list[tuple[list[Entry], list[int]]] = [  # (holds, empty) of each append
    ([Entry(0, key_of(1), 11), Entry(1, key_of(2), 22)], []),
    ([Entry(2, key_of(3), 33)], [0]),
    ([Entry(0, key_of(4), 44)], []),
    ([Entry(3, key_of(2), 22)], [1]),  # a page that moved
    ([], [2]),
    ([Entry(2, key_of(5), 55), Entry(1, key_of(1), 11)], []),
]


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, list[dict[int, Entry]]]:
    """An index file and what it held after each of its records."""
    index = SlabIndex.create(tmp_path / "index", GEOMETRY)
    states: list[dict[int, Entry]] = [{}]
    for holds, empty in STEPS:
        for slot in empty:
            states.append({at: entry for at, entry in states[-1].items() if at != slot})
        for entry in holds:
            before = {at: known for at, known in states[-1].items() if at != entry.slot and known.key != entry.key}
            states.append({**before, entry.slot: entry})
        index.append(holds, empty)
        assert index.live == states[-1]
    index.close()
    return tmp_path / "index", states


def records_of(path: Path) -> bytes:
    """The file without the zeros behind the last record."""
    data = path.read_bytes()
    n_records = -(-len(data[HEADER_BYTES:].rstrip(b"\0")) // RECORD_BYTES)
    return data[: HEADER_BYTES + n_records * RECORD_BYTES]


def reopen(path: Path) -> dict[int, Entry]:
    index = SlabIndex.open(path, GEOMETRY)
    index.close()
    return index.live


def test_every_cut_leaves_the_state_of_the_last_whole_record(written: tuple[Path, list[dict[int, Entry]]]) -> None:
    path, states = written
    data = records_of(path)
    assert len(data) == HEADER_BYTES + (len(states) - 1) * RECORD_BYTES
    _, epoch = slab_index.read_header(data)
    for end in range(len(data) + 1):
        if end < HEADER_BYTES:
            with pytest.raises(StoreRefusedError, match="cut off"):
                slab_index.read_header(data[:end])
            continue
        state = states[(end - HEADER_BYTES) // RECORD_BYTES]
        assert slab_index.read_records(data[HEADER_BYTES:end], epoch)[0] == state
        if (end - HEADER_BYTES) % RECORD_BYTES in (0, 1, RECORD_BYTES - 1):
            path.write_bytes(data[:end])
            assert reopen(path) == state
            assert len(records_of(path)) == HEADER_BYTES + RECORD_BYTES * len(state), "opening repairs the file"


def test_every_flipped_byte_loses_at_most_its_record(written: tuple[Path, list[dict[int, Entry]]]) -> None:
    path, states = written
    data = records_of(path)
    once_true = {entry for state in states for entry in state.values()}
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        if at < HEADER_BYTES:
            with pytest.raises(StoreRefusedError):
                slab_index.read_header(bytes(damaged))
            continue
        _, epoch = slab_index.read_header(data)
        live, n_records, n_damaged = slab_index.read_records(bytes(damaged[HEADER_BYTES:]), epoch)
        assert n_damaged == 1 and n_records == len(states) - 1
        assert set(live.values()) <= once_true
        assert len({entry.key for entry in live.values()}) == len(live)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 2**64 - 1))
def test_arbitrary_bytes_hold_nothing(data: bytes, epoch: int) -> None:
    live, _, n_damaged = slab_index.read_records(data, epoch)
    parts = [data[start : start + RECORD_BYTES] for start in range(0, len(data), RECORD_BYTES)]
    assert live == {} and n_damaged == sum(any(part) for part in parts)


def test_records_of_an_earlier_store_never_fit(written: tuple[Path, list[dict[int, Entry]]]) -> None:
    path, _ = written
    old = path.read_bytes()
    SlabIndex.create(path, GEOMETRY).close()
    new = records_of(path)
    path.write_bytes(new + old[HEADER_BYTES:])
    assert reopen(path) == {}


def test_other_geometries_and_other_files_are_refused(written: tuple[Path, list[dict[int, Entry]]]) -> None:
    path, states = written
    with pytest.raises(StoreRefusedError, match="another model, precision or page size"):
        SlabIndex.open(path, Geometry(4096, 4096, 8, "model-b"))
    found = SlabIndex.open(path, None)
    assert found.geometry.page_bytes == 4096 and found.live == states[-1]
    found.close()
    path.write_bytes(b"#!/bin/sh\n" * 20)
    with pytest.raises(StoreRefusedError, match="another version or not an index"):
        SlabIndex.open(path, GEOMETRY)


def test_a_file_of_stale_records_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab_index, "_MIN_RECORDS_TO_COMPACT", 8)
    index = SlabIndex.create(tmp_path / "index", GEOMETRY)
    for number in range(40):
        index.append([Entry(number % 3, key_of(number), number)], [])
        assert index.n_records <= 9
    index.close()
    assert [entry.checksum for entry in reopen(tmp_path / "index").values()] == [37, 38, 39], "oldest first"


def test_records_go_on_behind_the_zeros_made_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab_index, "_CHUNK_BYTES", 100)
    index = SlabIndex.create(tmp_path / "index", GEOMETRY)
    for number in range(20):
        index.append([Entry(number, key_of(number), number)], [number - 1] if number % 3 == 0 and number else [])
        assert reopen_copy(tmp_path) == index.live
    index.close()


def reopen_copy(folder: Path) -> dict[int, Entry]:
    (folder / "copy").write_bytes((folder / "index").read_bytes())
    return reopen(folder / "copy")


def test_a_failed_rewrite_keeps_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(slab_index, "_MIN_RECORDS_TO_COMPACT", 3)
    index = SlabIndex.create(tmp_path / "index", GEOMETRY)
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for number in range(8):
        index.append([Entry(0, key_of(number), number)], [])
    monkeypatch.setattr(os, "fsync", real)
    index.close()
    assert "cannot compact" in caplog.text and [path.name for path in tmp_path.iterdir()] == ["index"]
    assert [entry.checksum for entry in reopen(tmp_path / "index").values()] == [7]
