"""The SSD tier's memory of what its slots hold: a file that is only ever appended to, and that survives any crash.

The file is a header and records of 40 bytes, each with a checksum of its own. A record says "slot s holds page k, whose
bytes have this checksum" or "slot s holds nothing". Reading it back, later records replace earlier ones; a record whose
checksum is wrong (the end torn by a crash, a damaged sector) counts as never written. That is always safe: a lost
record makes a page absent, and a stale one names bytes whose checksum no longer fits, which is noticed before they are
served. The checksums are seeded by a number drawn when the store was made, so records of an earlier store never fit.

The file is filled with zeros ahead of the records: a sync that need not change the file's size is several times as
fast. When more than half of the records are out of date the file is written anew beside itself and put in its place by
`rename`, which is atomic.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import xxhash

from nanoflow.core.log import get_logger
from nanoflow.kvcache.ssd_io import sync_data

log = get_logger(__name__)

INDEX_NAME = "index.nfkv"
_MAGIC = b"NFKVIDX1"
_HEADER = struct.Struct("<8sQQQ16sQ")  # magic, page bytes, slot bytes, slots a slab, digest of the layout, epoch
_RECORD = struct.Struct("<II16sQ")  # kind, slot, key, checksum of the page
_CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size
RECORD_BYTES = _RECORD.size + _CHECKSUM.size
_HOLDS, _EMPTY = 0x70757431, 0x64656C31
_NO_KEY = bytes(16)
_BLANK = bytes(RECORD_BYTES)
_CHUNK_BYTES = 64 << 10
_MIN_RECORDS_TO_COMPACT = 4096


class StoreRefusedError(Exception):
    """The files are not a store that can be used here; the message says why."""


class Entry(NamedTuple):
    """A page on the SSD. `checksum` is XXH3-64 of its bytes."""

    slot: int
    key: bytes
    checksum: int


@dataclass(frozen=True)
class Geometry:
    """What a store's files look like and what its pages depend on; another one makes the store unusable."""

    page_bytes: int
    slot_bytes: int
    slots_per_slab: int
    layout: str

    def header(self, epoch: int) -> bytes:
        digest = xxhash.xxh3_128_digest(self.layout.encode())
        body = _HEADER.pack(_MAGIC, self.page_bytes, self.slot_bytes, self.slots_per_slab, digest, epoch)
        return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))


def read_header(data: bytes) -> tuple[Geometry, int]:
    """(geometry with its layout's digest as hex instead of the layout, epoch). Raises `StoreRefusedError`."""
    if len(data) < HEADER_BYTES:
        raise StoreRefusedError("its index is cut off in the header")
    body, (checksum,) = data[: _HEADER.size], _CHECKSUM.unpack_from(data, _HEADER.size)
    magic, page_bytes, slot_bytes, slots_per_slab, digest, epoch = _HEADER.unpack(body)
    if magic != _MAGIC:
        raise StoreRefusedError("its index is of another version or not an index")
    if checksum != xxhash.xxh3_64_intdigest(body):
        raise StoreRefusedError("its index has a damaged header")
    return Geometry(page_bytes, slot_bytes, slots_per_slab, digest.hex()), epoch


def read_records(data: bytes, epoch: int) -> tuple[dict[int, Entry], int, int]:
    """(slot → entry, oldest first; records; damaged ones among them) of an index file's bytes after the header."""
    live: dict[int, Entry] = {}
    slot_of: dict[bytes, int] = {}
    n_records = n_damaged = 0
    for start in range(0, len(data), RECORD_BYTES):
        record = data[start : start + RECORD_BYTES]
        if record == _BLANK[: len(record)]:
            continue
        n_records += 1
        if len(record) < RECORD_BYTES:
            n_damaged += 1
            continue
        body = record[: _RECORD.size]
        (checksum,) = _CHECKSUM.unpack_from(record, _RECORD.size)
        if checksum != xxhash.xxh3_64_intdigest(body, epoch):
            n_damaged += 1
            continue
        kind, slot, key, page_checksum = _RECORD.unpack(body)
        before = live.pop(slot, None)
        if before is not None:
            del slot_of[before.key]
        if kind == _HOLDS:
            if key in slot_of:
                del live[slot_of[key]]
            live[slot], slot_of[key] = Entry(slot, key, page_checksum), slot
    return live, n_records, n_damaged


class SlabIndex:
    """An open index file. After `open`, used by one thread. Every method raises `OSError` if the disk refuses."""

    def __init__(self, path: Path, header: bytes) -> None:
        self.path = path
        self.geometry, self.epoch = read_header(header)
        self.live: dict[int, Entry] = {}
        self._header = header
        self._fd = -1
        self._size = 0  # up to the last record
        self._file_size = 0  # with the zeros behind it

    @classmethod
    def create(cls, path: Path, geometry: Geometry) -> SlabIndex:
        """A new, empty index in place of whatever was there."""
        index = cls(path, geometry.header(epoch=secrets.randbits(64)))
        index.rewrite([])
        return index

    @classmethod
    def open(cls, path: Path, geometry: Geometry | None) -> SlabIndex:
        """The index at `path` if it is of `geometry` (None: any), its `live` entries oldest first.

        Raises `StoreRefusedError`, or `OSError`.
        """
        data = path.read_bytes()
        found, epoch = read_header(data)
        if geometry is not None and geometry.header(epoch) != data[:HEADER_BYTES]:
            raise StoreRefusedError(
                f"it was made for another model, precision or page size (pages of {found.page_bytes} bytes, "
                f"here {geometry.page_bytes})"
            )
        index = cls(path, data[:HEADER_BYTES])
        index.live, n_records, n_damaged = read_records(data[HEADER_BYTES:], epoch)
        if n_damaged:
            log.warning("%s: %d of %d records are torn or damaged; their pages are lost", path, n_damaged, n_records)
        index.rewrite(list(index.live.values()))
        return index

    def append(self, holds: Iterable[Entry], empty: Iterable[int]) -> None:
        """Write and sync: the slots `empty` hold nothing, then `holds`. On an error nothing of it counts as written."""
        holds, empty = list(holds), list(empty)
        records = b"".join(self._record(_EMPTY, Entry(slot, _NO_KEY, 0)) for slot in empty)
        records += b"".join(self._record(_HOLDS, entry) for entry in holds)
        if not records:
            return
        try:
            end = self._size + len(records)
            blank = bytes(_CHUNK_BYTES if end > self._file_size else 0)
            _write_all(self._fd, records + blank, self._size)
            sync_data(self._fd)
        except OSError:
            with contextlib.suppress(OSError):
                _write_all(self._fd, bytes(len(records)), self._size)
            raise
        self._size, self._file_size = end, max(self._file_size, end + len(blank))
        for slot in empty:
            self.live.pop(slot, None)
        for entry in holds:
            self.live.pop(entry.slot, None)
            self.live[entry.slot] = entry
        if self.n_records > max(_MIN_RECORDS_TO_COMPACT, 2 * len(self.live)):
            try:
                self.rewrite(list(self.live.values()))
            except OSError as error:  # the records above are safe where they are
                log.warning("cannot compact %s: %s", self.path, error)

    @property
    def n_records(self) -> int:
        """Records in the file, out of date ones included."""
        return (self._size - HEADER_BYTES) // RECORD_BYTES

    def rewrite(self, entries: list[Entry]) -> None:
        """Replace the file, atomically, by one that holds `entries` alone, oldest first."""
        data = self._header + b"".join([self._record(_HOLDS, entry) for entry in entries])
        blank = bytes(_CHUNK_BYTES)
        beside = self.path.with_name(self.path.name + ".new")
        fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            _write_all(fd, data + blank, 0)
            os.fsync(fd)
            beside.rename(self.path)
        except OSError:
            os.close(fd)
            beside.unlink(missing_ok=True)
            raise
        self.close()
        self._fd, self._size, self._file_size = fd, len(data), len(data) + len(blank)
        self.live = {entry.slot: entry for entry in entries}
        sync_folder(self.path.parent)

    def _record(self, kind: int, entry: Entry) -> bytes:
        body = _RECORD.pack(kind, entry.slot, entry.key, entry.checksum)
        return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body, self.epoch))

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _write_all(fd: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def sync_folder(folder: Path) -> None:
    """Make the creation and renaming of files in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
