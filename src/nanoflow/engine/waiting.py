"""The sequences that wait for a slot, in the order in which they should get one.

By priority first, smaller ones before larger ones. Among equals, those that had a slot and gave it back come first, in
the order of their first admission; then the others, in the order of their arrival.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator
from itertools import chain

from nanoflow.engine.sequence import Sequence


class WaitingQueue:
    """A row for each priority that occurs. Its length may be read from another thread."""

    def __init__(self) -> None:
        self._rows: dict[int, deque[Sequence]] = {}
        self._priorities: list[int] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        if len(self._priorities) == 1:
            return iter(self._rows[self._priorities[0]])
        return chain.from_iterable([self._rows[priority] for priority in self._priorities])

    @property
    def best_priority(self) -> int:
        """That of the first sequence; the queue must not be empty."""
        return self._priorities[0]

    def append(self, sequence: Sequence) -> None:
        """A sequence has arrived."""
        self._row(sequence).append(sequence)
        self._length += 1

    def put_back(self, sequence: Sequence) -> None:
        """A sequence has given its slot back; its `age` says where among others of its kind it stands."""
        assert sequence.age is not None
        row = self._row(sequence)
        place = 0
        for other in row:
            if other.age is None or other.age > sequence.age:
                break
            place += 1
        row.insert(place, sequence)
        self._length += 1

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out. Raises `ValueError` if it is not here."""
        priority = sequence.request.priority
        row = self._rows.get(priority)
        if row is None:
            raise ValueError("the sequence does not wait")
        row.remove(sequence)
        self._length -= 1
        if not row:
            del self._rows[priority]
            self._priorities.remove(priority)

    def _row(self, sequence: Sequence) -> deque[Sequence]:
        priority = sequence.request.priority
        row = self._rows.get(priority)
        if row is None:
            row = self._rows[priority] = deque()
            insort(self._priorities, priority)
        return row
