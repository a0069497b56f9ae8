"""The page allocator against a naive model that keeps a dictionary of owners."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nanoflow.kvcache.allocator import PageAllocator

N_PAGES = 12


class AllocatorMachine(RuleBasedStateMachine):
    """Random allocations, sharing and releases; `owners` counts how often each page is held."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(N_PAGES)
        self.owners: dict[int, int] = {}
        self.holdings: list[np.ndarray] = []

    @rule(share=st.floats(0.0, 1.0))
    def allocate(self, share: float) -> None:
        count = int(share * self.allocator.n_free)
        pages = self.allocator.allocate(count)
        assert pages.dtype == np.int32 and len(set(pages.tolist())) == count
        for page in pages.tolist():
            assert 0 <= page < N_PAGES and page not in self.owners, "a page was given away twice"
            self.owners[page] = 1
        self.holdings.append(pages)

    @precondition(lambda self: self.holdings)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        pages = data.draw(st.sampled_from(self.holdings))
        self.allocator.share(pages)
        for page in pages.tolist():
            self.owners[page] += 1
        self.holdings.append(pages)

    @precondition(lambda self: self.holdings)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages = self.holdings.pop(data.draw(st.integers(0, len(self.holdings) - 1)))
        self.allocator.release(pages)
        for page in pages.tolist():
            self.owners[page] -= 1
            if not self.owners[page]:
                del self.owners[page]

    @invariant()
    def counts_agree(self) -> None:
        assert self.allocator.n_used == len(self.owners)
        assert self.allocator.n_free == N_PAGES - len(self.owners)


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_misuse_is_noticed() -> None:
    allocator = PageAllocator(4)
    pages = allocator.allocate(3)
    with pytest.raises(AssertionError, match="asked for 2 of 1"):
        allocator.allocate(2)
    allocator.release(pages)
    with pytest.raises(AssertionError, match="released twice"):
        allocator.release(pages[:1])
    with pytest.raises(AssertionError, match="only owned pages"):
        allocator.share(pages)


def test_handed_out_pages_do_not_change_later() -> None:
    allocator = PageAllocator(8)
    first = allocator.allocate(4)
    kept = first.tolist()
    allocator.release(allocator.allocate(4))
    allocator.allocate(2)
    assert first.tolist() == kept
