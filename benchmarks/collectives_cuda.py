"""Collectives between GPUs of one host, by every implementation: alone, and beside a matrix product.

    PYTHONPATH=src python benchmarks/collectives_cuda.py [--ranks 2] [--runs 1] [--sizes 0.5 1 … 64] [--json FILE]
        [--only KIND …]

`all_reduce+norm` is an all-reduce and the RMSNorm that follows it: as two kernels, or (`…_norm`) as one, of so many
blocks (`--blocks`). It starts its own ranks. A time is the mean of one call in a recording of several, the slowest
rank's, median of some replays; `--runs` repeats all of it, and the file is written anew after each run. Beside a
product, two numbers say how well the two share the GPU (1: not disturbed at all): `P coll` is the collective's time
alone over its time beside the product, `P gemm` the product's speed while a collective runs, over its speed alone.
Every result is checked once against sums that can be computed without communication.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor

from nanoflow.distributed.collectives import LIBRARY, Collectives
from nanoflow.distributed.group import Groups, open_groups
from nanoflow.distributed.reduce_norm import BLOCKS, ReduceNorm
from nanoflow.distributed.symmetric import SymmetricMemory, open_symmetric
from nanoflow.kernels.triton.norm import rms_norm

BF16 = torch.bfloat16
WIDTH = 8192
"""Columns of a message: the model dim of Llama-3-70B. 2048 rows of it are 32 MiB."""

CALLS = 10
REPLAYS = 9
SMALL = 2.0**-30
"""Scale of the random data: each all-reduce of a replay multiplies a message by the number of ranks, so it is made anew
before each."""

GEMM = (2048, 8192, 7168)
"""Tokens, outputs and inputs of the product beside: a down projection of Llama-3-70B on four ranks."""

REDUCERS = (LIBRARY, "one_shot", "two_shot")
GATHERERS = (LIBRARY, "copy_engine")
KINDS = ("all_reduce", "all_reduce+norm", "all_gather")
EPS = 1e-5


@dataclass
class Row:
    """One measurement. `wire_gb_per_s` is what each GPU sends a second, as a ring would."""

    run: int
    collective: str
    implementation: str
    mebibytes: float
    us: float
    wire_gb_per_s: float
    beside_us: float
    p_collective: float
    p_gemm: float


class Bench:
    """One rank's streams, buffers and timers."""

    def __init__(self, groups: Groups, device: torch.device, largest: int, blocks: list[int]) -> None:
        self.groups = groups
        self.device = device
        self.network = torch.cuda.Stream(device, priority=-1)
        self.compute = torch.cuda.Stream(device)
        names = [name for name in {*REDUCERS, *GATHERERS} if name != LIBRARY]
        lanes, allocate = open_symmetric(groups, device, names, scratch_bytes=largest)
        self.collectives: dict[str, Collectives] = {name: lanes.at(0, name) for name in (LIBRARY, *names)}
        self.x = allocate((largest // 2,), BF16)
        memory = SymmetricMemory(device, groups)
        self.fused_x = memory.empty((largest // 2,), BF16, [groups.lanes[0]])
        room = largest * (groups.size - 1)  # one-shot for messages of every size: this is to see from where it loses
        self.fused: dict[str, Callable[..., None]] = {}
        for n in blocks:
            one = ReduceNorm(groups.lanes[0], memory, one_shot_bytes=room, blocks=n)
            self.fused |= {f"one_shot_norm {n}": one.one_shot, f"two_shot_norm {n}": one.two_shot}
        self.weight = torch.ones(WIDTH, dtype=BF16, device=device)
        self.normed = torch.empty(largest // 2, dtype=BF16, device=device)
        self.out = torch.empty(groups.size * largest // 2, dtype=BF16, device=device)
        n_tokens, n_out, n_in = GEMM
        self.a = torch.randn(n_tokens, n_in, device=device).to(BF16)
        self.w = torch.randn(n_out, n_in, device=device).to(BF16)
        self.c = torch.empty(n_tokens, n_out, dtype=BF16, device=device)
        self.gemms = self.captured(lambda: torch.mm(self.a, self.w.t(), out=self.c), self.compute, CALLS)
        self.gemm_us = self.alone_us(self.gemms, self.compute, lambda: None) / CALLS

    def together(self) -> None:
        """All ranks are here, and their GPUs idle."""
        torch.cuda.synchronize(self.device)
        self.groups.smallest(0)

    def slowest(self, us: float) -> float:
        """The largest value of all ranks (whole nanoseconds)."""
        return -self.groups.smallest(-round(us * 1000)) / 1000

    def captured(self, call: Callable[[], object], stream: torch.cuda.Stream, n: int) -> torch.cuda.CUDAGraph:
        """A recording of `n` calls on `stream`, after a few that are not recorded."""
        self.together()
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        self.together()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(n):
                call()
        self.together()
        return graph

    def alone_us(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, prepare: Callable[[], object]) -> float:
        """Microseconds of a replay: median, slowest rank. `prepare` makes its data."""
        times = []
        for _ in range(REPLAYS):
            prepare()
            self.together()
            times.append(self.slowest(_timed(graph, stream, 1)()))
        return statistics.median(times)

    def beside_us(
        self, graph: torch.cuda.CUDAGraph, alone_us: float, prepare: Callable[[], object]
    ) -> tuple[float, float]:
        """(a replay's time while products run all along, what those products take in all)."""
        n_gemms = max(2, round(3 * alone_us / (self.gemm_us * CALLS)) + 1)
        times, wholes = [], []
        for _ in range(REPLAYS):
            prepare()
            self.together()
            whole = _timed(self.gemms, self.compute, n_gemms)
            mine = _timed(graph, self.network, 1)
            times.append(self.slowest(mine()))
            wholes.append(self.slowest(whole()) - n_gemms * CALLS * self.gemm_us)
        return statistics.median(times), max(0.0, statistics.median(wholes))

    def implementations(self, kind: str) -> tuple[str, ...]:
        """What there is for a kind of collective."""
        return {"all_reduce": REDUCERS, "all_reduce+norm": (*REDUCERS, *self.fused), "all_gather": GATHERERS}[kind]

    def call_of(self, kind: str, name: str, message: Tensor, whole: Tensor) -> Callable[[], None]:
        """One collective, and the norm where the kind has one."""
        normed = self.normed[: message.numel()].view_as(message)
        if name in self.fused:
            return partial(self.fused[name], message, self.weight, EPS, normed)
        collectives = self.collectives[name]

        def call() -> None:
            if kind == "all_gather":
                collectives.all_gather(message, whole)
            else:
                collectives.all_reduce(message)
            if kind == "all_reduce+norm":
                rms_norm(message, self.weight, EPS, normed)

        return call

    def measure(self, kind: str, name: str, n_bytes: int, run: int = 1) -> Row:
        """One collective of messages of `n_bytes` by implementation `name`."""
        ranks = self.groups.size
        message = (self.fused_x if name in self.fused else self.x)[: n_bytes // 2].view(-1, WIDTH)
        whole = self.out[: ranks * n_bytes // 2].view(ranks, -1, WIDTH)
        call = self.call_of(kind, name, message, whole)
        self._check(kind, name, call, message, whole)

        def prepare() -> None:
            message.normal_().mul_(SMALL)

        prepare()
        graph = self.captured(call, self.network, CALLS)
        alone = self.alone_us(graph, self.network, prepare)
        beside, lost = self.beside_us(graph, alone, prepare)
        wire = n_bytes * (ranks - 1) * (1 if kind == "all_gather" else 2 / ranks)
        return Row(
            run=run,
            collective=kind,
            implementation=name,
            mebibytes=n_bytes / 2**20,
            us=alone / CALLS,
            wire_gb_per_s=wire / (alone / CALLS) / 1e3,
            beside_us=beside / CALLS,
            p_collective=alone / beside,
            p_gemm=max(0.0, 1.0 - lost / beside),
        )

    def _check(self, kind: str, name: str, call: Callable[[], None], message: Tensor, whole: Tensor) -> None:
        rank, ranks = self.groups.rank, self.groups.size
        pattern = (torch.arange(message.numel(), device=self.device) % 7).view_as(message).to(BF16)
        self.together()
        with torch.cuda.stream(self.network):
            message.copy_(pattern * (rank + 1))
            call()
            if kind == "all_gather":
                right = all(torch.equal(whole[other], pattern * (other + 1)) for other in range(ranks))
            else:
                right = torch.equal(message, pattern * (ranks * (ranks + 1) // 2))
            if kind == "all_reduce+norm":
                wanted = torch.nn.functional.rms_norm(message.float(), (WIDTH,), eps=EPS)
                found = self.normed[: message.numel()].view_as(message).float()
                right = right and torch.allclose(found, wanted, rtol=1e-2, atol=1e-3)
        self.together()
        assert right, f"{kind} by {name} gives wrong numbers"


def _timed(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, n: int) -> Callable[[], float]:
    """Start `n` replays; the result waits for them and gives their microseconds."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        start.record()
        for _ in range(n):
            graph.replay()
        end.record()

    def us() -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) * 1000

    return us


def run_rank(rank: int, args: argparse.Namespace, meeting_place: str) -> None:
    """Everything that rank `rank` does; rank 0 prints."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    groups = open_groups(Path(meeting_place), rank, args.ranks, device, [0])
    sizes = [bytes_of(mebibytes) for mebibytes in args.sizes]
    bench = Bench(groups, device, max(sizes), args.blocks)
    rows: list[Row] = []
    about = _about(args, bench)
    if rank == 0:
        print(f"{args.ranks} × {about['device']}, torch {about['torch']}, NCCL {about['nccl']}")
        shape = "×".join(map(str, GEMM))
        print(f"product beside: {shape} bf16, {about['gemm_us']:.0f} us, {about['gemm_tflops']:.0f} TFLOP/s")
        print(HEAD, flush=True)
    for run in range(1, args.runs + 1):
        if rank == 0 and args.runs > 1:
            print(f"run {run} of {args.runs}", flush=True)
        for kind in args.only:
            for n_bytes in sizes:
                for name in bench.implementations(kind):
                    rows.append(bench.measure(kind, name, n_bytes, run))
                    if rank == 0:
                        print(_line(rows[-1]), flush=True)
        if rank == 0 and args.json:
            Path(args.json).write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    bench.together()
    groups.abort()


HEAD = "collective      implementation         MiB        us   GB/s a GPU  beside us  P coll  P gemm"


def _line(row: Row) -> str:
    return (
        f"{row.collective:15} {row.implementation:17} {row.mebibytes:8.1f} {row.us:9.1f} {row.wire_gb_per_s:12.0f} "
        f"{row.beside_us:10.1f} {row.p_collective:7.2f} {row.p_gemm:7.2f}"
    )


def _about(args: argparse.Namespace, bench: Bench) -> dict[str, object]:
    """What the numbers are of."""
    return {
        "command": " ".join(sys.argv),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(bench.device),
        "ranks": args.ranks,
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "triton": triton.__version__,
        "gemm": GEMM,
        "gemm_us": bench.gemm_us,
        "gemm_tflops": 2e-6 * GEMM[0] * GEMM[1] * GEMM[2] / bench.gemm_us,
    }


def bytes_of(mebibytes: float) -> int:
    """A message of whole rows that has about this size, one row at least."""
    row_bytes = 2 * WIDTH
    return max(1, round(mebibytes * 2**20) // row_bytes) * row_bytes


def main() -> None:
    """Start the ranks and wait for them; if one fails, end the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--runs", type=int, default=1, help="repeats of everything (default 1)")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.5, 1, 2, 4, 8, 16, 32, 64], metavar="MIB")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds (default: all)")
    parser.add_argument("--blocks", type=int, nargs="+", default=[BLOCKS], help="of the fused kernels")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.ranks < 2 or args.runs < 1 or min(args.sizes) <= 0:
        parser.error("there must be 2 ranks or more, 1 run or more, and sizes above 0")
    if torch.cuda.device_count() < args.ranks:
        parser.error(f"--ranks {args.ranks} needs as many GPUs; here are {torch.cuda.device_count()}")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=run_rank, args=(rank, args, str(Path(folder) / "store")), daemon=True)
            for rank in range(args.ranks)
        ]
        for process in ranks:
            process.start()
        while any(process.is_alive() for process in ranks):
            if any(process.exitcode for process in ranks):
                for process in ranks:
                    process.kill()
                raise SystemExit("a rank has failed; its error is above.")
            time.sleep(0.1)
        if any(process.exitcode for process in ranks):
            raise SystemExit("a rank has failed; its error is above.")


if __name__ == "__main__":
    main()
