"""How the two endpoints write what was generated: as one JSON object, or as the JSON of one chunk of a stream.

Chunks are built from a head that never changes and the few parts that do, because hundreds of streams write one per
token.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from nanoflow.core.request import CompletionOutput, OutputDelta, TokenLogprobs
from nanoflow.server import logprobs as shapes
from nanoflow.server.calls import CallShape, ChoiceCalls, whole_message
from nanoflow.server.errors import encode_json
from nanoflow.text.base import Tokenizer

Usage = dict[str, Any]


def usage(prompt_tokens: int, output_tokens: int, cached_tokens: int) -> Usage:
    """Token counts in OpenAI's shape; `cached_tokens` of the prompt came from the KV cache."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


class Answer(ABC):
    """The shape of one answer: a chat or a plain completion. `n_logprobs` None means that none were asked for."""

    id_prefix: str
    object_name: str
    chunk_name: str

    def __init__(
        self, model: str, tokenizer: Tokenizer, *, n_logprobs: int | None = None, include_usage: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.n_logprobs = n_logprobs
        self.include_usage = include_usage
        self._common = {"id": f"{self.id_prefix}-{uuid4().hex}", "created": int(time.time()), "model": model}
        self._head = encode_json(self._common | {"object": self.chunk_name})[:-1] + b',"choices":['
        self._tail = b'],"usage":null}' if include_usage else b"]}"

    def usage(self, prompt_tokens: int, output_tokens: int, cached_tokens: int) -> Usage:
        """Token counts to report."""
        return usage(prompt_tokens, output_tokens, cached_tokens)

    def opening(self, n_choices: int) -> list[bytes]:
        """Chunks that come before any text."""
        return []

    @abstractmethod
    def chunks(self, delta: OutputDelta) -> list[bytes]:
        """The chunks for what a choice gained; none if there is nothing to show yet."""

    @abstractmethod
    def choice(self, output: CompletionOutput) -> dict[str, Any]:
        """A finished choice of the whole answer."""

    def usage_chunk(self, counts: Usage) -> bytes:
        """The last chunk of a stream whose client asked for token counts."""
        return self._head + b'],"usage":' + encode_json(counts) + b"}"

    def whole(
        self,
        outputs: Sequence[CompletionOutput],
        counts: Usage,
        prompt_logprobs: Sequence[Sequence[TokenLogprobs | None] | None],
    ) -> dict[str, Any]:
        """The answer to a request that did not stream. `prompt_logprobs` has an item a prompt."""
        choices = [self.choice(output) for output in outputs]
        return self._common | {"object": self.object_name, "choices": choices, "usage": counts}

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        return self._head + encode_json(choice) + self._tail


class ChatAnswer(Answer):
    """`/v1/chat/completions`. With `calls`, calls of tools are read out of the text."""

    id_prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        *,
        n_logprobs: int | None = None,
        include_usage: bool = False,
        calls: CallShape | None = None,
    ) -> None:
        super().__init__(model, tokenizer, n_logprobs=n_logprobs, include_usage=include_usage)
        self._shape = calls
        self._calls: dict[int, ChoiceCalls] = {}

    def opening(self, n_choices: int) -> list[bytes]:
        first = {"role": "assistant", "content": ""}
        return [
            self._chunk({"index": index, "delta": first, "logprobs": None, "finish_reason": None})
            for index in range(n_choices)
        ]

    def chunks(self, delta: OutputDelta) -> list[bytes]:
        logprobs = self._logprobs(delta.token_ids, delta.logprobs)
        text, called, reason = self._read(delta)
        if not text and not called and reason is None and not logprobs:
            return []
        gained: dict[str, Any] = {"content": text} if text or (logprobs and not called) else {}
        if called:
            gained["tool_calls"] = called
        choice = {"index": delta.index, "delta": gained, "logprobs": logprobs, "finish_reason": reason}
        if reason is not None:
            choice["stop_reason"] = delta.stop_reason
        return [self._chunk(choice)]

    def _read(self, delta: OutputDelta) -> tuple[str, list[dict[str, Any]], str | None]:
        """The content, the deltas of calls and the finish reason of a chunk."""
        if self._shape is None:
            return delta.text, [], delta.finish_reason
        calls = self._calls.get(delta.index)
        if calls is None:
            calls = self._calls[delta.index] = ChoiceCalls(self._shape)
        text, called = calls.take(delta.text, last=delta.finish_reason is not None)
        return text, called, calls.finish_reason(delta.finish_reason)

    def choice(self, output: CompletionOutput) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": output.text, "refusal": None}
        reason: str | None = output.finish_reason
        if self._shape is not None:
            calls = ChoiceCalls(self._shape)
            message = whole_message(calls, output.text)
            reason = calls.finish_reason(reason)
        return {
            "index": output.index,
            "message": message,
            "logprobs": self._logprobs(output.token_ids, output.logprobs),
            "finish_reason": reason,
            "stop_reason": output.stop_reason,
        }

    def whole(
        self,
        outputs: Sequence[CompletionOutput],
        counts: Usage,
        prompt_logprobs: Sequence[Sequence[TokenLogprobs | None] | None],
    ) -> dict[str, Any]:
        answer = super().whole(outputs, counts, prompt_logprobs)
        if prompt_logprobs[0] is not None:
            answer["prompt_logprobs"] = shapes.prompt_logprobs(self.tokenizer, prompt_logprobs[0])
        return answer

    def _logprobs(self, token_ids: list[int], tables: list[TokenLogprobs] | None) -> dict[str, Any] | None:
        if self.n_logprobs is None or not tables:
            return None
        return shapes.chat_logprobs(self.tokenizer, token_ids, tables, self.n_logprobs)


class CompletionAnswer(Answer):
    """`/v1/completions`.

    With `echo` each choice begins with its prompt: `echo_texts[p]`, and `echo_ids[p]` where log-probabilities are
    wanted too. Those of the prompt come with choice 0, so the prompt's other choices wait for it. `prompt_only` is
    echo with max_tokens 0: the one token the engine had to generate is dropped.
    """

    id_prefix = "cmpl"
    object_name = "text_completion"
    chunk_name = "text_completion"

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        *,
        n: int,
        n_logprobs: int | None = None,
        include_usage: bool = False,
        echo_texts: Sequence[str] | None = None,
        echo_ids: Sequence[list[int]] = (),
        show_prompt_logprobs: bool = False,
        prompt_only: bool = False,
    ) -> None:
        super().__init__(model, tokenizer, n_logprobs=n_logprobs, include_usage=include_usage)
        self._n = n
        self._echo_texts = echo_texts
        self._echo_ids = echo_ids
        self._show_prompt_logprobs = show_prompt_logprobs
        self._prompt_only = prompt_only
        self._offsets: dict[int, int] = {}
        self._prompt_tables: dict[int, list[TokenLogprobs | None]] = {}
        self._held: dict[int, list[OutputDelta]] = {}

    def usage(self, prompt_tokens: int, output_tokens: int, cached_tokens: int) -> Usage:
        return usage(prompt_tokens, 0 if self._prompt_only else output_tokens, cached_tokens)

    def chunks(self, delta: OutputDelta) -> list[bytes]:
        prompt = delta.index // self._n
        if delta.prompt_logprobs is not None:
            self._prompt_tables[prompt] = delta.prompt_logprobs
        if self._echoes_logprobs and prompt not in self._prompt_tables:
            self._held.setdefault(prompt, []).append(delta)
            return []
        ready = [delta, *self._held.pop(prompt, [])]
        return [chunk for item in ready for chunk in self._written(item)]

    def _written(self, delta: OutputDelta) -> list[bytes]:
        first = delta.index not in self._offsets
        choice = self._choice(delta.index, delta.text, delta.token_ids, delta.logprobs)
        echoed = first and self._echo_texts is not None
        if not choice["text"] and not choice["logprobs"] and delta.finish_reason is None and not echoed:
            return []
        return [self._chunk(choice | self._end(delta))]

    def choice(self, output: CompletionOutput) -> dict[str, Any]:
        written = self._choice(output.index, output.text, output.token_ids, output.logprobs)
        prompt = output.index // self._n
        if self._show_prompt_logprobs and prompt in self._prompt_tables:
            written["prompt_logprobs"] = shapes.prompt_logprobs(self.tokenizer, self._prompt_tables[prompt])
        return written | self._end(output)

    def whole(
        self,
        outputs: Sequence[CompletionOutput],
        counts: Usage,
        prompt_logprobs: Sequence[Sequence[TokenLogprobs | None] | None],
    ) -> dict[str, Any]:
        self._prompt_tables = {i: list(tables) for i, tables in enumerate(prompt_logprobs) if tables is not None}
        return super().whole(outputs, counts, prompt_logprobs)

    @property
    def _echoes_logprobs(self) -> bool:
        return self._echo_texts is not None and self.n_logprobs is not None

    def _end(self, part: OutputDelta | CompletionOutput) -> dict[str, Any]:
        if self._prompt_only:
            return {"finish_reason": part.finish_reason and "length", "stop_reason": None}
        return {"finish_reason": part.finish_reason, "stop_reason": part.stop_reason}

    def _choice(
        self, index: int, text: str, token_ids: list[int], tables: list[TokenLogprobs] | None
    ) -> dict[str, Any]:
        """Text and log-probabilities of a part of a choice, with the echoed prompt before its first part."""
        prompt = index // self._n
        ids, all_tables = list(token_ids), list[TokenLogprobs | None](tables or ())
        if self._prompt_only:
            text, ids, all_tables = "", [], []
        if index not in self._offsets:
            self._offsets[index] = 0
            if self._echo_texts is not None:
                text = self._echo_texts[prompt] + text
            if self._echoes_logprobs:
                ids = [*self._echo_ids[prompt], *ids]
                all_tables = [*self._prompt_tables[prompt], *all_tables]
        written = None
        if self.n_logprobs is not None and all_tables:
            written, self._offsets[index] = shapes.completion_logprobs(
                self.tokenizer, ids, all_tables, self.n_logprobs, self._offsets[index]
            )
        return {"index": index, "text": text, "logprobs": written}
