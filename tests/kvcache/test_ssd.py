"""The SSD tier as its users see it: round trips, limits, restarts, refusals, and a disk that says no."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.kvcache.ssd_pages import key_of, keys_of, open_small, page_of, pages_of, read_all

from nanoflow.core.errors import ConfigError
from nanoflow.kvcache import slab_files, ssd_aio, ssd_io
from nanoflow.kvcache.slab_files import SlabFiles
from nanoflow.kvcache.ssd import open_ssd
from nanoflow.kvcache.ssd_tools import stat_store


@pytest.mark.parametrize("io", ["auto", "threads"])
@pytest.mark.parametrize("page_bytes", [8192, 5000])
@pytest.mark.parametrize("aligned", [True, False])
def test_pages_come_back_from_another_process_life(tmp_path: Path, io: str, page_bytes: int, aligned: bool) -> None:
    keys = keys_of(range(70))
    pages = pages_of(keys, page_bytes)
    if not aligned:
        buffer = np.zeros(pages.size + 1, dtype=np.uint8)[1:].reshape(pages.shape)
        buffer[:] = pages
        pages = buffer
    tier = open_small(tmp_path, 80, page_bytes, io=io)
    assert tier.put_many(keys, pages).result().all()
    assert read_all(tier, keys) == set(keys)
    stats = tier.stats()
    assert (stats.pages, stats.written_bytes, stats.read_bytes) == (70, 70 * page_bytes, 70 * page_bytes)
    assert stats.read_s > 0 and stats.write_s > 0
    tier.close()
    tier.close()
    again = open_small(tmp_path, 80, page_bytes, io=io)
    assert again.n_pages == 70 and read_all(again, [*keys, key_of(99)]) == set(keys)
    again.close()


def test_the_limit_holds_and_the_order_of_use_survives(tmp_path: Path) -> None:
    tier = open_small(tmp_path, 6)
    for number in range(6):
        tier.put_many([key_of(number)], pages_of([key_of(number)], 4096)).result()
    tier.touch([key_of(0)])
    tier.close()
    tier = open_small(tmp_path, 6)
    stored = tier.put_many(keys_of([10, 11]), pages_of(keys_of([10, 11]), 4096)).result()
    assert stored.all() and tier.n_pages == 6
    assert read_all(tier, keys_of(range(12))) == set(keys_of([0, 3, 4, 5, 10, 11])), "1 and 2 were the oldest"
    assert tier.stats().evicted_pages == 2
    tier.close()


def test_what_finds_no_room_is_dropped_from_the_end(tmp_path: Path) -> None:
    tier = open_small(tmp_path, 4)
    keys = keys_of(range(7))
    assert tier.put_many(keys[:2], pages_of(keys[:2], 4096)).result().all()
    stored = tier.put_many(keys, pages_of(keys, 4096)).result()
    assert stored.tolist() == [True] * 4 + [False] * 3, "a chain never loses its beginning to its end"
    tier.close()


def test_keys_under_way_count_as_stored_once(tmp_path: Path) -> None:
    tier = open_small(tmp_path, 8)
    keys = keys_of([1, 2, 1, 3])
    first = tier.put_many(keys, pages_of(keys, 4096))
    second = tier.put_many(keys[:2], pages_of(keys[:2], 4096))
    assert second.result().all() and first.result().all() and first.poll() and first.result().all()
    assert tier.stats().written_bytes == 3 * 4096
    assert tier.put_many([], []).result().tolist() == [] and tier.get_many([], []).poll()
    tier.close()


def test_evicted_pages_stay_away_after_a_restart(tmp_path: Path) -> None:
    tier = open_small(tmp_path, 8)
    keys = keys_of(range(5))
    tier.put_many(keys, pages_of(keys, 4096)).result()
    assert tier.evict(keys_of([1, 3, 77])) == 2
    assert read_all(tier, keys) == set(keys_of([0, 2, 4]))
    tier.close()
    tier = open_small(tmp_path, 8)
    assert read_all(tier, keys) == set(keys_of([0, 2, 4]))
    tier.close()


@pytest.mark.parametrize(("n_pages", "expected"), [(3, 3), (20, 5)])
def test_another_limit_keeps_what_fits(tmp_path: Path, n_pages: int, expected: int) -> None:
    keys = keys_of(range(5))
    tier = open_small(tmp_path, 5)
    tier.put_many(keys, pages_of(keys, 4096)).result()
    tier.close()
    tier = open_small(tmp_path, n_pages)
    assert len(read_all(tier, keys)) == expected
    more = keys_of(range(50, 50 + n_pages))
    assert tier.put_many(more, pages_of(more, 4096)).result().all()
    assert read_all(tier, more) == set(more)
    tier.close()


@pytest.mark.parametrize(("layout", "page_bytes"), [("model-b", 4096), ("model-a", 8192)])
def test_a_foreign_store_is_refused_and_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, layout: str, page_bytes: int
) -> None:
    tier = open_small(tmp_path, 5)
    tier.put_many([key_of(1)], pages_of([key_of(1)], 4096)).result()
    tier.close()
    (tmp_path / "notes.txt").write_text("mine")
    tier = open_small(tmp_path, 5, page_bytes, layout)
    assert tier.n_pages == 0 and "another model, precision or page size" in caplog.text
    assert (tmp_path / "notes.txt").read_text() == "mine"
    tier.close()


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    tier = open_small(tmp_path, 5)
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}; stop it or choose another folder"):
        open_small(tmp_path, 5)
    code = (
        "import sys; from pathlib import Path; from nanoflow.kvcache.ssd import open_ssd\n"
        "open_ssd(Path(sys.argv[1]), 1 << 20, 4096, 'model-a')"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and f"in use by process {os.getpid()}" in done.stderr
    tier.close()
    open_small(tmp_path, 5).close()


def test_a_folder_that_cannot_be_used_is_an_error_with_its_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another folder"):
        open_small(tmp_path / "file", 5)
    with pytest.raises(ConfigError, match="holds no page"):
        open_ssd(tmp_path, 100, 4096, "model-a")


def test_a_damaged_page_is_refused_logged_and_stored_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = keys_of(range(3))
    tier = open_small(tmp_path, 5)
    tier.put_many(keys, pages_of(keys, 4096)).result()
    tier.close()
    slab = next(tmp_path.glob("slab-*"))
    data = bytearray(slab.read_bytes())
    at = data.index(page_of(keys[1], 4096).tobytes())
    data[at + 17] ^= 1
    slab.write_bytes(data)
    tier = open_small(tmp_path, 5)
    assert read_all(tier, keys) == {keys[0], keys[2]}
    assert tier.stats().corrupt_pages == 1 and "wrong checksum" in caplog.text
    assert tier.contains(keys).tolist() == [True, False, True]
    assert tier.put_many(keys, pages_of(keys, 4096)).result().all() and read_all(tier, keys) == set(keys)
    tier.close()


def test_a_file_system_without_o_direct_is_used_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_open = os.open

    def refuse_direct(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, mode)

    monkeypatch.setattr(slab_files.os, "open", refuse_direct)
    with caplog.at_level(logging.INFO):
        tier = open_small(tmp_path, 5, 5000)
        keys = keys_of(range(3))
        assert tier.put_many(keys, pages_of(keys, 5000)).result().all() and read_all(tier, keys) == set(keys)
    assert caplog.text.count("refuses O_DIRECT") == 1
    tier.close()


def test_without_asynchronous_io_threads_do_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_aio, "_CALLS", {})
    io = ssd_io.open_io(2)
    assert io.name == "threads"
    io.close()
    with pytest.raises(OSError, match="not known"):
        ssd_io.open_io(2, "aio")


def test_a_full_disk_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(slab_files, "_TARGET_SLAB_BYTES", 4 * 4096)
    real_allocate = slab_files._allocate

    def two_slabs_fit(fd: int, n_bytes: int) -> None:
        if len(list(tmp_path.glob("slab-*"))) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_allocate(fd, n_bytes)

    monkeypatch.setattr(slab_files, "_allocate", two_slabs_fit)
    tier = open_small(tmp_path, 40)
    keys = keys_of(range(12))
    assert tier.put_many(keys, pages_of(keys, 4096)).result().tolist() == [True] * 8 + [False] * 4
    assert "No space left on device" in caplog.text and tier.stats().errors == 4
    for start in range(12, 52, 4):
        more = keys_of(range(start, start + 4))
        tier.put_many(more, pages_of(more, 4096)).result()
    assert tier.stats().capacity_pages == 8 and tier.n_pages == 8
    last = keys_of(range(60, 64))
    assert tier.put_many(last, pages_of(last, 4096)).result().all(), "evicts like a tier of the size that fits"
    assert read_all(tier, last) == set(last)
    tier.close()


def test_io_errors_make_pages_absent_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tier = open_small(tmp_path, 8)
    keys = keys_of(range(6))
    tier.put_many(keys[:4], pages_of(keys[:4], 4096)).result()

    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(ssd_io.os, "pwritev", fail)
        assert not tier.put_many(keys[4:], pages_of(keys[4:], 4096)).result().any()
        patched.setattr(ssd_io.os, "preadv", fail)
        assert read_all(tier, keys[:1]) == set()
    with monkeypatch.context() as patched:
        patched.setattr(SlabFiles, "sync", fail)
        assert not tier.put_many(keys[4:], pages_of(keys[4:], 4096)).result().any()
    with monkeypatch.context() as patched:
        patched.setattr(SlabFiles, "sync", lambda *_: 1 / 0)
        assert not tier.put_many(keys[4:], pages_of(keys[4:], 4096)).result().any(), "even a fault of our own"
    assert tier.stats().errors == 7 and "Input/output error" in caplog.text
    assert tier.put_many(keys[4:], pages_of(keys[4:], 4096)).result().all()
    assert read_all(tier, keys) == set(keys[1:])
    tier.close()
    tier = open_small(tmp_path, 8)
    assert read_all(tier, keys) == set(keys[1:])
    tier.close()


def test_an_index_that_cannot_be_appended_to_stays_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = open_small(tmp_path, 8)
    keys = keys_of(range(4))
    tier.put_many(keys[:2], pages_of(keys[:2], 4096)).result()
    real = os.pwrite

    def half(fd: int, data: bytes, offset: int) -> int:
        if any(data):  # the zeros that undo it are let through
            real(fd, data[: len(data) // 2], offset)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", half)
        assert not tier.put_many(keys[2:], pages_of(keys[2:], 4096)).result().any()
    assert stat_store(tmp_path).pages == 2 and stat_store(tmp_path).damaged_records == 0
    assert tier.put_many(keys[2:3], pages_of(keys[2:3], 4096)).result().all()
    assert stat_store(tmp_path).pages == 3 and stat_store(tmp_path).damaged_records == 0
    tier.close()
    tier = open_small(tmp_path, 8)
    assert read_all(tier, keys) == set(keys[:3])
    tier.close()
