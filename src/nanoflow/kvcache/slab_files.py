"""The SSD tier's data files: slabs of equally large slots, allocated in full before the first page goes in.

A slab is a 4096-byte header that names the store it belongs to, then slots. Files are opened with O_DIRECT where the
file system allows it, so that pages go to the device without a second copy in the page cache; a system without it gets
plain files and one line in the log.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from pathlib import Path

import xxhash

from nanoflow.core.errors import ConfigError
from nanoflow.core.log import get_logger
from nanoflow.kvcache.slab_index import sync_folder
from nanoflow.kvcache.ssd_io import ALIGNMENT, aligned_rows, sync_data

log = get_logger(__name__)

LOCK_NAME = "lock.nfkv"
SLAB_GLOB = "slab-*.nfkv"
_TARGET_SLAB_BYTES = 1 << 30
_MAGIC = b"NFKVSLB1"
_HEADER = struct.Struct("<8sQQQ")  # magic, epoch of the store, number of the slab, bytes of a slot
_CHECKSUM = struct.Struct("<Q")
_REFUSES_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY)


def slots_per_slab(slot_bytes: int) -> int:
    """Slots of one file: a GiB's worth, at least one."""
    return max(1, _TARGET_SLAB_BYTES // slot_bytes)


def slab_number(path: Path) -> int:
    """The number in a slab's file name; -1 if it has none."""
    digits = path.stem.removeprefix("slab-")
    return int(digits) if digits.isdecimal() else -1


class SlabFiles:
    """Slots 0 … n_slots-1 over as many files as they need. `slot_bytes` is a multiple of 4096."""

    def __init__(self, folder: Path, slot_bytes: int, n_slots: int, epoch: int, direct: bool = True) -> None:
        assert slot_bytes % ALIGNMENT == 0, "slots must be whole blocks"
        self.direct = direct and hasattr(os, "O_DIRECT")
        self._folder, self._slot_bytes, self._n_slots, self._epoch = folder, slot_bytes, n_slots, epoch
        self._per_slab = slots_per_slab(slot_bytes)
        self._fds: dict[int, int] = {}

    def open_existing(self) -> set[int]:
        """Open what is there and remove what cannot be used; the numbers of usable slabs."""
        n_slabs = -(-self._n_slots // self._per_slab)
        for path in sorted(self._folder.glob(SLAB_GLOB)):
            number = slab_number(path)
            if 0 <= number < n_slabs and path == self._path(number):
                fd = self._open(path, os.O_RDWR)
                if self._read_header(fd) == self._header(number):
                    self._fds[number] = fd
                    n_bytes = self._bytes_of_slab(number)
                    if os.fstat(fd).st_size > n_bytes:  # made when the limit was higher
                        os.ftruncate(fd, n_bytes)
                    continue
                os.close(fd)
                log.warning("%s is damaged or of another store; its pages are lost", path)
            path.unlink()
        return set(self._fds)

    def locate(self, slot: int) -> tuple[int, int]:
        """(file descriptor, offset in bytes) of a slot whose file is open."""
        number, place = divmod(slot, self._per_slab)
        return self._fds[number], ALIGNMENT + place * self._slot_bytes

    def ensure(self, slot: int) -> None:
        """Make the slot's file, if need be, with space for all its slots. Raises `OSError` (a full disk)."""
        number = slot // self._per_slab
        n_bytes = self._bytes_of_slab(number)
        if number not in self._fds:
            self._fds[number] = self._create(number, n_bytes)
        elif os.fstat(self._fds[number]).st_size < n_bytes:  # made when the limit was lower
            _allocate(self._fds[number], n_bytes)
            sync_data(self._fds[number])

    def has_room(self, slot: int) -> bool:
        """Whether the slot lies within a file that is open."""
        fd = self._fds.get(slot // self._per_slab)
        end = ALIGNMENT + (slot % self._per_slab + 1) * self._slot_bytes
        return fd is not None and os.fstat(fd).st_size >= end

    def slots_of_slab(self, slot: int) -> range:
        """All slots of the file that `slot` lies in."""
        first = slot // self._per_slab * self._per_slab
        return range(first, min(first + self._per_slab, self._n_slots))

    def _create(self, number: int, n_bytes: int) -> int:
        path = self._path(number)
        fd = self._open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            _allocate(fd, n_bytes)
            self._write_header(fd, self._header(number))
            sync_data(fd)
            sync_folder(self._folder)
        except OSError:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        return fd

    def sync(self, slots: list[int]) -> None:
        """Wait until everything written to these slots' files is durable. Raises `OSError`."""
        for number in {slot // self._per_slab for slot in slots}:
            sync_data(self._fds[number])

    def close(self) -> None:
        """Close the files; idempotent."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _bytes_of_slab(self, number: int) -> int:
        return ALIGNMENT + len(self.slots_of_slab(number * self._per_slab)) * self._slot_bytes

    def _path(self, number: int) -> Path:
        return self._folder / f"slab-{number:05}.nfkv"

    def _header(self, number: int) -> bytes:
        body = _HEADER.pack(_MAGIC, self._epoch, number, self._slot_bytes)
        return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))

    def _open(self, path: Path, flags: int) -> int:
        """Open with O_DIRECT if the file system takes it; the first refusal turns it off for all files."""
        if self.direct:
            try:
                fd = os.open(path, flags | os.O_DIRECT, 0o600)
                if _can_read_directly(fd):
                    return fd
                os.close(fd)
            except OSError as error:
                if error.errno not in _REFUSES_DIRECT:
                    raise
            log.info("%s: the file system refuses O_DIRECT; the SSD tier goes through the page cache", self._folder)
            self.direct = False
        return os.open(path, flags, 0o600)

    def _read_header(self, fd: int) -> bytes:
        row = aligned_rows(1, ALIGNMENT)[0]
        n_read = os.preadv(fd, [row.data], 0)
        header: bytes = row[: min(n_read, _HEADER.size + _CHECKSUM.size)].tobytes()
        return header

    def _write_header(self, fd: int, header: bytes) -> None:
        row = aligned_rows(1, ALIGNMENT)[0]
        row[: len(header)] = memoryview(header)
        if os.pwritev(fd, [row.data], 0) != ALIGNMENT:
            raise OSError(errno.EIO, "short write")


def _can_read_directly(fd: int) -> bool:
    """Some file systems take the flag and refuse the first read."""
    try:
        os.preadv(fd, [aligned_rows(1, ALIGNMENT)[0].data], 0)
    except OSError as error:
        if error.errno in _REFUSES_DIRECT:
            return False
        raise
    return True


def _allocate(fd: int, n_bytes: int) -> None:
    """Give the file its full size, with blocks of the disk behind it where the file system can. Raises `OSError`."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, n_bytes)
    else:
        os.ftruncate(fd, n_bytes)


def lock_folder(folder: Path) -> int:
    """Make `folder` this process's own; the lock ends with the returned descriptor. Raises `ConfigError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot keep KV pages in {folder}: {error.strerror}; choose another folder.") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(fd)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise ConfigError(f"cannot lock {folder}: {error.strerror}; choose a folder on a local disk.") from error
        raise ConfigError(
            f"the KV pages in {folder} are in use by process {owner}; stop it or choose another folder."
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode("ascii"), 0)
    return fd


def owner_of(folder: Path) -> int | None:
    """The process that holds `folder`'s lock, if any."""
    try:
        fd = os.open(folder / LOCK_NAME, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        text = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        return int(text) if text.isdecimal() else None
    finally:
        os.close(fd)
    return None


def remove_store(folder: Path) -> None:
    """Delete the store's files (and no others) from `folder`. Raises `OSError`."""
    from nanoflow.kvcache.slab_index import INDEX_NAME

    for path in [*folder.glob(SLAB_GLOB), folder / INDEX_NAME, folder / (INDEX_NAME + ".new")]:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
