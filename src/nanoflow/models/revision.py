"""Tells one state of a model's files from another without reading all of them.

Cached keys and values must never meet other weights than those that made them. A file counts as the same while its
name, size, time of change and first and last 64 KiB are; a copy with a new time merely starts with an empty cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

_SAMPLE_BYTES = 64 << 10
_WEIGHTS = (".safetensors", ".gguf", ".json")


def folder_revision(folder: Path) -> str:
    """Hex digest of the configuration and weights in `folder`."""
    return file_revision(sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS))


def file_revision(paths: Sequence[Path]) -> str:
    """Hex digest of these files' names, sizes, times and samples of their contents."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, status.st_size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
