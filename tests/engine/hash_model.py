"""A model whose next token is a hash of the tokens it reads from its pages: any mistake in scheduling changes the text.

It stands in for the executor. Keys and values are the token ids themselves, kept in pages as the plan says, so a page
that leaks, is shared by accident, or is read before it was written gives another token than `expected_output`.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nanoflow.core.batch import LAST_SAMPLED, BatchPlan, BatchResult
from nanoflow.core.request import Request
from nanoflow.core.sampling import SamplingParams
from nanoflow.engine.scheduler import SchedulerLimits
from nanoflow.engine.sequence import Sequence
from nanoflow.kvcache.mover import MoverStats

EOS = 0
SPOILT = -5


def next_token(tokens: np.ndarray, vocab: int) -> int:
    return zlib.crc32(np.ascontiguousarray(tokens, dtype=np.int32).tobytes()) % vocab


def expected_output(
    prompt: list[int], max_tokens: int, vocab: int, *, ignore_eos: bool, min_tokens: int = 0
) -> list[int]:
    """What a request must produce, alone in the world (`min_tokens` is not enforced by this model)."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens.append(next_token(np.array(tokens), vocab))
        if tokens[-1] == EOS and not ignore_eos:
            break
    return tokens[len(prompt) :]


def make_sequence(
    name: str,
    prompt: list[int],
    max_tokens: int,
    *,
    ignore_eos: bool = False,
    streaming: bool = False,
    priority: int = 0,
) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos)
    return Sequence(Request(name, tuple(prompt), params, max_tokens, seed=0, priority=priority), streaming=streaming)


@dataclass
class Done:
    value: BatchResult

    def result(self) -> BatchResult:
        return self.value


class HashModel:
    """Computes a batch when it is launched, in launch order, as an in-order device would."""

    def __init__(self, limits: SchedulerLimits, n_slots: int, vocab: int) -> None:
        self.limits = limits
        self.vocab = vocab
        self.memory = np.full(limits.n_pages * limits.page_tokens, -7, dtype=np.int32)
        self.last = np.full(n_slots, -9, dtype=np.int32)
        self.launched_tokens: list[int] = []

    def launch(self, plan: BatchPlan) -> Done:
        self._check(plan)
        tokens = np.where(plan.token_ids == LAST_SAMPLED, self.last[plan.token_slots], plan.token_ids)
        assert (plan.token_ids[: plan.n_decode] == LAST_SAMPLED).all()
        assert (plan.token_ids[plan.n_decode :] >= 0).all()
        self.memory[plan.kv_slots] = tokens
        sampled = np.array([self._sample(plan, int(row)) for row in plan.sampling.token_rows], dtype=np.int32)
        self.last[plan.sampling.slots] = sampled
        self.launched_tokens.append(plan.n_tokens)
        return Done(BatchResult(sampled))

    def _sample(self, plan: BatchPlan, row: int) -> int:
        request = int(np.searchsorted(plan.query_start, row, side="right")) - 1
        assert row == plan.query_start[request + 1] - 1, "only a request's last token samples"
        positions = np.arange(plan.context_len[request])
        page = self.limits.page_tokens
        return next_token(
            self.memory[plan.page_table[request, positions // page] * page + positions % page], self.vocab
        )

    def _check(self, plan: BatchPlan) -> None:
        page = self.limits.page_tokens
        assert 0 < plan.n_tokens <= self.limits.dense_batch
        assert plan.n_requests <= self.limits.max_running
        assert len(set(plan.kv_slots.tolist())) == plan.n_tokens, "two tokens were given one place"
        lengths = np.diff(plan.query_start)
        assert (lengths > 0).all() and (lengths[: plan.n_decode] == 1).all()
        written = {slot // page for slot in plan.kv_slots.tolist()}
        owned = [plan.page_table[r, : -(-int(n) // page)].tolist() for r, n in enumerate(plan.context_len)]
        places = [(p, place) for pages in owned for place, p in enumerate(pages)]
        shared = {p for p, count in Counter(p for p, _ in places).items() if count > 1}
        assert len({p for p, _ in places}) == len(set(places)), "a page is at two places of its requests"
        for request, pages in enumerate(owned):
            rows = plan.kv_slots[plan.query_start[request] : plan.query_start[request + 1]] // page
            first = {p: r for r in range(request, -1, -1) for p in owned[r]}
            assert all(p in pages for p in rows.tolist())
            assert all(p not in shared or first[p] == request for p in rows.tolist()), "a shared page is written"
        assert written <= {p for p, _ in places}
        for request in range(plan.n_requests):
            rows = slice(plan.query_start[request], plan.query_start[request + 1])
            expected = np.arange(plan.context_len[request] - lengths[request], plan.context_len[request])
            assert (plan.positions[rows] == expected).all()
            assert len(set(plan.token_slots[rows].tolist())) == 1


class LateTransfer:
    """A copy that is made when it ends, after some polls: whoever uses its pages before shows in a text."""

    def __init__(self, n_pages: int, delay: int, copy: Callable[[], None] | None) -> None:
        self._whole = np.full(n_pages, copy is not None)
        self._delay = delay
        self._copy = copy

    def poll(self) -> bool:
        self._delay -= 1
        if self._delay < 0 and self._copy is not None:
            self._copy()
            self._copy = None
        return self._delay < 0

    def result(self) -> np.ndarray:
        self._delay = 0
        self.poll()
        return self._whole


class HashMover:
    """Copies pages of a `HashModel`, in the order of its launches. Copies to and from a pool end `delay` polls late."""

    pins = False
    node = None

    def __init__(self, model: HashModel, delay: int = 0) -> None:
        self._pages = model.memory.reshape(model.limits.n_pages, model.limits.page_tokens)
        self.page_bytes = self._pages[0].nbytes
        self.stats = MoverStats()
        self.delay = delay
        self.failing = False

    def pin(self, memory: np.ndarray) -> None:
        """Nothing to lock."""

    def attach(self, pool: np.ndarray) -> None:
        self._pool = pool

    def close(self) -> None:
        """Nothing to let go of."""

    def copy(self, sources: np.ndarray, targets: np.ndarray) -> None:
        assert len(set(targets.tolist())) == len(targets)
        self._pages[targets] = self._pages[sources]

    def offload(self, pages: np.ndarray, slots: np.ndarray) -> LateTransfer:
        assert len(pages) == len(slots) == len(set(slots.tolist()))

        def copy() -> None:
            self._pool[slots] = self._pages[pages].view(np.uint8)

        self.stats.offloaded_bytes += len(pages) * self.page_bytes
        return LateTransfer(len(pages), self.delay, None if self.failing else copy)

    def reload(self, slots: np.ndarray, pages: np.ndarray) -> LateTransfer:
        assert len(pages) == len(slots) == len(set(pages.tolist()))
        self._pages[pages] = SPOILT

        def copy() -> None:
            assert (self._pages[pages] == SPOILT).all(), "pages were used while they were being loaded"
            self._pages[pages] = self._pool[slots].view(np.int32)

        self.stats.reloaded_bytes += len(pages) * self.page_bytes
        return LateTransfer(len(pages), self.delay, None if self.failing else copy)
