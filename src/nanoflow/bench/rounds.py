"""Runs conversations on an engine: a round begins when the one before has been answered (and thought about).

The prompt of a round is exactly the tokens of all rounds before it, the model's own answers included, and new random
ones; so whatever is reused must be found by its tokens, as a user's next request would be.
"""

from __future__ import annotations

import heapq
import secrets
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from nanoflow.bench.conversations import ConversationSet
from nanoflow.bench.result import Column, rounded
from nanoflow.bench.session import PROGRESS_EVERY_S, IterationLog, Meter, OnProgress, Record
from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.build import Engine
from nanoflow.engine.core import InFlightBatch
from nanoflow.engine.sequence import Sequence

LONGEST_SLEEP_S = 0.05


@dataclass
class _Talk:
    """A conversation under way: the tokens so far, and which turn comes next."""

    number: int
    tokens: list[int] = field(default_factory=list)
    turn: int = 0


@dataclass(frozen=True)
class RoundsRecord:
    """A finished run: the engine's record, and for each sequence its conversation, its turn and when it was due."""

    record: Record
    conversation: tuple[int, ...]
    turn: tuple[int, ...]
    due_s: tuple[float, ...]

    def columns(self) -> dict[str, Column]:
        """Raw samples; `cached_tokens` are prompt tokens that were found in the cache."""
        start, sequences = self.record.started_s, self.record.sequences
        return {
            "conversation": self.conversation,
            "turn": self.turn,
            "arrival_s": rounded(due - start for due in self.due_s),
            "first_token_s": rounded(None if s.first_token_s is None else s.first_token_s - start for s in sequences),
            "finished_s": rounded(None if s.finished_s is None else s.finished_s - start for s in sequences),
            "prompt_tokens": tuple(len(s.prompt_array) for s in sequences),
            "output_tokens": tuple(len(s.output_ids) for s in sequences),
            "cached_tokens": tuple(s.cached_tokens or 0 for s in sequences),
            "status": tuple("ok" if s.finish_reason in ("length", "stop") else str(s.error) for s in sequences),
        }


class Conversing:
    """One run over a set of conversations. `think_s` is the mean of exponential pauses between rounds (0: none)."""

    def __init__(
        self, engine: Engine, talks: ConversationSet, *, seed: int, concurrent: int, think_s: float = 0.0
    ) -> None:
        self._engine = engine
        self._set = talks
        self._seed = seed
        self._think_s = think_s
        self._salt = secrets.token_hex(8)  # so that no page of an earlier run is found, on a disk even
        self._waiting = deque(_Talk(number) for number in range(len(talks.conversations)))
        self._concurrent = concurrent
        self._due: list[tuple[float, int, _Talk]] = []  # a heap of (when, number, conversation)
        self._running: dict[Sequence, _Talk] = {}
        self._ended: deque[Sequence] = deque()
        self._sequences: list[Sequence] = []
        self._notes: list[tuple[int, int, float]] = []

    def run(self, on_progress: OnProgress | None = None) -> RoundsRecord:
        """All conversations to their ends. An error of the device passes through."""
        core, log, meter = self._engine.core, IterationLog(), Meter(self._engine)
        started = next_report = meter.started_s
        total = len(self._set.turns)
        for _ in range(min(self._concurrent, len(self._waiting))):
            self._begin(started)
        in_flight: InFlightBatch | None = None
        try:
            while self._due or self._running or in_flight is not None:
                now = time.monotonic()
                self._submit_due(now)
                if core.has_work or in_flight is not None:
                    in_flight = core.step(in_flight)
                    if in_flight is not None:
                        log.add(now - started, in_flight.scheduled.plan)
                elif self._due:
                    time.sleep(min(LONGEST_SLEEP_S, max(0.0, self._due[0][0] - now)))
                self._take_ended()
                if on_progress is not None and now >= next_report:
                    next_report = now + PROGRESS_EVERY_S
                    on_progress(len(self._sequences) - len(self._running), total, "rounds")
        except BaseException as error:
            core.fail_all(f"{type(error).__name__}: {error}")
            raise
        conversation, turn, due = zip(*self._notes, strict=True)
        return RoundsRecord(meter.record(self._sequences, log), conversation, turn, due)

    def _begin(self, now: float) -> None:
        if self._waiting:
            talk = self._waiting.popleft()
            heapq.heappush(self._due, (now, talk.number, talk))

    def _submit_due(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            due, _, talk = heapq.heappop(self._due)
            turn = self._set.conversations[talk.number].turns[talk.turn]
            rng = np.random.default_rng([self._seed, 0x7A, talk.number, talk.turn])
            talk.tokens += rng.integers(0, self._engine.spec.vocab_size, size=turn.new_tokens).tolist()
            seed = (self._seed * 1_000_003 + talk.number) * 4096 + talk.turn
            params = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=turn.output_tokens, seed=seed)
            (sequence,) = self._engine.submission.sequences(talk.tokens, params, cache_salt=self._salt)
            sequence.on_end = self._ended.append
            self._running[sequence] = talk
            self._sequences.append(sequence)
            self._notes.append((talk.number, talk.turn, due))
            self._engine.core.add(sequence)

    def _take_ended(self) -> None:
        while self._ended:
            sequence = self._ended.popleft()
            talk = self._running.pop(sequence)
            talk.tokens += sequence.output_ids
            talk.turn += 1
            now = time.monotonic()
            if talk.turn == len(self._set.conversations[talk.number].turns):
                self._begin(now)
                continue
            rng = np.random.default_rng([self._seed, 0x7B, talk.number, talk.turn])
            pause = float(rng.exponential(self._think_s)) if self._think_s > 0 else 0.0
            heapq.heappush(self._due, (now + pause, talk.number, talk))
