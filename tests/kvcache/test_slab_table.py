"""The slot table against a naive model: a list in order of use, and every rule applied by walking over it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tests.kvcache.ssd_pages import key_of, keys_of

from nanoflow.kvcache.slab_table import SlotTable

N_SLOTS = 6
chains = st.lists(st.integers(0, 11).map(key_of), unique=True, min_size=1, max_size=5)


class SlotTableMachine(RuleBasedStateMachine):
    """`held` is (key, slot) oldest first; `reserved`, `pins` and `doomed` as in the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(N_SLOTS)
        self.held: dict[bytes, int] = {}  # oldest first
        self.reserved: dict[bytes, int] = {}
        self.pins: dict[bytes, int] = {}
        self.doomed: dict[bytes, int] = {}
        self.retired: set[int] = set()

    def newest_last(self, keys: list[bytes]) -> None:
        for key in reversed(keys):
            if key in self.held and key not in self.pins:
                self.held[key] = self.held.pop(key)

    @rule(keys=chains)
    def reserve(self, keys: list[bytes]) -> None:
        keys = [key for key in keys if key not in self.held]
        slots = self.table.reserve(keys).tolist()
        busy = [i for i, key in enumerate(keys) if key in self.reserved or key in self.doomed]
        wanted = min([len(keys), *busy])
        while (used := self.used()) + wanted > N_SLOTS - len(self.retired - used_slots(self)):
            victim = next((key for key in self.held if key not in self.pins), None)
            if victim is None:
                wanted = N_SLOTS - len(self.retired - used_slots(self)) - used
                break
            del self.held[victim]
        assert len(slots) == wanted
        assert slots == sorted(set(slots)) and not set(slots) & (used_slots(self) | self.retired)
        self.reserved.update(zip(keys, slots, strict=False))

    def used(self) -> int:
        return len(self.held) + len(self.reserved) + len(self.doomed)

    @rule(data=st.data(), commit=st.booleans())
    def end_reservation(self, data: st.DataObject, commit: bool) -> None:
        if not self.reserved:
            return
        keys = data.draw(st.lists(st.sampled_from(sorted(self.reserved)), unique=True))
        if not commit:
            self.table.cancel(keys)
            for key in keys:
                del self.reserved[key]
            return
        self.table.commit(keys)
        for key in reversed(keys):
            self.held[key] = self.reserved.pop(key)

    @rule(keys=chains)
    def touch(self, keys: list[bytes]) -> None:
        self.table.touch(keys)
        self.newest_last(keys)

    @rule(keys=chains)
    def pin(self, keys: list[bytes]) -> None:
        slots = self.table.pin(keys).tolist()
        assert slots == [self.held.get(key, -1) for key in keys]
        for key in keys:
            if key in self.held:
                self.pins[key] = self.pins.get(key, 0) + 1

    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        if not self.pins:
            return
        keys = data.draw(st.lists(st.sampled_from(sorted(self.pins)), unique=True))
        self.table.unpin(keys)
        for key in reversed(keys):
            self.pins[key] -= 1
            if not self.pins[key]:
                del self.pins[key]
                self.doomed.pop(key, None)
                self.newest_last([key])

    @rule(keys=chains)
    def forget(self, keys: list[bytes]) -> None:
        slots = self.table.forget(keys)
        assert slots == [self.held[key] for key in keys if key in self.held]
        for key in keys:
            slot = self.held.pop(key, None)
            if slot is not None and key in self.pins:
                self.doomed[key] = slot

    @rule(slot=st.integers(0, N_SLOTS - 1), yes=st.integers(0, 9))
    def retire(self, slot: int, yes: int) -> None:
        if yes == 0 and len(self.retired) < 2:
            self.table.retire([slot])
            self.retired.add(slot)

    @invariant()
    def same_pages(self) -> None:
        every = keys_of(range(12))
        assert self.table.contains(every).tolist() == [key in self.held for key in every]
        assert len(self.table) == len(self.held)
        in_order = [key for key, _ in self.table.items_oldest_first() if key not in self.pins]
        assert in_order == [key for key in self.held if key not in self.pins]
        assert self.table.n_usable == N_SLOTS - len(self.retired)


def used_slots(machine: SlotTableMachine) -> set[int]:
    return {*machine.held.values(), *machine.reserved.values(), *machine.doomed.values()}


TestSlotTable = SlotTableMachine.TestCase
TestSlotTable.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def test_leaves_are_evicted_before_their_parents() -> None:
    table = SlotTable(4)
    chain = keys_of(range(4))
    table.reserve(chain)
    table.commit(chain)
    table.reserve([key_of(9)])
    assert table.contains(chain).tolist() == [True, True, True, False]


def test_restored_pages_keep_their_order_and_slots() -> None:
    table = SlotTable(4)
    table.restore([(key_of(1), 3), (key_of(2), 0), (key_of(3), 1)])
    assert table.pin([key_of(3)]).tolist() == [1]
    assert table.reserve(keys_of([7, 8])).tolist() == [2, 3], "the free slot and the oldest page's"
    assert table.contains(keys_of([1, 2, 3])).tolist() == [False, True, True]


def test_one_key_twice_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="once each"):
        SlotTable(4).reserve([key_of(1), key_of(1)])
