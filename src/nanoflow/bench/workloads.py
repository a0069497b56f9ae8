"""The requests of a benchmark: how long, when, and of which token ids. Equal seeds give equal requests.

Lengths come from `analysis.lengths` (constant, log-normal, built-in) or from a trace. Token ids are random, so no
prompt shares a prefix with another unless the trace says so by its blocks, and models with random weights do as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from nanoflow.analysis.lengths import AnyWorkload, Lengths, TraceWorkload, find_workload
from nanoflow.bench.arrivals import GAMMA, TRACE, Arrivals, Seconds
from nanoflow.bench.result import WorkloadInfo
from nanoflow.bench.traces import BLOCK_TOKENS, RequestTrace, is_conversation_trace, read_requests
from nanoflow.core.errors import ConfigError

ROUNDS_TO_FILL = 8


@dataclass(frozen=True)
class Limits:
    """Requests longer than these are left out (None: no limit). Counts are tokens."""

    total_tokens: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None

    def keep(self, prompts: Lengths, outputs: Lengths) -> np.ndarray:
        """A flag a request."""
        kept = np.ones(len(prompts), dtype=bool)
        for limit, lengths in (
            (self.total_tokens, prompts + outputs),
            (self.prompt_tokens, prompts),
            (self.output_tokens, outputs),
        ):
            if limit is not None:
                kept &= lengths <= limit
        return kept


@dataclass(frozen=True)
class RequestSet:
    """Requests in order of arrival. `arrival_s` is since the first one; `blocks` are ids of shared prompt blocks."""

    info: WorkloadInfo
    prompt_tokens: Lengths
    output_tokens: Lengths
    arrival_s: Seconds
    blocks: tuple[tuple[int, ...], ...] | None = None

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def prompt(self, index: int, vocab_size: int, seed: int) -> list[int]:
        """Random token ids of one prompt; `seed` changes all of them but not what is shared."""
        n = int(self.prompt_tokens[index])
        shared = self._shared(index, vocab_size, seed)[:n]
        rng = np.random.default_rng([seed, 0x70, index])
        own: list[int] = rng.integers(0, vocab_size, size=n - len(shared)).tolist()
        return shared + own

    def first(self, n: int) -> RequestSet:
        """The first `n` requests alone."""
        blocks = None if self.blocks is None else self.blocks[:n]
        return RequestSet(self.info, self.prompt_tokens[:n], self.output_tokens[:n], self.arrival_s[:n], blocks)

    def _shared(self, index: int, vocab_size: int, seed: int) -> list[int]:
        if self.blocks is None:
            return []
        return [token for block in self.blocks[index] for token in _block_tokens(block, vocab_size, seed)]


ALL_AT_ONCE, NO_LIMITS = Arrivals(), Limits()


def make_requests(
    workload: str, n: int, *, seed: int = 0, arrivals: Arrivals = ALL_AT_ONCE, limits: Limits = NO_LIMITS
) -> RequestSet:
    """`n` requests of `workload` (see `analysis.lengths.find_workload`; a .csv may also record arrivals and blocks).

    A trace with `trace` arrivals is read from its start in its order; otherwise its rows are drawn in random order,
    none again before all were drawn once. Raises `ConfigError` if no request passes the limits.
    """
    if n < 1:
        raise ConfigError(f"a benchmark needs at least 1 request, not {n}.")
    if workload.endswith(".csv"):
        chosen = _from_trace(_request_trace(Path(workload)), n, seed, arrivals, limits)
    else:
        chosen = _from_lengths(find_workload(workload), n, seed, arrivals, limits)
    return replace(chosen, info=_info(workload, chosen, seed, arrivals, limits))


def _request_trace(path: Path) -> RequestTrace:
    if is_conversation_trace(path):
        raise ConfigError(f"{path} is a trace of conversations; run it with nanoflow bench multiround.")
    return read_requests(path)


def _from_lengths(workload: AnyWorkload, n: int, seed: int, arrivals: Arrivals, limits: Limits) -> RequestSet:
    wanted = n
    for attempt in range(ROUNDS_TO_FILL):
        prompts, outputs = workload.sample(wanted, seed + attempt)
        kept = np.flatnonzero(limits.keep(prompts, outputs))[:n]
        if len(kept) == n:
            return RequestSet(_NO_INFO, prompts[kept], outputs[kept], arrivals.times(n, seed))
        wanted *= 2
    raise ConfigError(f"hardly any request of {workload.name} is within the limits; raise them (--max-total-tokens).")


def _from_trace(trace: RequestTrace, n: int, seed: int, arrivals: Arrivals, limits: Limits) -> RequestSet:
    kept = np.flatnonzero(limits.keep(trace.prompt_tokens, trace.output_tokens))
    if not len(kept):
        raise ConfigError(f"no request of {trace.name} is within the limits; raise them (--max-total-tokens).")
    if arrivals.kind == TRACE:
        rows = kept[:n]
        recorded = None if trace.arrival_s is None else trace.arrival_s[rows]
        times = arrivals.times(n, seed, recorded)
    else:
        numbered = TraceWorkload(trace.name, tuple(kept.tolist()), tuple(kept.tolist()))
        rows = numbered.sample(n, seed)[0]
        times = arrivals.times(n, seed)
    blocks = None if trace.blocks is None else tuple(trace.blocks[row] for row in rows)
    return RequestSet(_NO_INFO, trace.prompt_tokens[rows], trace.output_tokens[rows], times, blocks)


def _info(workload: str, chosen: RequestSet, seed: int, arrivals: Arrivals, limits: Limits) -> WorkloadInfo:
    prompts, outputs = chosen.prompt_tokens, chosen.output_tokens
    return WorkloadInfo(
        name=Path(workload).stem if workload.endswith(".csv") else workload,
        n_requests=len(chosen),
        seed=seed,
        prompt_mean_tokens=float(prompts.mean()),
        prompt_deviation_tokens=float(prompts.std()),
        output_mean_tokens=float(outputs.mean()),
        output_deviation_tokens=float(outputs.std()),
        arrivals=arrivals.kind,
        burstiness=arrivals.burstiness if arrivals.kind == GAMMA else None,
        max_total_tokens=limits.total_tokens,
    )


@lru_cache(maxsize=4096)
def _block_tokens(block: int, vocab_size: int, seed: int) -> tuple[int, ...]:
    rng = np.random.default_rng([seed, 0xB1, block])
    return tuple(rng.integers(0, vocab_size, size=BLOCK_TOKENS).tolist())


_NO_INFO = WorkloadInfo("", 0, 0, 0.0, 0.0, 0.0, 0.0)
