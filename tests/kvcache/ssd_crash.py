"""Kills a process with SIGKILL at random moments of its work on an SSD tier, and looks at what it left behind.

    python -m tests.kvcache.ssd_crash --operations 10000 --folder /tmp/crash

Children are forked from a process that has loaded everything and has one thread, so a life costs milliseconds. A child
does random puts, gets, evictions and reopenings, and writes to a pipe what it is about to do and what the tier holds
when nothing is under way. After it is killed, another child opens the store, reads every key, and compares: every page
is whole or absent, and what the tier held at the last quiet moment is there, but for what the unfinished operation may
have evicted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tests.kvcache.ssd_pages import keys_of, open_small, pages_of, read_all

N_PAGES, PAGE_BYTES = 48, 12000
EVERY_KEY = keys_of(range(120))


def work(folder: Path, seed: int, tell: Callable[[Any], None]) -> None:
    """Random operations until killed."""
    choose = random.Random(seed)
    io = choose.choice(["auto", "threads"])
    tier = open_small(folder, N_PAGES, PAGE_BYTES, io=io)
    while True:
        keys = choose.sample(EVERY_KEY, choose.randint(1, 12))
        kind = choose.choices(["put", "get", "evict", "reopen"], [70, 20, 8, 2])[0]
        tell({"operation": kind, "may_cost": 0 if kind in ("get", "reopen") else len(keys)})
        if kind == "put":
            for transfer in [tier.put_many(part, pages_of(part, PAGE_BYTES)) for part in (keys[:4], keys[4:])]:
                transfer.result()
        elif kind == "get":
            read_all(tier, keys)
        elif kind == "evict":
            tier.evict(keys)
        else:
            tier.close()
            tier = open_small(folder, N_PAGES, PAGE_BYTES, io=io)
        tell({"held": np.flatnonzero(tier.contains(EVERY_KEY)).tolist()})


def inspect(folder: Path, expected: set[int], may_cost: int, tell: Callable[[Any], None]) -> None:
    """Open what a killed child left and hold it against what it had said."""
    tier = open_small(folder, N_PAGES, PAGE_BYTES)
    served = {int.from_bytes(key, "big") for key in read_all(tier, EVERY_KEY)}
    lost = expected - served
    assert len(lost) <= may_cost, f"lost {len(lost)} pages, the unfinished operation may have cost {may_cost}"
    tell({"served": len(served), "evicted": len(lost), "refused": tier.stats().corrupt_pages})
    tier.close()


def fork(act: Callable[[Callable[[Any], None]], None]) -> tuple[int, int]:
    """Run `act` in a child; (its process id, the end of the pipe that it tells to)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    status = 1
    try:
        os.close(reading)
        act(lambda message: _write_line(writing, message))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _write_line(fd: int, message: Any) -> None:
    os.write(fd, (json.dumps(message) + "\n").encode())


def _lines(fd: int) -> list[Any]:
    with os.fdopen(fd, "rb") as pipe:
        data = pipe.read()
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


def one_life(folder: Path, seed: int, choose: random.Random) -> dict[str, int]:
    """A child that works, is killed, and is inspected; counts of what happened. Raises on any wrong page."""
    child, pipe = fork(lambda tell: work(folder, seed, tell))
    time.sleep(choose.expovariate(1 / 0.08))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    told = _lines(pipe)
    assert os.WIFSIGNALED(status), "the child failed before it was killed"
    quiet = [i for i, message in enumerate(told) if "held" in message]
    if not quiet:
        return {"kills": 1, "operations": len(told)}
    unfinished = told[quiet[-1] + 1 :]
    expected, may_cost = set(told[quiet[-1]]["held"]), sum(message["may_cost"] for message in unfinished)
    child, pipe = fork(lambda tell: inspect(folder, expected, may_cost, tell))
    found = _lines(pipe)
    _, status = os.waitpid(child, 0)
    assert status == 0 and found, "see the traceback above"
    return {"kills": 1, "operations": len(quiet) + len(unfinished), "mid_operation": len(unfinished), **found[0]}


def run(folder: Path, n_operations: int, seed: int) -> dict[str, int]:
    """Lives until `n_operations` were begun; the sums of what happened."""
    choose = random.Random(seed)
    total: dict[str, int] = {"kills": 0, "operations": 0, "mid_operation": 0, "served": 0, "evicted": 0, "refused": 0}
    while total["operations"] < n_operations:
        for name, count in one_life(folder, choose.randrange(2**32), choose).items():
            total[name] += count
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to keep the store (default: the system's temporary folder)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ssd-crash-", dir=args.folder))
    started = time.perf_counter()
    try:
        total = run(folder, args.operations, args.seed)
    finally:
        shutil.rmtree(folder)
    total["seconds"] = round(time.perf_counter() - started)
    sys.stdout.write(json.dumps(total) + "\n")


if __name__ == "__main__":
    main()
