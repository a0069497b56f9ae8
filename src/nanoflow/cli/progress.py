"""Progress bars of the commands that take minutes."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class TaskBar:
    """A bar with the time left, which may serve several phases one after the other."""

    def __init__(self, name: str, *, show: bool) -> None:
        self._name = name
        self._show = show
        self._bar: Any = None

    def __enter__(self) -> TaskBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def phase(self, name: str) -> None:
        """Begin another phase with a bar of its own (a line where bars are not shown)."""
        self._close()
        self._name = name
        if not self._show:
            print(f"{name} ...", file=sys.stderr)

    def tasks(self, done: int, total: int, what: str) -> None:
        """`done` of `total` tasks are done; `what` comes next."""
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(desc=self._name, total=total, initial=done, disable=not self._show, leave=False)
        self._bar.set_postfix_str(what, refresh=False)
        self._bar.n, self._bar.total = done, total
        self._bar.refresh()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
