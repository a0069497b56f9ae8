"""Bandwidth of the KV cache's tiers beside the plainest way to move the same bytes on the same machine.

    python benchmarks/kv_tiers.py --folder /mnt/nvme/kv             # SSD tier beside fio, DRAM tier beside memcpy
    python benchmarks/kv_tiers.py --cuda                            # device ↔ pinned DRAM beside one cudaMemcpyAsync

The SSD tier writes and reads whole pages as the engine does: checksums, syncs and index records included. fio gets the
same block size, queue depth, order and O_DIRECT, and syncs nothing. Rounds take turns, so that
whatever else the machine does disturbs both alike; the median and the least of the rounds' ratios are shown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanoflow.kvcache.dram import open_dram
from nanoflow.kvcache.slab_jobs import SlabTransfer
from nanoflow.kvcache.ssd import SsdTier, open_ssd
from nanoflow.kvcache.ssd_io import aligned_rows, open_io
from nanoflow.kvcache.ssd_store import QUEUE_DEPTH
from nanoflow.kvcache.tier import UInt8Array

BATCH_PAGES = 64
BATCHES_UNDER_WAY = 4
TARGETS = {"ssd write": 0.70, "ssd read": 0.70, "ssd randread": 0.70, "offload": 0.85, "reload": 0.85}


def under_way(transfers: Iterator[SlabTransfer]) -> int:
    """Keep several batches under way until the last has ended; the number of pages that went well."""
    waiting: deque[SlabTransfer] = deque()
    n_pages = 0
    for transfer in transfers:
        waiting.append(transfer)
        if len(waiting) == BATCHES_UNDER_WAY:
            n_pages += int(waiting.popleft().result().sum())
    return n_pages + sum(int(transfer.result().sum()) for transfer in waiting)


def rate(run: Callable[[], int], page_bytes: int) -> float:
    """GB/s of `run`, which moves pages and returns how many."""
    started = time.perf_counter()
    n_pages = run()
    return n_pages * page_bytes / (time.perf_counter() - started) / 1e9


class SsdRounds:
    """Writes and reads of a full SSD tier: every round overwrites all of it with new keys."""

    def __init__(self, tier: SsdTier, rows: UInt8Array) -> None:
        self.tier, self.rows = tier, rows
        self.n_batches = tier.capacity_pages // BATCH_PAGES
        self.generations = itertools.count()
        self.keys: list[list[bytes]] = []

    def _rows(self, batch: int) -> UInt8Array:
        """Rows that no other batch under way uses."""
        start = batch * BATCH_PAGES % len(self.rows)
        return self.rows[start : start + BATCH_PAGES]

    def write(self) -> int:
        generation = next(self.generations)
        numbers = range(self.n_batches)
        self.keys = [[f"{generation:6}{batch:6}{i:4}".encode() for i in range(BATCH_PAGES)] for batch in numbers]
        return under_way(self.tier.put_many(self.keys[batch], self._rows(batch)) for batch in numbers)

    def read(self) -> int:
        """As it was written."""
        return under_way(self.tier.get_many(self.keys[batch], self._rows(batch)) for batch in range(self.n_batches))

    def read_at_random(self) -> int:
        """Page by page in any order, which reloads never are: the worst case."""
        keys = [key for batch in self.keys for key in batch]
        random.shuffle(keys)
        batches = [keys[start : start + BATCH_PAGES] for start in range(0, len(keys), BATCH_PAGES)]
        return under_way(self.tier.get_many(batch, self._rows(i)) for i, batch in enumerate(batches))


def fio_rate(folder: Path, mode: str, page_bytes: int, n_bytes: int, engine: str) -> float:
    """GB/s of `fio` (mode `write`, `read` or `randread`) over a file of its own in `folder`."""
    command = [
        *("fio", "--name=kv", f"--filename={folder / 'fio.dat'}", f"--rw={mode}", f"--bs={page_bytes}"),
        *(f"--size={n_bytes // page_bytes * page_bytes}", f"--iodepth={QUEUE_DEPTH}", f"--ioengine={engine}"),
        *("--direct=1", "--overwrite=1", "--output-format=json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"fio failed: {done.stderr.strip() or done.stdout.strip()}")
    return (
        float(json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0][mode.removeprefix("rand")]["bw_bytes"]) / 1e9
    )


def measure_ssd(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    has_fio = shutil.which("fio") is not None
    if not has_fio:
        print("fio is not on PATH: the SSD tier is measured alone. Install fio to compare.")
    folder = Path(tempfile.mkdtemp(prefix="kv-tiers-", dir=args.folder))
    try:
        n_bytes = int(args.gib * 2**30)
        tier = open_ssd(folder / "store", n_bytes, args.page_bytes, "benchmark", io=args.io)
        rows = aligned_rows(BATCH_PAGES * BATCHES_UNDER_WAY * 2, tier.page_bytes)
        rows[:] = np.random.default_rng(0).integers(0, 256, rows.shape, dtype=np.uint8)
        rounds = SsdRounds(tier, rows)
        rounds.write()  # files are made and filled once before anything counts
        if has_fio:
            fio_rate(folder, "write", args.page_bytes, n_bytes, args.fio_engine)
        sides = {"write": rounds.write, "read": rounds.read, "randread": rounds.read_at_random}
        results: dict[str, list[dict[str, float]]] = {f"ssd {mode}": [] for mode in sides}
        for number in range(args.rounds):
            for mode, run in sides.items():
                measured = {"ours": 0.0, "plain": 0.0}
                for side in ("ours", "plain") if number % 2 == 0 else ("plain", "ours"):
                    if side == "ours":
                        measured[side] = rate(run, tier.page_bytes)
                    elif has_fio:
                        measured[side] = fio_rate(folder, mode, args.page_bytes, n_bytes, args.fio_engine)
                results[f"ssd {mode}"].append(measured)
        stats = tier.stats()
        if stats.errors or stats.corrupt_pages:
            sys.exit(f"the tier failed while it was measured: {stats}")
        tier.close()
        return results
    finally:
        shutil.rmtree(folder)


def measure_dram(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    tier = open_dram(int(args.dram_gib * 2**30), args.page_bytes)
    n_pages = min(tier.capacity_pages, 1024)
    host = aligned_rows(n_pages, args.page_bytes)
    host[:] = 1
    plain = aligned_rows(n_pages, args.page_bytes)
    plain[:] = 1
    results: dict[str, list[dict[str, float]]] = {"dram put": [], "dram get": []}

    def memcpy() -> int:
        np.copyto(plain, host)
        return n_pages

    for number in range(args.rounds):
        keys = [f"{number:8}{i:8}".encode() for i in range(n_pages)]
        for name, run in (("put", tier.put_many), ("get", tier.get_many)):

            def ours(run: Callable[[Sequence[bytes], UInt8Array], SlabTransfer] = run, keys: list[bytes] = keys) -> int:
                starts = range(0, n_pages, BATCH_PAGES)
                return under_way(
                    run(keys[start : start + BATCH_PAGES], host[start : start + BATCH_PAGES]) for start in starts
                )

            measured = {"plain": rate(memcpy, args.page_bytes), "ours": rate(ours, args.page_bytes)}
            results[f"dram {name}"].append(measured)
    tier.close()
    return results


def report(results: dict[str, list[dict[str, float]]], plain: dict[str, str]) -> dict[str, Any]:
    """Print a table; the same as plain data."""
    print(f"{'':12} {'ours GB/s':>22} {'plain GB/s':>22}   ratio (median, least)   target")
    summary: dict[str, Any] = {}
    for name, rounds in results.items():
        sides = {side: [measured[side] for measured in rounds] for side in ("ours", "plain")}
        cells = [f"{statistics.median(x):6.2f} ({min(x):.2f}–{max(x):.2f})" for x in sides.values()]
        ratios = [measured["ours"] / measured["plain"] for measured in rounds if measured["plain"]]
        summary[name] = {"rounds_gb_s": rounds, "plain": plain[name]}
        line = f"{name:12} {cells[0]:>22} {cells[1]:>22}"
        if ratios:
            summary[name] |= {"ratio_median": statistics.median(ratios), "ratio_least": min(ratios)}
            line += f"   {statistics.median(ratios):.2f}, {min(ratios):.2f}"
            target = TARGETS.get(name)
            if target:
                met = statistics.median(ratios) >= target
                summary[name] |= {"target": target, "met": met}
                line += f"             {target:.2f} {'met' if met else 'MISSED'}"
        print(f"{line}   beside {plain[name]}")
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="a folder on the disk to measure (default: here)")
    parser.add_argument("--page-bytes", type=int, default=368640, help="bytes of a page (default: SmolLM2-135M's)")
    parser.add_argument("--gib", type=float, default=4.0, help="size of the SSD store, GiB")
    parser.add_argument("--dram-gib", type=float, default=1.0, help="size of the DRAM pool, GiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--io", choices=["auto", "aio", "threads"], default="auto", help="the SSD tier's way of I/O")
    parser.add_argument("--fio-engine", default="io_uring", help="fio's ioengine")
    parser.add_argument("--only", choices=["ssd", "dram"], help="measure one tier")
    parser.add_argument("--cuda", action="store_true", help="measure device ↔ pinned DRAM instead")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    args = parser.parse_args()
    print(f"pages of {args.page_bytes} bytes, queue depth {QUEUE_DEPTH}, {args.rounds} rounds")
    results: dict[str, list[dict[str, float]]] = {}
    if args.cuda:
        from kv_tiers_cuda import measure_cuda

        results = measure_cuda(args.page_bytes, args.dram_gib, args.rounds)
    else:
        io = open_io(QUEUE_DEPTH, args.io)
        print(f"SSD tier through {io.name}, fio through {args.fio_engine}")
        io.close()
        if args.only != "dram":
            results |= measure_ssd(args)
        if args.only != "ssd":
            results |= measure_dram(args)
    plain = {f"ssd {mode}": f"fio --rw={mode}, {args.fio_engine}" for mode in ("write", "read", "randread")}
    plain |= dict.fromkeys(("dram put", "dram get"), "one memcpy")
    plain |= dict.fromkeys(("offload", "reload"), "one cudaMemcpyAsync")
    summary = report(results, plain)
    if args.json:
        settings = {name: str(value) for name, value in vars(args).items() if name not in ("json", "folder")}
        document = {"settings": settings, "queue_depth": QUEUE_DEPTH, "results": summary}
        args.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
