"""How an answer goes on at a second replica: it is computed again, and what the client has already is skipped.

Every request carries a seed, so the second replica gives the same tokens as the first one did (on devices where a
row's sum does not depend on its batch; see `docs/ray.md`). That is checked token by token: where it does not hold, the
answer ends with an error instead of going on with another text.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from nanoflow.core.request import OutputDelta


class DivergedError(Exception):
    """A second replica's answer is not the one that the client has the beginning of."""


@dataclass
class _Choice:
    """What was shown of a choice; while `behind`, what its second computation has made so far."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    ended: bool = False
    behind: OutputDelta | None = None


class Replay:
    """Passes on of each choice's deltas what has not been shown."""

    def __init__(self, n: int) -> None:
        self._choices = [_Choice() for _ in range(n)]
        self._cached_shown = self._prompt_shown = False

    @property
    def open(self) -> list[int]:
        """Choices that have not ended."""
        return [index for index, choice in enumerate(self._choices) if not choice.ended]

    @property
    def n_open(self) -> int:
        return sum(not choice.ended for choice in self._choices)

    @property
    def started(self) -> bool:
        """Whether anything was shown."""
        return any(choice.ids or choice.text or choice.ended for choice in self._choices)

    def restart(self) -> None:
        """From now on deltas come from a computation that began anew."""
        for choice in self._choices:
            choice.behind = OutputDelta("", 0) if choice.ids or choice.text else None

    def fresh(self, delta: OutputDelta) -> OutputDelta | None:
        """What is new in a delta, None if nothing is. Raises `DivergedError`."""
        choice = self._choices[delta.index]
        if choice.ended:
            return None
        caught_up = delta if choice.behind is None else _beyond(choice, choice.behind, delta)
        if caught_up is None:
            return None
        choice.ids += caught_up.token_ids
        choice.text += caught_up.text
        choice.ended = caught_up.finish_reason is not None
        return self._once(caught_up)

    def _once(self, delta: OutputDelta) -> OutputDelta:
        """Without what is said only once a request, if it was said."""
        if delta.cached_tokens is not None:
            delta.cached_tokens = None if self._cached_shown else delta.cached_tokens
            self._cached_shown = True
        if delta.prompt_logprobs is not None:
            delta.prompt_logprobs = None if self._prompt_shown else delta.prompt_logprobs
            self._prompt_shown = True
        return delta


def _beyond(choice: _Choice, again: OutputDelta, delta: OutputDelta) -> OutputDelta | None:
    """The part of `again` + `delta` that comes after what was shown, once there is one."""
    n_shown = len(choice.ids)
    again.token_ids += delta.token_ids
    again.text += delta.text
    if delta.logprobs is not None:
        again.logprobs = (again.logprobs or []) + delta.logprobs
    again.cached_tokens = delta.cached_tokens if again.cached_tokens is None else again.cached_tokens
    again.prompt_logprobs = delta.prompt_logprobs if again.prompt_logprobs is None else again.prompt_logprobs
    if delta.finish_reason in ("error", "abort"):
        choice.behind = None
        return delta
    n_known = min(n_shown, len(again.token_ids))
    n_chars = min(len(choice.text), len(again.text))
    if again.token_ids[:n_known] != choice.ids[:n_known] or again.text[:n_chars] != choice.text[:n_chars]:
        raise DivergedError
    if n_known < n_shown or n_chars < len(choice.text):
        if delta.finish_reason is not None:
            raise DivergedError
        return None
    choice.behind = None
    if len(again.token_ids) == n_shown and len(again.text) == n_chars and delta.finish_reason is None:
        return None
    return replace(
        delta,
        token_ids=again.token_ids[n_shown:],
        text=again.text[n_chars:],
        logprobs=None if again.logprobs is None else again.logprobs[n_shown:],
        cached_tokens=again.cached_tokens,
        prompt_logprobs=again.prompt_logprobs,
    )
