"""The tiers of a rank other than 0: a pool, a store, and no say in what goes where (see `kvcache/rank_link.py`)."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanoflow.core.batch import Int32Array
from nanoflow.core.errors import NanoflowError
from nanoflow.kvcache.dram import open_pool
from nanoflow.kvcache.mover import PageMover
from nanoflow.kvcache.rank_link import NO_SLOTS, Carried, Copied, Held, TiersToOpen, joined, split
from nanoflow.kvcache.slab_jobs import Job, PoolRows, Worker
from nanoflow.kvcache.slab_table import Int64Array
from nanoflow.kvcache.ssd_folders import rank_layout, store_folder
from nanoflow.kvcache.ssd_store import SsdStore, open_store
from nanoflow.kvcache.tier import Transfer, UInt8Array

_NO_KEY = b""


class RankTiers:
    """Carries out rank 0's commands, called by one thread.

    `answer` gets the number of a command and what became of it, `fail` an error of the device; any thread calls them.
    """

    def __init__(
        self,
        rank: int,
        mover: PageMover,
        answer: Callable[[int, Any], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        self._rank, self._mover, self._answer, self._fail = rank, mover, answer, fail
        self._pool: UInt8Array | None = None
        self._store: SsdStore | None = None
        self._numbers: dict[int, int] = {}  # command of each job under way, by the job's id
        self._copies: queue.SimpleQueue[tuple[int, Transfer]] = queue.SimpleQueue()
        self._acts: dict[str, Callable[..., None]] = {
            "copy": self._copy,
            "offload": self._offload,
            "reload": self._reload,
            "write": self._write,
            "read": self._read,
            "keep": self._keep,
            "page_bytes": self._page_bytes,
            "open": self._open,
        }

    def carry_out(self, commands: Iterable[tuple[int, str, tuple[Any, ...]]]) -> None:
        """Begin these commands, in order: (number, kind, values). Waits for none but opening."""
        for number, kind, values in commands:
            self._acts[kind](number, *values)

    def close(self) -> None:
        """Finish what the store has to write and give its folder back. The pool ends with the process."""
        if self._store is not None:
            self._store.shut()

    # --- opening ---

    def _page_bytes(self, number: int) -> None:
        self._answer(number, self._mover.page_bytes)

    def _open(self, number: int, wanted: TiersToOpen) -> None:
        try:
            held = self._open_store(wanted)
            mover = self._mover
            self._pool = open_pool(
                wanted.n_dram, mover.page_bytes, pin=mover.pin if mover.pins else None, node=mover.node
            )
        except NanoflowError as error:  # the user's to mend: rank 0 says so and ends all
            self._answer(number, error)
            return
        mover.attach(self._pool)
        here = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        threading.Thread(target=self._wait_for_copies, args=(here,), name="kv-copies", daemon=True).start()
        self._answer(number, held)

    def _open_store(self, wanted: TiersToOpen) -> Held:
        if wanted.ssd_path is None:
            return Held(NO_SLOTS, b"")
        layout = rank_layout(wanted.layout, self._rank, wanted.n_ranks)
        folder = store_folder(Path(wanted.ssd_path), layout)
        store = self._store = open_store(folder, wanted.n_ssd, self._mover.page_bytes, layout)
        store.writer.on_end = partial(self._carried, store, store.writer)
        store.reader.on_end = partial(self._carried, store, store.reader)
        slots = np.array([entry.slot for entry in store.entries], dtype=np.int64)
        return Held(slots, joined([entry.key for entry in store.entries]))

    def _keep(self, number: int, kept: Int64Array) -> None:
        assert self._store is not None, "rank 0 has one"
        dropped = {entry.slot for entry in self._store.entries}.difference(kept.tolist())
        self._store.writer.submit(self._store.job((), NO_SLOTS, (), sorted(dropped)))

    # --- device and pool ---

    def _copy(self, number: int, sources: Int32Array, targets: Int32Array) -> None:
        self._mover.copy(sources, targets)

    def _offload(self, number: int, pages: Int32Array, slots: Int64Array) -> None:
        self._copies.put((number, self._mover.offload(pages, slots)))

    def _reload(self, number: int, slots: Int64Array, pages: Int32Array) -> None:
        self._copies.put((number, self._mover.reload(slots, pages)))

    def _wait_for_copies(self, device: int | None) -> None:
        """A thread's work; copies end in the order in which they began."""
        try:
            if device is not None:
                torch.cuda.set_device(device)  # else waiting could make a context on the first GPU
            while True:
                number, transfer = self._copies.get()
                whole = transfer.result()
                self._answer(number, Copied(None if whole.all() else whole, replace(self._mover.stats)))
        except BaseException as error:
            self._fail(error)

    # --- pool and store ---

    def _write(self, number: int, keys: bytes, slots: Int64Array, places: Int64Array, forgotten: list[int]) -> None:
        assert self._store is not None and self._pool is not None, "rank 0 has both"
        job = self._store.job(split(keys), slots, PoolRows(self._pool, places), forgotten)
        self._numbers[id(job)] = number
        self._store.writer.submit(job)

    def _read(self, number: int, slots: Int64Array, places: Int64Array) -> None:
        assert self._store is not None and self._pool is not None, "rank 0 has both"
        job = self._store.job([_NO_KEY] * len(slots), slots, PoolRows(self._pool, places))
        self._numbers[id(job)] = number
        self._store.reader.submit(job)

    def _carried(self, store: SsdStore, worker: Worker, job: Job) -> None:
        """A thread of the store has done `job`."""
        number = self._numbers.pop(id(job), None)
        if number is None:
            return  # nobody waits for it
        good, full = job.codes == 0, []
        if worker is store.writer:
            store.stored(job.slots[good], job.checksums[good])
            full = store.without_room(job.slots[~good])
        self._answer(number, Carried(None if good.all() else job.codes, worker.n_bytes, worker.busy_s, full))
