"""The journal beside a job's output: what the job is, and up to where its output is known to be whole and on disk.

A record is a line: CRC-32 of the JSON that follows it, a space, JSON. Records are only ever appended. A kill may tear
the last one, which is then cut off; a broken record before another one means that somebody edited the file, and the
job is refused. The file is locked while a run writes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nanoflow.core.errors import ConfigError

_LOCK_TRIES = 4
_LOCK_PAUSE_S = 0.05


class JobLockedError(ConfigError):
    """Another process runs this job now."""


class Journal:
    """An open, locked journal. Close it to let others run the job."""

    def __init__(self, path: Path) -> None:
        """Open or create. Raises `JobLockedError` while another run has it, `ConfigError` if it cannot be written."""
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}; choose another output.") from None
        if not _lock(self._fd):
            os.close(self._fd)
            raise JobLockedError(f"another run is writing {path}; wait for it, or stop it first.")

    def recover(self) -> Iterator[dict[str, Any]]:
        """Every record, one by one; after the last one the torn end of the file is cut off.

        Raises `ConfigError` for a journal that was edited.
        """
        good = 0
        for record, end in read_records(self.path):
            yield record
            good = end
        os.ftruncate(self._fd, good)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record and wait until it is on disk. After an `OSError` nothing of it is left."""
        size = os.fstat(self._fd).st_size
        try:
            write_all(self._fd, _encode(record))
            os.fsync(self._fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, size)
            raise

    def clear(self) -> None:
        """Forget everything."""
        os.ftruncate(self._fd, 0)

    def close(self) -> None:
        """Give the lock back."""
        os.close(self._fd)


def read_records(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each whole record with the offset after it. Raises `ConfigError` if something whole follows a broken one."""
    try:
        with path.open("rb") as file:
            end, broken_at = 0, None
            for raw in file:
                record = _decode(raw)
                if record is None:
                    broken_at = end if broken_at is None else broken_at
                elif broken_at is not None:
                    raise ConfigError(
                        f"{path} is damaged at byte {broken_at}; restore it from a copy, or begin again with --restart."
                    )
                end += len(raw)
                if record is not None:
                    yield record, end
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; check its permissions.") from None


def _lock(fd: int) -> bool:
    """Take the lock; tried again for a moment, since `is_locked` may be looking just now."""
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(_LOCK_PAUSE_S)
        else:
            return True
    return False


def is_locked(path: Path) -> bool:
    """Whether a run has the journal now."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        return False


def write_all(fd: int, data: bytes) -> None:
    """`os.write` until everything is written."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _encode(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _decode(raw: bytes) -> dict[str, Any] | None:
    checksum, _, text = raw[:-1].partition(b" ")
    if not raw.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        return None
    record = json.loads(text)
    return record if isinstance(record, dict) else None
