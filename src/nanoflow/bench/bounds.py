"""What a run could have reached at best: its own work, and its workload's steady state, over this machine's rates.

Rates are measured, and those of one device (`engine.build.Engine.rates`). Two bounds are given, since each answers a
question that the other cannot: the first judges the kernels and the loop for the batches that there were, the second
also judges how well the batches were filled.
"""

from __future__ import annotations

from nanoflow.analysis.bound import Floors, floors_of_run
from nanoflow.analysis.cost import kv_copies
from nanoflow.analysis.lengths import Lengths
from nanoflow.analysis.serving import Group, analyse
from nanoflow.bench.result import Bound
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.model_spec import DTYPE_BYTES
from nanoflow.core.stats import WorkDone
from nanoflow.engine.build import Engine

DONE, STEADY = "work done", "steady state of the workload"


def bounds_of_run(
    engine: Engine,
    rates: MachineRates,
    elapsed_s: float,
    work: WorkDone,
    n_tokens: int,
    prompts: Lengths,
    outputs: Lengths,
) -> tuple[Bound, ...]:
    """The bound of the work that was done, then that of the workload's steady state (absent if nothing would fit).

    `n_tokens` are those that the run's throughput counts: prompts, found in a cache or computed, and outputs.
    """
    found = [bound_of_work(rates, engine.devices, elapsed_s, work, n_tokens)]
    steady = _steady_floors(engine, rates, work.prompt_tokens + work.output_tokens, prompts, outputs)
    if steady is not None:
        found.append(_bound(STEADY, steady, elapsed_s, n_tokens, rates, engine.devices))
    return tuple(found)


def bound_of_work(rates: MachineRates, devices: int, elapsed_s: float, work: WorkDone, n_tokens: int) -> Bound:
    """The bound of the work that was done, computing tokens that were found in a cache not being among it.

    `n_tokens` are those that the run's throughput counts, `rates` those of one of the `devices`.
    """
    return _bound(DONE, floors_of_run(work, rates, devices), elapsed_s, n_tokens, rates, devices)


def _steady_floors(
    engine: Engine, rates: MachineRates, n_tokens: int, prompts: Lengths, outputs: Lengths
) -> Floors | None:
    """Floors in seconds of `n_tokens` at the workload's steady mix, with the KV memory that the engine has."""
    config, spec, devices = engine.config, engine.spec, engine.devices
    dtype = config.model.dtype
    kv_tokens = engine.core.stats().kv_pages_total * config.cache.page_tokens
    kv_bytes = kv_tokens * spec.kv_bytes_per_token(dtype) * kv_copies(spec, devices)
    memory = spec.n_params * DTYPE_BYTES[dtype] + kv_bytes
    try:
        group = Group(rates, memory / devices, devices)
        found = analyse(spec, group, dtype, engine.pipeline.dense_batch, prompts, outputs)
    except ConfigError:
        return None
    scale = n_tokens / found.batch.n_tokens
    floors = found.floors
    return Floors(
        floors.compute_s * scale,
        floors.mem_s * scale,
        None if floors.net_s is None else floors.net_s * scale,
        None if floors.power_s is None else floors.power_s * scale,
    )


def _bound(name: str, floors: Floors, elapsed_s: float, n_tokens: int, rates: MachineRates, devices: int) -> Bound:
    seconds = {str(limit): value for limit, value in floors.by_limit.items()}
    return Bound(
        name=f"{name}, {'measured' if rates.measured else 'published'} rates",
        limit=str(floors.limit),
        bound_s=floors.bound_s,
        percent_of_bound=floors.percent_of_bound(elapsed_s),
        floors_s=seconds,
        percent_of_floor={limit: 100.0 * value / elapsed_s for limit, value in seconds.items()},
        tokens_per_s=n_tokens / floors.bound_s,
        rates=rates,
        devices=devices,
    )
