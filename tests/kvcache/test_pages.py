"""The page pool with its prefix index against a naive model that keeps whole token histories in a list."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nanoflow.kvcache.chain import begin, page_keys, root_key
from nanoflow.kvcache.pages import PagePool

N_PAGES = 10
ROOT = root_key("test")


class PoolMachine(RuleBasedStateMachine):
    """Requests whose pages hold one token each; tokens are 0 or 1, so prefixes meet often.

    The model: `cached` lists the histories (tuples of tokens, one entry a page) that the index must know, from the
    least to the most recently used; `running` has each request's history and pages.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(N_PAGES)
        self.running: list[tuple[tuple[int, ...], np.ndarray]] = []
        self.cached: list[tuple[int, ...]] = []

    def held(self) -> set[tuple[int, ...]]:
        return {history[: n + 1] for history, _ in self.running for n in range(len(history))}

    def use(self, history: tuple[int, ...]) -> None:
        """Every prefix counts as used now, the longest one first."""
        for n in range(len(history), 0, -1):
            if history[:n] in self.cached:
                self.cached.remove(history[:n])
            self.cached.append(history[:n])

    def evict(self, count: int) -> None:
        for history in [h for h in self.cached if h not in self.held()][:count]:
            self.cached.remove(history)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def start(self, tokens: list[int]) -> None:
        """A request takes its longest cached prefix and computes the rest."""
        keys = page_keys(begin(ROOT), np.array(tokens, dtype=np.int32), 1)
        shared = self.pool.lookup(keys)
        wanted = 0
        while wanted < len(tokens) and tuple(tokens[: wanted + 1]) in self.cached:
            wanted += 1
        assert len(shared) == wanted, "the longest cached prefix"
        self.pool.share(shared)
        missing = len(tokens) - wanted
        history = tuple(tokens)
        self.running.append((history[:wanted], shared))
        if missing > self.pool.n_free:
            self.running.pop()
            self.pool.release(shared)
            for n in range(wanted, 0, -1):
                if history[:n] not in self.held():
                    self.cached.remove(history[:n])
                    self.cached.append(history[:n])
            return
        free = N_PAGES - len(set(self.cached) | self.held())
        self.evict(max(0, missing - free))
        pages = np.append(shared, self.pool.allocate(missing))
        named = self.pool.name(keys, pages)
        assert (named == pages).all(), "what was not found is new"
        self.running[-1] = (history, pages)
        self.use(history)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        history, pages = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.pool.release(pages)
        held = self.held()
        for n in range(len(history), 0, -1):
            if history[:n] not in held:
                self.cached.remove(history[:n])
                self.cached.append(history[:n])

    @rule()
    def clear(self) -> None:
        idle = [history for history in self.cached if history not in self.held()]
        assert self.pool.clear() == len(idle)
        self.evict(len(idle))

    @invariant()
    def counts_agree(self) -> None:
        held = self.held()
        assert self.pool.n_used == len(held)
        assert self.pool.n_cached == len([h for h in self.cached if h not in held])
        assert self.pool.n_free == N_PAGES - len(held)

    @invariant()
    def pages_are_distinct_unless_equal(self) -> None:
        owners: dict[int, tuple[int, ...]] = {}
        for history, pages in self.running:
            for n, page in enumerate(pages.tolist()):
                assert owners.setdefault(page, history[: n + 1]) == history[: n + 1]
        for history in self.cached:
            assert all(history[:n] in self.cached for n in range(1, len(history))), "a page outlived its parent"


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def keys_of(*tokens: int) -> list[bytes]:
    return page_keys(begin(ROOT), np.array(tokens, dtype=np.int32), 1)


def test_equal_pages_computed_twice_are_kept_once() -> None:
    pool, keys = PagePool(8), keys_of(1, 2, 3)
    first, second = pool.allocate(3), pool.allocate(3)
    pool.name(keys, first)
    assert pool.name(keys, second).tolist() == first.tolist()
    held = pool.adopt(keys, second)
    assert held.tolist() == first.tolist()
    assert pool.n_used == 3 and pool.n_free == 5
    pool.release(held)
    assert pool.references(first).tolist() == [1, 1, 1]


def test_leaves_are_evicted_before_their_parents() -> None:
    pool = PagePool(4)
    pages = pool.allocate(4)
    pool.name(keys_of(1, 2, 3, 4), pages)
    pool.release(pages)
    taken = pool.allocate(2)
    assert sorted(taken.tolist()) == pages[2:].tolist()
    assert pool.lookup(keys_of(1, 2, 3, 4)).tolist() == pages[:2].tolist()
    assert pool.evicted_pages == 2


def test_a_tail_lives_as_long_as_its_page() -> None:
    pool = PagePool(4)
    page = pool.allocate(1)
    pool.insert_tail(b"tail", int(page[0]))
    assert pool.lookup_tail(b"tail") == page[0]
    pool.release(page)
    assert pool.lookup_tail(b"tail") is None
    kept = pool.allocate(1)
    pool.insert_tail(b"tail", int(kept[0]))
    pool.name(keys_of(1), kept)
    pool.release(kept)
    assert pool.lookup_tail(b"tail") == kept[0]
    pool.allocate(4)
    assert pool.lookup_tail(b"tail") is None


def test_without_caching_nothing_is_kept() -> None:
    pool = PagePool(4, caching=False)
    pages = pool.allocate(2)
    assert pool.adopt(keys_of(1, 2), pages).tolist() == pages.tolist()
    pool.release(pages)
    assert pool.n_cached == 0 and not len(pool.lookup(keys_of(1, 2)))


def test_more_than_there_is_cannot_be_had() -> None:
    pool = PagePool(3)
    with pytest.raises(AssertionError, match="asked for 4 of 3"):
        pool.allocate(4)
