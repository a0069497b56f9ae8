"""The calls of an answer in OpenAI's shape: whole, or as the deltas of a stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nanoflow.text.tool_calls.formats import CallPart
from nanoflow.text.tool_calls.reader import CallReader


@dataclass(frozen=True)
class CallShape:
    """What is read of each choice. `ends_by_calls`: an answer that called has finish reason `tool_calls`.

    Where the request names the function it has `stop` all the same, as in vLLM (its pull request 25054).
    """

    new_reader: Callable[[], CallReader]
    new_id: Callable[[], str]
    ends_by_calls: bool = True


@dataclass
class ChoiceCalls:
    """One choice as it is read."""

    shape: CallShape
    reader: CallReader = field(init=False)
    called: bool = False

    def __post_init__(self) -> None:
        self.reader = self.shape.new_reader()

    def take(self, text: str, *, last: bool) -> tuple[str, list[dict[str, Any]]]:
        """What `text` adds: content, and a delta for each call that gained something."""
        pieces = self.reader.feed(text)
        if last:
            pieces = [*pieces, *self.reader.finish()]
        deltas: dict[int, dict[str, Any]] = {}
        for piece in pieces:
            if isinstance(piece, CallPart):
                self._add(deltas, piece)
        return "".join(piece for piece in pieces if isinstance(piece, str)), list(deltas.values())

    def _add(self, deltas: dict[int, dict[str, Any]], part: CallPart) -> None:
        self.called = True
        if part.name is not None:
            function = {"name": part.name, "arguments": part.arguments}
            deltas[part.index] = {
                "index": part.index,
                "id": self.shape.new_id(),
                "type": "function",
                "function": function,
            }
        elif part.index in deltas:
            deltas[part.index]["function"]["arguments"] += part.arguments
        else:
            deltas[part.index] = {"index": part.index, "function": {"arguments": part.arguments}}

    def finish_reason(self, reason: str | None) -> str | None:
        """`reason`, the engine's, or `tool_calls` where the answer ended by calling."""
        return "tool_calls" if reason == "stop" and self.called and self.shape.ends_by_calls else reason


def whole_message(calls: ChoiceCalls, text: str) -> dict[str, Any]:
    """The message of a finished choice; its content is null if it only called."""
    content, made = calls.take(text, last=True)
    message: dict[str, Any] = {"role": "assistant", "content": content or None if made else content, "refusal": None}
    if made:
        message["tool_calls"] = [{key: value for key, value in call.items() if key != "index"} for call in made]
    return message
