"""How fast this machine multiplies matrices and reads memory: the rates that the bound of a run divides by.

A bound must not be beaten by the kernels it judges, so each rate is the best over several shapes, ways and rounds, not
a mean; data is random, since zeros multiply faster on some devices. It takes about 1.5 s, once: the result is kept in
the user's cache and belongs to this processor, core count, torch version, dtype and number of threads. A CPU that other
programs use at the same moment looks slow: runs are therefore short (some fall between the others), and a measurement
that was disturbed all the same is repeated at the next start, the better figures being kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import TypeAlias

import torch
from torch import Tensor

from nanoflow.core import env
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.log import get_logger
from nanoflow.device.cpu import cpu_model
from nanoflow.profiling.rate_cache import KeptRates, RateCache

log = get_logger(__name__)

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_GEMM_SHAPES = ((256, 1024, 1024), (512, 1024, 1024), (256, 4096, 1024))
CUDA_GEMM_SHAPES = ((8192, 8192, 8192), (2048, 28672, 4096), (4096, 8192, 4096))
CPU_READ_BYTES = 256 << 20
CUDA_READ_BYTES = 4 << 30
CPU_GEMM_SECONDS = 0.08
CPU_READ_SECONDS = 0.1
CUDA_SECONDS = 0.3
RANDOM_BLOCK = 1 << 20
Shapes: TypeAlias = tuple[tuple[int, int, int], ...]
READ_CHUNKS = 8
CUDA_LAUNCHES = 8
UNDISTURBED = 0.9

Clock = Callable[[Callable[[], object]], float]
"""Runs a function and returns the seconds it took on the device."""


def measure_rates(
    device: str = "cpu", dtype: str = "bfloat16", threads: int | None = None, *, refresh: bool = False
) -> MachineRates:
    """GEMM rate in `dtype` and memory read bandwidth of `device` (`cpu` or `cuda`), with `threads` CPU threads.

    Comes from the cache file unless `refresh` is set. Raises `ConfigError` for an unknown dtype or device.
    """
    if dtype not in TORCH_DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(TORCH_DTYPES)}, not {dtype!r}.")
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu or cuda, not {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda is not available to torch here; use device cpu.")
    n_threads = threads or env.available_cores()
    cache = RateCache(env.cache_dir() / "machine.json")
    key = machine_key(device, dtype, n_threads)
    kept = None if refresh else cache.get(key)
    if kept is not None and kept.settled:
        return kept.rates
    if device == "cuda":
        found = KeptRates(_measure_cuda(dtype), settled=True)
    else:
        found = _measure_cpu(dtype, n_threads)
    if kept is not None:
        found = found.best_of(kept)
    if not found.settled:
        log.warning("other programs used this machine while its rates were measured; the bound may be too low")
    cache.put(key, found)
    return found.rates


def kept_rates(device: str, dtype: str, threads: int | None = None) -> MachineRates | None:
    """What `measure_rates` has kept for this; None if it has not measured yet."""
    cache = RateCache(env.cache_dir() / "machine.json")
    kept = cache.get(machine_key(device, dtype, threads or env.available_cores()))
    return None if kept is None else kept.rates


def machine_key(device: str, dtype: str, threads: int) -> str:
    """What a measurement is valid for."""
    who = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_model()}, {env.available_cores()} cores"
    return f"{who} | torch {torch.__version__} | {dtype} | {threads} threads"


def _measure_cpu(dtype: str, threads: int) -> KeptRates:
    """The rates; settled unless other programs took part of the processor meanwhile (torch's waiting threads spin)."""
    with _torch_threads(threads):
        # A kernel may widen its inputs, so float32's rate is within reach of every dtype.
        ways = {TORCH_DTYPES[dtype], torch.float32}
        n_bytes = min(CPU_READ_BYTES, env.available_memory_bytes() // 4)
        before = _read_rate("cpu", n_bytes, _wall_clock, CPU_READ_SECONDS)
        flops = max(_gemm_rate("cpu", way, CPU_GEMM_SHAPES, _wall_clock, CPU_GEMM_SECONDS) for way in ways)
        share = _cpu_share(threads)
        bandwidth = max(before, _read_rate("cpu", n_bytes, _wall_clock, CPU_READ_SECONDS))
    return KeptRates(_measured(f"{cpu_model()}, {threads} threads", dtype, flops, bandwidth), share >= UNDISTURBED)


def _cpu_share(threads: int) -> float:
    """The part of `threads` whole cores that this process gets while it multiplies."""
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    wall, cpu = time.perf_counter(), time.process_time()
    _fastest(lambda: torch.mm(a, b), _wall_clock, CPU_GEMM_SECONDS)
    return (time.process_time() - cpu) / ((time.perf_counter() - wall) * threads)


def _measure_cuda(dtype: str) -> MachineRates:
    flops = _gemm_rate("cuda", TORCH_DTYPES[dtype], CUDA_GEMM_SHAPES, _cuda_clock, CUDA_SECONDS)
    free_bytes, _ = torch.cuda.mem_get_info()
    bandwidth = _read_rate("cuda", min(CUDA_READ_BYTES, free_bytes // 2), _cuda_clock, CUDA_SECONDS)
    return _measured(torch.cuda.get_device_name(), dtype, flops, bandwidth)


def _measured(name: str, dtype: str, flops_per_s: float, mem_bytes_per_s: float) -> MachineRates:
    source = "best torch GEMM and best streaming read on this machine"
    return MachineRates(name, dtype, flops_per_s, mem_bytes_per_s, measured=True, source=source)


def _gemm_rate(device: str, dtype: torch.dtype, shapes: Shapes, clock: Clock, seconds: float) -> float:
    """The best FLOP/s over shapes (m, n, k) of y = x Wᵀ, `seconds` each."""
    best = 0.0
    for m, n, k in shapes:
        x_mk = torch.randn(m, k, device=device).to(dtype)
        weight_nk = torch.randn(n, k, device=device).to(dtype)
        out_mn = torch.empty(m, n, dtype=dtype, device=device)

        def multiply(x: Tensor = x_mk, weight: Tensor = weight_nk, out: Tensor = out_mn) -> object:
            return torch.mm(x, weight.t(), out=out)

        best = max(best, 2.0 * m * n * k / _fastest(multiply, clock, seconds))
    return best


def _read_rate(device: str, n_bytes: int, clock: Clock, seconds: float) -> float:
    """The best bytes/s of reductions that write almost nothing, over chunks of `n_bytes` in turn: no cache helps."""
    blocks = max(READ_CHUNKS, n_bytes // (4 * RANDOM_BLOCK)) // READ_CHUNKS * READ_CHUNKS
    chunks = torch.rand(RANDOM_BLOCK, device=device).repeat(blocks).chunk(READ_CHUNKS)
    floats, integers = cycle(chunks), cycle([chunk.view(torch.int32) for chunk in chunks])
    ways: tuple[Callable[[], object], ...] = (
        lambda: next(floats).sum(),
        lambda: next(floats).amax(),
        lambda: next(integers).amax(),
    )
    return chunks[0].numel() * 4 / min(_fastest(way, clock, seconds) for way in ways)


def _fastest(run: Callable[[], object], clock: Clock, seconds: float) -> float:
    """Seconds of the fastest run among those that fit into `seconds`, after one to warm up (three at the least)."""
    run()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - started < seconds:
        times.append(clock(run))
    return min(times)


def _wall_clock(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _cuda_clock(run: Callable[[], object]) -> float:
    """Mean of a row of launches between two events, so that launch gaps do not count."""
    start = torch.cuda.Event(enable_timing=True)
    stop = torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(CUDA_LAUNCHES):
        run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3 / CUDA_LAUNCHES


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """Run with `threads` of torch's threads, then restore the setting."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
