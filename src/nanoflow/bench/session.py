"""Drives one engine through a set of requests in the caller's thread, and notes what happened in each iteration.

It feeds the engine core directly with token ids and never detokenises, so that what is timed is the engine: per
iteration it costs two clock reads and a few appends.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from nanoflow.bench.workloads import RequestSet
from nanoflow.core.batch import BatchPlan
from nanoflow.core.errors import ConfigError
from nanoflow.core.sampling import SamplingParams
from nanoflow.core.stats import WorkDone
from nanoflow.engine.build import Engine
from nanoflow.engine.core import InFlightBatch
from nanoflow.engine.sequence import Sequence as EngineSequence

KEPT_PLANS = 64
PROGRESS_EVERY_S = 0.5
OnProgress = Callable[[int, int, str], None]
"""Told of finished requests, all requests, and a word on speed."""
OnNote = Callable[[str], None]
"""Told a sentence at the end of every run."""


@dataclass
class IterationLog:
    """Start (seconds from the run's start), tokens and decode tokens of every iteration, and some of their plans.

    Of n iterations every k-th plan is kept, k doubling whenever there are too many: an even sample of the run.
    """

    start_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    decode_tokens: list[int] = field(default_factory=list)
    plans: list[BatchPlan] = field(default_factory=list)
    _stride: int = 1

    def add(self, start_s: float, plan: BatchPlan) -> None:
        """Note one iteration."""
        if len(self.tokens) % self._stride == 0:
            self.plans.append(plan)
            if len(self.plans) > KEPT_PLANS:
                self.plans = self.plans[::2]
                self._stride *= 2
        self.start_s.append(start_s)
        self.tokens.append(plan.n_tokens)
        self.decode_tokens.append(plan.n_decode)

    @property
    def typical_tokens(self) -> int:
        """The size of a typical iteration: half of all tokens were computed in iterations of at least so many.

        A long tail of nearly empty iterations, as at the end of a run, hardly moves it.
        """
        sizes = np.sort(np.array(self.tokens))[::-1]
        return int(sizes[np.searchsorted(np.cumsum(sizes), sizes.sum() / 2)]) if len(sizes) else 0

    def typical_plans(self, n: int) -> list[BatchPlan]:
        """Up to `n` of the kept plans, those nearest to the typical size."""
        typical = self.typical_tokens
        return sorted(self.plans, key=lambda plan: abs(plan.n_tokens - typical))[:n]


@dataclass(frozen=True)
class Record:
    """One measured run of an engine. `started_s` is `time.monotonic()` at its start.

    `energy_j` is of all devices, by their own counters. `cache_numbers` are prompt tokens found by tier, and bytes
    moved to and from the tiers below the device.
    """

    sequences: list[EngineSequence]
    started_s: float
    elapsed_s: float
    work: WorkDone
    energy_j: float | None
    preemptions: int
    log: IterationLog
    cache_numbers: dict[str, float]


class Meter:
    """Reads an engine's counters at the start of a run (when it is made) and at its end."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._before = engine.core.stats()
        self._energy_j = engine.energy_j()
        self.started_s = time.monotonic()

    def work(self) -> WorkDone:
        """What was computed so far."""
        return self._engine.core.stats().work - self._before.work

    def energy_j(self) -> float | None:
        """What all devices used so far; None where they do not tell."""
        now = self._engine.energy_j()
        return None if self._energy_j is None or now is None else now - self._energy_j

    def finished(self) -> int:
        """Requests that have ended so far."""
        return sum(self._engine.core.stats().finished.values()) - sum(self._before.finished.values())

    def record(self, sequences: Sequence[EngineSequence], log: IterationLog) -> Record:
        """The run ends now."""
        elapsed = time.monotonic() - self.started_s
        used_j, before, after = self.energy_j(), self._before, self._engine.core.stats()
        hits = {f"hit_tokens_{tier}": n - before.kv_hit_tokens.get(tier, 0) for tier, n in after.kv_hit_tokens.items()}
        moved: dict[str, float] = {}
        for old, new in zip(before.kv_tiers, after.kv_tiers, strict=True):
            moved[f"kv_written_bytes_{new.name}"] = new.written_bytes - old.written_bytes
            moved[f"kv_read_bytes_{new.name}"] = new.read_bytes - old.read_bytes
        return Record(
            list(sequences),
            self.started_s,
            elapsed,
            after.work - before.work,
            used_j,
            after.preemptions - before.preemptions,
            log,
            {name: float(value) for name, value in (hits | moved).items()},
        )


def check_fits(engine: Engine, requests: RequestSet) -> None:
    """Raise `ConfigError` if a request is longer than the engine serves."""
    longest = int((requests.prompt_tokens + requests.output_tokens).max())
    if longest > engine.submission.max_model_len:
        raise ConfigError(
            f"the longest request of {requests.info.name} has {longest} tokens, but this engine serves "
            f"{engine.submission.max_model_len} in all; give --max-total-tokens or raise --max-model-len."
        )


def make_sequences(engine: Engine, requests: RequestSet, seed: int) -> list[EngineSequence]:
    """Sequences of random tokens, temperature 1, end tokens ignored; the requests fit the engine.

    Each call has a salt of its own, so that pages which another run left in any tier, on a disk even, are not found.
    """
    vocab_size, salt = engine.spec.vocab_size, secrets.token_hex(8)
    found: list[EngineSequence] = []
    for index, n_output in enumerate(requests.output_tokens.tolist()):
        params = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=n_output, seed=seed * 1_000_003 + index)
        ids = requests.prompt(index, vocab_size, seed)
        found += engine.submission.sequences(ids, params, request_id=f"{seed}-{index}", cache_salt=salt)
    return found


def run_sequences(engine: Engine, sequences: Sequence[EngineSequence], on_progress: OnProgress | None = None) -> Record:
    """Queue all of them at once and step until every one has ended. An error of the device passes through."""
    core, log, meter = engine.core, IterationLog(), Meter(engine)
    started = next_report = meter.started_s
    for sequence in sequences:
        core.add(sequence)
    in_flight: InFlightBatch | None = None
    try:
        while core.has_work or in_flight is not None:
            now = time.monotonic()
            in_flight = core.step(in_flight)
            if in_flight is not None:
                log.add(now - started, in_flight.scheduled.plan)
            if on_progress is not None and now >= next_report:
                next_report = now + PROGRESS_EVERY_S
                on_progress(meter.finished(), len(sequences), _speed(meter.work(), now - started))
    except BaseException as error:
        core.fail_all(f"{type(error).__name__}: {error}")
        raise
    return meter.record(sequences, log)


def _speed(work: WorkDone, elapsed_s: float) -> str:
    return f"{(work.prompt_tokens + work.output_tokens) / max(elapsed_s, 1e-9):.0f} tokens/s"
