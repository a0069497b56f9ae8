"""Statistics of several engines as of one: counters summed over all that ever were, gauges over those that are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from nanoflow.core.stats import EngineStats, TierFill, WorkDone

_COUNTERS = ("preemptions", "kv_evicted_pages", "kv_reload_wait_s")
_GAUGES = ("n_running", "kv_pages_used", "kv_pages_total", "dense_batch", "batch_tokens", "kv_pages_cached")


def summed(live: Sequence[EngineStats], past: Sequence[EngineStats]) -> EngineStats:
    """Counters of all, gauges of the living."""
    ever = [*live, *past]
    energies = [stats.energy_j for stats in ever if stats.energy_j is not None]
    return EngineStats(
        **{name: sum(getattr(stats, name) for stats in ever) for name in _COUNTERS},
        **{name: sum(getattr(stats, name) for stats in live) for name in _GAUGES},
        finished=dict(_sum_counts(stats.finished for stats in ever)),
        work=_sum_work(stats.work for stats in ever),
        busy_s=sum(stats.busy_s for stats in ever),
        energy_j=sum(energies) if energies else None,
        kv_tiers=_sum_tiers(live, past),
        kv_hit_tokens=dict(_sum_counts(stats.kv_hit_tokens for stats in ever)),
    )


def _sum_counts(counts: Iterable[dict[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return total


def _sum_work(works: Iterable[WorkDone]) -> WorkDone:
    total = WorkDone()
    for work in works:
        total = total - (WorkDone() - work)
    return total


def _sum_tiers(live: Sequence[EngineStats], past: Sequence[EngineStats]) -> tuple[TierFill, ...]:
    """Tiers by name; those of the past hold nothing any more."""
    fills = [fill for stats in live for fill in stats.kv_tiers]
    fills += [replace(fill, pages=0, capacity_pages=0) for stats in past for fill in stats.kv_tiers]
    names = dict.fromkeys(fill.name for fill in fills)
    return tuple(_sum_fills(name, [fill for fill in fills if fill.name == name]) for name in names)


def _sum_fills(name: str, fills: Sequence[TierFill]) -> TierFill:
    def of(value: Callable[[TierFill], float]) -> float:
        return sum(value(fill) for fill in fills)

    return TierFill(
        name,
        int(of(lambda f: f.pages)),
        int(of(lambda f: f.capacity_pages)),
        int(of(lambda f: f.read_bytes)),
        of(lambda f: f.read_s),
        int(of(lambda f: f.written_bytes)),
        of(lambda f: f.write_s),
        int(of(lambda f: f.evicted_pages)),
        int(of(lambda f: f.corrupt_pages)),
        int(of(lambda f: f.errors)),
    )
