"""One pass over the input before the job begins: its fingerprint, how many requests, which ids were used before.

The fingerprint lets a second run refuse a file that was changed in between. Ids are compared by 128-bit hash, spread
over buckets on disk, so that memory stays the same for any number of lines.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from nanoflow.batch.lines import raw_lines
from nanoflow.core.errors import ConfigError

_N_BUCKETS = 64
_BUCKET_BUFFER_BYTES = 1 << 16
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("line", "<u8")])
_LINES_BETWEEN_CALLS = 20_000
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Survey:
    """What the input holds. `repeated` are the lines whose custom_id an earlier line has, in order."""

    n_lines: int
    n_requests: int
    n_bytes: int
    sha256: str
    repeated: list[int] = field(default_factory=list)


def survey(path: Path, on_progress: Callable[[int], None] | None = None) -> Survey:
    """Read the whole input once. `on_progress` is told the lines read. Raises `ConfigError` if it cannot be read."""
    ids = RepeatedIds()
    number = n_requests = 0
    try:
        for number, raw in raw_lines(path):
            if raw is None:
                n_requests += 1
            elif not raw.isspace():
                n_requests += 1
                custom_id = _custom_id(raw)
                if custom_id is not None:
                    ids.add(custom_id, number)
            if on_progress is not None and number % _LINES_BETWEEN_CALLS == 0:
                on_progress(number)
        n_bytes, sha256 = fingerprint(path)
        return Survey(number, n_requests, n_bytes, sha256, sorted(ids.repeated()))
    finally:
        ids.close()


def fingerprint(path: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a file. Raises `ConfigError` if it cannot be read."""
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}; check the path.") from None
    return size, digest.hexdigest()


def _custom_id(raw: bytes) -> str | None:
    try:
        entry = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    custom_id = entry.get("custom_id") if isinstance(entry, dict) else None
    return custom_id if isinstance(custom_id, str) else None


class RepeatedIds:
    """Finds ids that occur again, with memory for one bucket of them (a 64th) at a time."""

    def __init__(self) -> None:
        self._buffers = [bytearray() for _ in range(_N_BUCKETS)]
        self._files: list[IO[bytes] | None] = [None] * _N_BUCKETS

    def add(self, custom_id: str, line: int) -> None:
        """Note that `line` has `custom_id`; lines come in rising order."""
        digest = hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        bucket = digest[0] % _N_BUCKETS
        buffer = self._buffers[bucket]
        buffer += digest + line.to_bytes(8, "little")
        if len(buffer) >= _BUCKET_BUFFER_BYTES:
            self._spill(bucket)

    def repeated(self) -> Iterator[int]:
        """Lines whose id an earlier line has, bucket by bucket."""
        for bucket in range(_N_BUCKETS):
            records = np.frombuffer(self._read(bucket), dtype=_RECORD)
            order = np.lexsort((records["line"], records["low"], records["high"]))
            ordered = records[order]
            same = (ordered["high"][1:] == ordered["high"][:-1]) & (ordered["low"][1:] == ordered["low"][:-1])
            yield from ordered["line"][1:][same].tolist()

    def close(self) -> None:
        """Delete the buckets on disk."""
        for file in self._files:
            if file is not None:
                file.close()

    def _spill(self, bucket: int) -> None:
        file = self._files[bucket]
        if file is None:
            file = self._files[bucket] = tempfile.TemporaryFile(buffering=0, prefix="nanoflow-")  # noqa: SIM115
        file.write(self._buffers[bucket])
        self._buffers[bucket].clear()

    def _read(self, bucket: int) -> bytes:
        file = self._files[bucket]
        if file is None:
            return bytes(self._buffers[bucket])
        file.write(self._buffers[bucket])
        file.seek(0)
        return file.read()
