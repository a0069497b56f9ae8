"""Bringing a generation to the client, streamed or whole, and ending it the moment the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.types import Receive, Send

from nanoflow.core.log import get_logger
from nanoflow.core.request import CompletionOutput, OutputDelta, TokenLogprobs
from nanoflow.server.answers import Answer
from nanoflow.server.errors import ApiError, ClientGoneError, encode_json, shutting_down, to_api_error
from nanoflow.server.generation import Generation
from nanoflow.server.metrics import Metrics

log = get_logger(__name__)

SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, cancelling it when the client disconnects. The body must have been read. Raises `ClientGoneError`."""
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientGoneError
        worker.result()
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _failed(delta: OutputDelta) -> bool:
    return delta.finish_reason in ("error", "abort")


def _failure(delta: OutputDelta) -> ApiError:
    """The error that a failed delta tells of. The engine's words may quote an exception: only the log has them."""
    if delta.finish_reason == "abort":
        return shutting_down()
    log.error("request %s failed: %s", delta.request_id, delta.error)
    message = f"The engine failed on this request. The server's log has the cause under {delta.request_id}."
    return ApiError(500, message, code="engine_error")


async def send_whole(send: Send, generation: Generation, answer: Answer) -> None:
    """Wait for every choice, then send one JSON object. Raises `ApiError` if a choice failed."""
    await send_json(send, 200, await whole_answer(generation, answer))


async def whole_answer(generation: Generation, answer: Answer) -> bytes:
    """The JSON of a whole answer, when every choice has ended. Raises `ApiError` if one failed."""
    outputs = [CompletionOutput(index) for index in range(generation.n_choices)]
    prompt_logprobs: list[list[TokenLogprobs | None] | None] = [None] * len(generation.streams)
    while deltas := await generation.take():
        for delta in deltas:
            if _failed(delta):
                raise _failure(delta)
            _extend(outputs[delta.index], delta)
            if delta.prompt_logprobs is not None:
                prompt_logprobs[delta.index // generation.n] = delta.prompt_logprobs
    counts = answer.usage(generation.prompt_tokens, generation.output_tokens, generation.cached_tokens)
    return encode_json(answer.whole(outputs, counts, prompt_logprobs))


def _extend(output: CompletionOutput, delta: OutputDelta) -> None:
    output.text += delta.text
    output.token_ids.extend(delta.token_ids)
    if delta.logprobs is not None:
        output.logprobs = (output.logprobs or []) + delta.logprobs
    if delta.finish_reason is not None:
        output.finish_reason, output.stop_reason = delta.finish_reason, delta.stop_reason


async def send_stream(send: Send, generation: Generation, answer: Answer, metrics: Metrics, request_id: str) -> None:
    """Send server-sent events as text comes; an error in a started stream becomes an event, then the stream ends."""
    await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
    try:
        await _send_events(send, answer.opening(generation.n_choices))
        while deltas := await generation.take():
            good = [delta for delta in deltas if not _failed(delta)]
            await _send_events(send, [chunk for delta in good for chunk in answer.chunks(delta)])
            if len(good) < len(deltas):
                raise _failure(next(filter(_failed, deltas)))
        if answer.include_usage:
            counts = answer.usage(generation.prompt_tokens, generation.output_tokens, generation.cached_tokens)
            await _send_events(send, [answer.usage_chunk(counts)])
    except Exception as exc:
        error = to_api_error(exc, request_id)
        metrics.stream_errors.labels(error.code or "unknown").inc()
        await _send_events(send, [error.body()])
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


async def _send_events(send: Send, events: list[bytes]) -> None:
    if events:
        body = b"".join([b"data: " + event + b"\n\n" for event in events])
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def send_json(send: Send, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    """A complete JSON response."""
    pairs = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    pairs += [(name.encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body, "more_body": False})
