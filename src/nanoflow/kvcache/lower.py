"""The tiers below the device: what goes down to them, what comes back, and who has to wait for what.

Pages go down by write-back: when a request lets go of its pages, copies start under computation, to DRAM and from there
to the SSD, so that a page can be evicted above at once. They come back ahead of admission: from the SSD to DRAM while
their request is still queued, from DRAM to the device when it is admitted. Nothing here waits (but `wait` and `close`);
`poll` takes note of what has ended.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from nanoflow.core.batch import Int32Array
from nanoflow.core.stats import TierFill
from nanoflow.kvcache.mover import PageMover
from nanoflow.kvcache.pages import PagePool
from nanoflow.kvcache.policy import GUESSED_READ_BYTES_PER_S, Bandwidth, ReloadPolicy
from nanoflow.kvcache.slab_jobs import PoolRows
from nanoflow.kvcache.tier import MemoryTier, Tier, Transfer
from nanoflow.kvcache.transfers import Fetch, Offload, Reload, Write

WRITE_PAGES = 128
"""Pages handed to the SSD at a time; the next ones wait until these are written."""
POLL_S = 0.0005


def _nothing_waits() -> bool:
    return True


class LowerTiers:
    """DRAM, and perhaps an SSD, below the pages of `pool`. Called by the engine's thread alone.

    Sequences of keys are in chain order; `first_page` is the place of the first one in its sequence. Where work waits
    for the next batch to be handed on, as to other ranks, `flush` hands it on without one; False: nobody is there.
    """

    def __init__(
        self,
        pool: PagePool,
        mover: PageMover,
        dram: MemoryTier,
        ssd: Tier | None,
        policy: ReloadPolicy,
        flush: Callable[[], bool] = _nothing_waits,
    ) -> None:
        self.dram = dram
        self.ssd = ssd
        self._pool = pool
        self._mover = mover
        self._policy = policy
        self._flush = flush
        self._offloads: list[Offload] = []
        self._reloads: list[Reload] = []
        self._fetches: list[Fetch] = []
        self._write: Write | None = None
        self._unwritten: deque[tuple[list[bytes], list[bytes]]] = deque()  # (chain, keys) to write to the SSD
        self._arriving: set[bytes] = set()  # keys with a reserved slot in DRAM
        self._fetching: set[bytes] = set()  # those of them that the SSD brings
        self._reloading: set[bytes] = set()
        self._from_ssd: set[bytes] = set()  # keys that the SSD brought to DRAM and nobody has used yet
        self.reload_wait_s = 0.0  # from the start to the end of every fetch and reload, summed
        self._closed = False
        self._abandoned = False
        self.stats = self._take_stats()
        """Of the last `poll`, one entry a tier from DRAM down; may be read from any thread."""

    # --- down ---

    def offload(self, keys: list[bytes], pages: Int32Array) -> None:
        """Copy to DRAM what is not there. The caller holds the pages now; while they are copied they are held here."""
        if self._abandoned:
            return
        known = self.dram.contains(keys)
        wanted = [i for i in np.flatnonzero(~known).tolist() if keys[i] not in self._arriving]
        if not wanted or not self._policy.pays(wanted[0], len(wanted), self._reload_bandwidth()):
            self.dram.touch(keys)
            return
        new = [keys[i] for i in wanted]
        slots = self._reserve(keys, new)
        if not len(slots):
            return
        new, held = new[: len(slots)], pages[wanted[: len(slots)]]
        self._pool.share(held)
        self._offloads.append(Offload(keys, new, held, self._mover.offload(held, slots)))

    def _reserve(self, chain: Sequence[bytes], keys: list[bytes]) -> npt.NDArray[np.int64]:
        """DRAM slots for the first of `keys`; room is not made by dropping other pages of their own chain."""
        self.dram.pin(chain)
        slots = self.dram.reserve(keys)
        self.dram.unpin(chain)
        self._arriving.update(keys[: len(slots)])
        return slots

    # --- back ---

    def held(self, keys: Sequence[bytes], first_page: int) -> int:
        """How many of `keys`, from the first one on, can and should come from DRAM now."""
        count = _leading(self.dram.contains(keys)) if len(keys) else 0
        return count if count and self._policy.pays(first_page, count, self._reload_bandwidth()) else 0

    def reload(self, keys: list[bytes], pages: Int32Array) -> Reload:
        """Bring `keys`, just found by `held`, to `pages`, which the caller holds and which are held here meanwhile."""
        slots = self.dram.pin(keys)
        assert (slots >= 0).all(), "only pages in DRAM can be reloaded"
        self._pool.share(pages)
        self._reloading.update(keys)
        reload = Reload(keys, pages, self._mover.reload(slots, pages), time.monotonic())
        self._reloads.append(reload)
        return reload

    def fetch(self, keys: list[bytes], first_page: int) -> bool:
        """Start to bring what follows the device's pages from the SSD to DRAM, where that pays; whether it did."""
        if self.ssd is None or not keys:
            return False
        in_dram = self.dram.contains(keys)
        count = _leading(in_dram | self.ssd.contains(keys))
        wanted = [keys[i] for i in np.flatnonzero(~in_dram[:count]).tolist() if keys[i] not in self._arriving]
        if not wanted or not self._policy.pays(first_page, count, self._read_bandwidth(), self._reload_bandwidth()):
            return False
        slots = self._reserve(keys, wanted)
        if len(slots):
            wanted = wanted[: len(slots)]
            rows = PoolRows(self.dram.pool, slots)
            self._fetching.update(wanted)
            self._fetches.append(Fetch(keys, wanted, self.ssd.get_many(wanted, rows), time.monotonic()))
        return bool(len(slots))

    def on_its_way(self, key: bytes) -> bool:
        """Whether a page is coming to DRAM or to the device right now."""
        return key in self._reloading or key in self._fetching

    # --- what has ended ---

    @property
    def busy(self) -> bool:
        """Whether pages of the device are being copied."""
        return bool(self._offloads or self._reloads)

    @property
    def brings_pages(self) -> bool:
        """Whether any page is on its way up."""
        return bool(self._fetching or self._reloading)

    @property
    def has_writes(self) -> bool:
        """Whether pages are still to be written to the SSD; `poll` goes on with it."""
        return self._write is not None or bool(self._unwritten)

    def pages_coming(self) -> int:
        """Pages of the device that are free as soon as their copies have ended."""
        moving = [*(one.pages for one in self._offloads), *(one.pages for one in self._reloads)]
        return sum(int(np.count_nonzero(self._pool.references(pages) == 1)) for pages in moving)

    def poll(self) -> None:
        """Take note of transfers that have ended and start the next write to the SSD."""
        self._offloads = [one for one in self._offloads if not self._ended(one)]
        self._reloads = [one for one in self._reloads if not self._arrived(one)]
        self._fetches = [one for one in self._fetches if not self._fetched(one)]
        if self.ssd is not None:
            self._write_back(self.ssd)
        self.stats = self._take_stats()

    def wait(self, limit_s: float = 0.002) -> None:
        """Give transfers a moment, at most `limit_s`: the device has nothing else to do."""
        self._flush()
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and not any(transfer.poll() for transfer in self._transfers()):
            time.sleep(POLL_S)

    def abandon(self) -> None:
        """The device has failed: ask nothing of it any more. What the SSD has stays."""
        self._abandoned = True

    def close(self) -> None:
        """Finish all copies, write what the SSD does not have yet, close the tiers. Idempotent."""
        if self._closed:
            return
        self._closed = True
        while not self._abandoned and (self._offloads or self._reloads or self._fetches or self.has_writes):
            if not self._flush():
                self._abandoned = True
                break
            for transfer in list(self._transfers()):
                transfer.result()
            self.poll()
        if self.ssd is not None:
            self.ssd.close()
        if self._abandoned:  # copies may still write to the pool: it stays until the process ends
            return
        self._mover.close()
        self.dram.close()

    def _take_stats(self) -> tuple[TierFill, ...]:
        """One entry a tier, from DRAM down. What passes between device and DRAM is counted by who copies it."""
        moved = self._mover.stats
        traffic = [(moved.reloaded_bytes, moved.reload_s, moved.offloaded_bytes, moved.offload_s)]
        tiers: list[Tier] = [self.dram]
        if self.ssd is not None:
            stats = self.ssd.stats()
            tiers.append(self.ssd)
            traffic.append((stats.read_bytes, stats.read_s, stats.written_bytes, stats.write_s))
        return tuple(_fill(tier, *numbers) for tier, numbers in zip(tiers, traffic, strict=True))

    # --- parts ---

    def _transfers(self) -> Iterator[Transfer]:
        for group in (self._offloads, self._reloads, self._fetches):
            yield from (one.transfer for one in group)
        if self._write is not None:
            yield self._write.transfer

    def _ended(self, offload: Offload) -> bool:
        if not offload.transfer.poll():
            return False
        self._arrive(offload.keys, offload.transfer)
        self._pool.release(offload.pages)
        self.dram.touch(offload.chain)
        if self.ssd is not None:
            self._unwritten.append((offload.chain, offload.keys))
        return True

    def _fetched(self, fetch: Fetch) -> bool:
        if not fetch.transfer.poll():
            return False
        whole = self._arrive(fetch.keys, fetch.transfer)
        self._from_ssd.update(whole)
        if len(self._from_ssd) > self.dram.capacity_pages:  # some were evicted before anybody used them
            self._from_ssd = {key for key in self._from_ssd if self.dram.contains([key])[0]}
        self._fetching.difference_update(fetch.keys)
        self.reload_wait_s += time.monotonic() - fetch.started_s
        self.dram.touch(fetch.chain)
        return True

    def _arrive(self, keys: list[bytes], transfer: Transfer) -> list[bytes]:
        """Settle the reserved slots of `keys`; returns those whose pages are whole."""
        whole = transfer.result()
        good = [key for key, is_good in zip(keys, whole.tolist(), strict=True) if is_good]
        self.dram.commit(good)
        self.dram.cancel([key for key, is_good in zip(keys, whole.tolist(), strict=True) if not is_good])
        self._arriving.difference_update(keys)
        return good

    def _arrived(self, reload: Reload) -> bool:
        if not reload.transfer.poll():
            return False
        self.dram.unpin(reload.keys)
        self._reloading.difference_update(reload.keys)
        count = _leading(reload.transfer.result())
        # Whoever asked may be gone: the pages are named and kept all the same.
        self._pool.release(reload.pages[count:])
        self._pool.release(self._pool.adopt(reload.keys[:count], reload.pages[:count]))
        from_ssd = self._from_ssd.intersection(reload.keys)
        self._from_ssd -= from_ssd
        self.reload_wait_s += time.monotonic() - reload.started_s
        reload.n_whole, reload.n_from_ssd = count, len(from_ssd.intersection(reload.keys[:count]))
        return True

    def _write_back(self, ssd: Tier) -> None:
        if self._write is not None:
            if not self._write.transfer.poll():
                return
            self._write.transfer.result()
            self.dram.unpin(self._write.keys)
            ssd.touch(self._write.chain)
            self._write = None
        while self._unwritten and self._write is None:
            chain, keys = self._unwritten.popleft()
            known = ssd.contains(keys)
            keys = [key for key, is_known in zip(keys, known.tolist(), strict=True) if not is_known]
            if not keys or not self._policy.pays(0, len(chain), self._read_bandwidth(), self._reload_bandwidth()):
                continue
            if len(keys) > WRITE_PAGES:
                self._unwritten.appendleft((chain, keys[WRITE_PAGES:]))
                keys = keys[:WRITE_PAGES]
            slots = self.dram.pin(keys)
            held = [key for key, slot in zip(keys, slots.tolist(), strict=True) if slot >= 0]
            if held:
                rows = PoolRows(self.dram.pool, slots[slots >= 0])
                self._write = Write(chain, held, ssd.put_many(held, rows))

    def _reload_bandwidth(self) -> Bandwidth:
        stats = self._mover.stats
        return Bandwidth(stats.reloaded_bytes, stats.reload_s, self._policy.guessed_copy_bytes_per_s)

    def _read_bandwidth(self) -> Bandwidth:
        assert self.ssd is not None
        stats = self.ssd.stats()
        return Bandwidth(stats.read_bytes, stats.read_s, GUESSED_READ_BYTES_PER_S)


def _fill(tier: Tier, read_bytes: int, read_s: float, written_bytes: int, write_s: float) -> TierFill:
    stats = tier.stats()
    return TierFill(
        tier.name,
        stats.pages,
        stats.capacity_pages,
        read_bytes,
        read_s,
        written_bytes,
        write_s,
        stats.evicted_pages,
        stats.corrupt_pages,
        stats.errors,
    )


def _leading(flags: npt.NDArray[np.bool_]) -> int:
    """How many flags, from the first on, are set."""
    return len(flags) if flags.all() else int(flags.argmin())
