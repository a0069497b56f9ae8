"""The SSD tier: pages in slab files, with an index that survives a restart and any crash.

Bookkeeping and threads are those of `kvcache/slab_tier.py`; here what the books say is carried to the files of
`kvcache/ssd_store.py`. docs/kv-cache.md says what is promised after a crash.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanoflow.core.errors import ConfigError
from nanoflow.core.log import get_logger
from nanoflow.kvcache.slab_index import Entry
from nanoflow.kvcache.slab_jobs import Carrier, Job
from nanoflow.kvcache.slab_table import Int64Array, SlotTable
from nanoflow.kvcache.slab_tier import SlabTier
from nanoflow.kvcache.ssd_store import SsdStore, open_store
from nanoflow.kvcache.tier import UInt8Array, slot_bytes_of

log = get_logger(__name__)


class SsdTier(SlabTier):
    """See `Tier`; made by `open_ssd`. `entries` are those pages of the store that count, oldest first."""

    name = "ssd"

    def __init__(self, store: SsdStore, entries: Sequence[Entry], writer: Carrier, reader: Carrier) -> None:
        self._store = store
        table = SlotTable(store.n_slots)
        table.restore([(entry.key, entry.slot) for entry in entries])
        super().__init__(str(store.folder), store.page_bytes, table, writer, reader)

    def _job(self, keys: Sequence[bytes], slots: Int64Array, rows: Sequence[UInt8Array]) -> Job:
        return self._store.job(keys, slots, rows)

    def _stored(self, slots: Int64Array, checksums: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
        self._store.stored(slots, checksums)

    def _not_stored(self, slots: Int64Array) -> None:
        self._retire(self._store.without_room(slots))

    def _retire(self, full: Sequence[range]) -> None:
        """Where the disk has no room for a file, go on without its slots."""
        before = self._table.n_usable
        for slots in full:
            if not self._table.retired.issuperset(slots):
                self._table.retire(slots)
        if self._table.n_usable < before:
            log.warning("%s: no room for more; the SSD tier stays at %d pages", self._where, self._table.n_usable)

    def _forgotten(self, slots: Sequence[int]) -> None:
        """Mark the slots empty on disk; the writer does so before anything else is written to them."""
        self._writer.submit(self._store.job((), np.zeros(0, dtype=np.int64), (), slots))

    def _closed(self) -> None:
        """Write down the order of use, and give the folder back."""
        self._store.close(list(self._table.items_oldest_first()))


def open_ssd(
    folder: Path, capacity_bytes: int, page_bytes: int, layout: str, *, io: str = "auto", direct: bool = True
) -> SsdTier:
    """An SSD tier in `folder`, made if it is not there, with at most `capacity_bytes` of page slots.

    `layout` names all that a page's bytes depend on; a store made under another one is dropped. `io` is `auto`, `aio`
    or `threads`; `direct` says whether to bypass the page cache where possible. Raises `ConfigError` if the folder
    cannot be used, belongs to another process, or the limit is below one page.
    """
    n_slots = capacity_bytes // slot_bytes_of(page_bytes)
    if n_slots < 1:
        raise ConfigError(f"an SSD tier of {capacity_bytes} bytes holds no page of {page_bytes}; raise its size.")
    store = open_store(folder, n_slots, page_bytes, layout, io=io, direct=direct)
    return SsdTier(store, store.entries, store.writer, store.reader)
