"""One rank of the fused all-reduce and norm: `python -m tests.distributed.reduce_norm_rank DEVICE RANK RANKS FOLDER`.

On a CPU the kernels run in Triton's interpreter and the ranks share files that each of them maps, in place of the
GPUs' symmetric memory. Every result is compared with sums that each rank can compute alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tests.kernels.triton.conftest  # noqa: F401  (the interpreter, where there is no GPU)
from nanoflow.distributed.group import Group, Groups, open_groups
from nanoflow.distributed.reduce_norm import ReduceNorm, SharedMemory
from nanoflow.kernels.reference import ReferenceKernels

EPS = 1e-5
FORMS = ("two_shot", "one_shot")
BLOCKS = {"cpu": 3, "cuda": 64}
DTYPES = {"cpu": (torch.float32, torch.float16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
"""The interpreter cuts bfloat16 off where a GPU rounds."""

SHAPES = {
    "cpu": [(23, 64), (2, 96)],
    "cuda": [(1, 64), (2, 96), (1, 8192), (7, 4096), (64, 8192), (300, 2880), (2048, 8192), (2048, 4096), (3, 16384)],
}


class SharedFiles:
    """Implements `SharedMemory` on a CPU: a file a rank and buffer, mapped by all ranks."""

    def __init__(self, folder: Path, groups: Groups) -> None:
        self._folder = folder
        self._groups = groups
        self._copies: list[list[Tensor]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, groups: Collection[Group]) -> Tensor:
        size, number = torch.Size(shape).numel(), len(self._copies)
        names = [self._folder / f"buffer-{number}-{rank}" for rank in range(self._groups.size)]
        names[self._groups.rank].write_bytes(bytes(size * dtype.itemsize))
        self._groups.smallest(0)
        copies = [torch.from_file(str(name), shared=True, size=size, dtype=dtype).view(shape) for name in names]
        self._copies.append(copies)
        return copies[self._groups.rank]

    def addresses(self, buffer: Tensor, group: Group) -> list[int]:
        copies = next(one for one in self._copies if one[group.rank].data_ptr() == buffer.data_ptr())
        return [copy.data_ptr() for copy in copies]

    def buffer_of(self, tensor: Tensor) -> Tensor | None:
        start = tensor.data_ptr()
        for buffer in (one[self._groups.rank] for one in self._copies):
            if buffer.data_ptr() <= start < buffer.data_ptr() + buffer.numel() * buffer.element_size():
                return buffer
        return None


class Checks:
    """The fused form against all-reduce, then norm: some rows of a larger buffer, again and again."""

    def __init__(self, groups: Groups, memory: SharedMemory, device: torch.device) -> None:
        self.group = groups.lanes[0]
        self.device = device
        self.memory = memory
        shapes = SHAPES[device.type]
        most = max(rows * width for rows, width in shapes) * 4 * (groups.size - 1)
        self.fused = ReduceNorm(self.group, memory, one_shot_bytes=most + 1024, blocks=BLOCKS[device.type])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        groups.smallest(0)

    def part(self, rank: int, rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
        """What rank `rank` has."""
        generator = torch.Generator(self.device).manual_seed(1000 * seed + rank)
        return torch.randn(rows, width, generator=generator, device=self.device).to(dtype)

    def run(self) -> None:
        """All shapes and types in both forms; raises `AssertionError`."""
        for dtype in DTYPES[self.device.type]:
            for rows, width in SHAPES[self.device.type]:
                buffer = self.memory.empty((rows + 3, width), dtype, [self.group])
                for seed, form in enumerate(("one_shot", *FORMS, "one_shot", "two_shot")):
                    self._check(buffer, rows, dtype, form, seed)

    def _check(self, buffer: Tensor, rows: int, dtype: torch.dtype, form: str, seed: int) -> None:
        width = buffer.shape[1]
        parts = [self.part(rank, rows, width, dtype, seed) for rank in range(self.group.size)]
        weight = 1.0 + 0.1 * self.part(99, 1, width, dtype, seed)[0]
        buffer.fill_(7.0)
        x, h = buffer[2 : 2 + rows], torch.full((rows, width), 7.0, dtype=dtype, device=self.device)
        self._call(lambda: getattr(self.fused, form)(x, weight, EPS, h), x, parts[self.group.rank])
        total = torch.zeros(rows, width, device=self.device)
        for part in parts:
            total += part.float()
        wanted = torch.empty_like(h)
        ReferenceKernels().rms_norm(total.to(dtype), weight, EPS, wanted)
        what = f"{form}, {rows} × {width}, {dtype}"
        assert torch.equal(x, total.to(dtype)), f"sums: {what}"
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
        torch.testing.assert_close(h, wanted, **tolerance, msg=lambda text: f"norms: {what}: {text}")
        assert bool((buffer[:2] == 7.0).all() and (buffer[2 + rows :] == 7.0).all()), f"other rows: {what}"

    def _call(self, launch: Callable[[], Any], x: Tensor, part: Tensor) -> None:
        """Once, and on a GPU then from a recording, several times: the last result is what is looked at."""
        x.copy_(part)
        launch()
        if self.device.type == "cpu":
            return
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            x.copy_(part)
            launch()
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize(self.device)


def opened(kind: str, rank: int, ranks: int, folder: Path) -> Iterator[Checks]:
    """The rank's place among the others, for as long as it is used."""
    device = torch.device("cpu") if kind == "cpu" else torch.device("cuda", rank)
    if kind == "cuda":
        torch.cuda.set_device(device)
    groups = open_groups(folder / "store", rank, ranks, device, [0])
    if kind == "cpu":
        yield Checks(groups, SharedFiles(folder, groups), device)
    else:
        from nanoflow.distributed.symmetric import SymmetricMemory

        yield Checks(groups, SymmetricMemory(device, groups), device)
    groups.smallest(0)
    groups.abort()


def main() -> None:
    kind, rank, ranks, folder = sys.argv[1:]
    for checks in opened(kind, int(rank), int(ranks), Path(folder)):
        checks.run()


if __name__ == "__main__":
    main()
