"""The folder that a user names for KV pages holds a store for each model, page layout and rank; this names them."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from nanoflow.core.errors import ConfigError
from nanoflow.kvcache.slab_index import INDEX_NAME

ABOUT_NAME = "about.txt"


def store_folder(path: Path, layout: str) -> Path:
    """The store of one layout within the folder that the user named, made if it is not there.

    Raises `ConfigError` if it cannot be made.
    """
    folder = path.expanduser() / hashlib.sha256(layout.encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ABOUT_NAME).write_text(layout + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"kv_ssd_path {path} cannot be used ({error.strerror}); name another folder.") from error
    return folder


def rank_layout(layout: str, rank: int, n_ranks: int) -> str:
    """The layout of one rank's part of the pages: another one for every rank and number of ranks."""
    return layout if n_ranks == 1 else f"{layout}, rank {rank} of {n_ranks}"


def stores_in(path: Path) -> list[Path]:
    """All stores in the folder that the user named, or the folder itself if it is one. `ConfigError` without any."""
    found = [folder.parent for folder in sorted([*path.glob(f"*/{INDEX_NAME}"), *path.glob(INDEX_NAME)])]
    if not found:
        raise ConfigError(f"{path} holds no KV pages; name the folder that kv_ssd_path names.")
    return found


def about(store: Path) -> str:
    """What a store's pages are of, in a line; it says nothing about whether they are usable."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return (store / ABOUT_NAME).read_text(encoding="utf-8").strip()
    return "unknown"


def remove_about(store: Path) -> None:
    """After a store was removed: the note on it."""
    with contextlib.suppress(OSError):
        (store / ABOUT_NAME).unlink(missing_ok=True)
