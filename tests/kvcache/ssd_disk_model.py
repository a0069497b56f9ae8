"""A disk that loses power: records what the SSD tier does to its files, and lays out what may be left after any step.

Until a file is synced, each write to it may be on the disk, or not, or in part; until its folder is synced, so may the
creation and renaming of files (in order). That is less than real file systems promise.
"""

from __future__ import annotations

import os
import random
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@dataclass
class _File:
    durable: bytes = b""
    pending: list[tuple[int, bytes]] = field(default_factory=list)

    def after_a_crash(self, choose: random.Random) -> bytes:
        content = bytearray(self.durable)
        for offset, data in self.pending:
            part = choose.choice([0, len(data), choose.randint(0, len(data))])
            _overwrite(content, offset, data[:part])
        return bytes(content)


def _overwrite(content: bytearray, offset: int, data: bytes) -> None:
    if data:
        content.extend(bytes(max(0, offset + len(data) - len(content))))
        content[offset : offset + len(data)] = data


class RecordedDisk:
    """Watches a folder through patched calls of `os`; `events` are what happened, in order."""

    def __init__(self, folder: Path, patched: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.events: list[tuple[str, Any, Any, Any]] = []
        self._lock = threading.Lock()
        self._ids: dict[int, int] = {}  # inode → file; inodes are used again
        self._next_id = 0
        self.folder_id = self._id(folder.stat().st_ino)
        real = {name: getattr(os, name) for name in ("pwrite", "pwritev", "fsync", "fdatasync", "ftruncate")}
        real |= {name: getattr(os, name) for name in ("posix_fallocate", "open", "rename")}

        def pwrite(fd: int, data: bytes, offset: int) -> int:
            self._add("write", self._id_of(fd), offset, bytes(data))
            return int(real["pwrite"](fd, data, offset))

        def pwritev(fd: int, buffers: list[memoryview], offset: int) -> int:
            self._add("write", self._id_of(fd), offset, b"".join(buffers))
            return int(real["pwritev"](fd, buffers, offset))

        def sync(name: str, fd: int) -> None:
            real[name](fd)  # first: what is written meanwhile by another thread may not be covered
            self._add("sync", self._id_of(fd), None, None)

        def posix_fallocate(fd: int, offset: int, n_bytes: int) -> None:
            real["posix_fallocate"](fd, offset, n_bytes)
            self._add("write", self._id_of(fd), offset, bytes(n_bytes))

        def open_file(path: Any, flags: int, *mode: Any, **options: Any) -> int:
            fd = int(real["open"](path, flags, *mode, **options))
            if flags & os.O_CREAT and Path(path).parent == folder:
                self._add("create", Path(path).name, self._id(os.fstat(fd).st_ino), None)
            return fd

        def rename(source: Any, target: Any, **options: Any) -> None:
            real["rename"](source, target, **options)
            self._add("rename", Path(source).name, Path(target).name, None)

        patched.setattr(os, "pwrite", pwrite)
        patched.setattr(os, "pwritev", pwritev)
        patched.setattr(os, "fsync", lambda fd: sync("fsync", fd))
        patched.setattr(os, "fdatasync", lambda fd: sync("fdatasync", fd))
        patched.setattr(os, "posix_fallocate", posix_fallocate)
        patched.setattr(os, "open", open_file)
        patched.setattr(os, "rename", rename)

    def _id(self, inode: int) -> int:
        """A new number for the file that has this inode now."""
        self._ids[inode] = self._next_id = self._next_id + 1
        return self._ids[inode]

    def _id_of(self, fd: int) -> int:
        return self._ids[os.fstat(fd).st_ino]

    def note(self, what: Any) -> None:
        """Something that the test wants to know of a moment."""
        self._add("note", what, None, None)

    def _add(self, *event: Any) -> None:
        with self._lock:
            self.events.append(event)  # type: ignore[arg-type]

    def lay_out(self, n_events: int, target: Path, choose: random.Random) -> None:
        """What may be left in the folder if the power fails after the first `n_events` events."""
        files: dict[int, _File] = {}
        names: dict[str, int] = {}
        pending_names: list[tuple[str, str, Any]] = []
        for kind, first, second, third in self.events[:n_events]:
            if kind == "write":
                files.setdefault(first, _File()).pending.append((second, third))
            elif kind in ("create", "rename"):
                pending_names.append((kind, first, second))
            elif kind == "sync" and first == self.folder_id:
                _apply_names(names, pending_names)
                pending_names = []
            elif kind == "sync":
                file = files.setdefault(first, _File())
                content = bytearray(file.durable)
                for offset, data in file.pending:
                    _overwrite(content, offset, data)
                files[first] = _File(bytes(content))
        _apply_names(names, pending_names[: choose.randint(0, len(pending_names))])
        target.mkdir()
        for name, number in names.items():
            (target / name).write_bytes(files.get(number, _File()).after_a_crash(choose))


def _apply_names(names: dict[str, int], steps: list[tuple[str, str, Any]]) -> None:
    for kind, first, second in steps:
        if kind == "create":
            names[first] = second
        elif first in names:
            names[second] = names.pop(first)
