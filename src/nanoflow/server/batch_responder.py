"""Answers the lines of a batch with the endpoints' own checks and answers: a line fares as the same request would."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from nanoflow.batch.counts import TokenCounts
from nanoflow.batch.lines import BatchRequest
from nanoflow.batch.order import prefix_key
from nanoflow.batch.responder import Prepared, Response
from nanoflow.core.errors import EngineDeadError, QueueFullError
from nanoflow.core.request import BACKGROUND
from nanoflow.server.config import ServerConfig
from nanoflow.server.delivery import whole_answer
from nanoflow.server.endpoints import GenerationEndpoint, Job, generation_endpoints
from nanoflow.server.engine_api import Engine
from nanoflow.server.errors import ApiError, bad_request, to_api_error
from nanoflow.server.generation import Generation
from nanoflow.server.metrics import Metrics

_ENDS_THE_RUN = ("shutting_down", "engine_unavailable")


class EngineResponder:
    """A `Responder` over a running engine, whose requests go after all that somebody waits for.

    `only_url` refuses lines for another endpoint; None takes every one.
    """

    def __init__(
        self, engine: Engine, endpoints: Mapping[str, GenerationEndpoint], *, only_url: str | None = None
    ) -> None:
        self._engine = engine
        self._endpoints = endpoints
        self._only_url = only_url

    async def prepare(self, request: BatchRequest) -> Prepared:
        try:
            job = await self._endpoint(request.url).prepare(request.body)
            if job.stream:
                raise bad_request("A batch cannot stream; leave stream out.", "stream", "unsupported_value")
        except Exception as exc:
            return Prepared(request.line, request.custom_id, refusal=_failed(exc))
        return _prepared(request, job)

    async def answer(self, prepared: Prepared) -> Response:
        job: Job = prepared.work
        options: dict[str, Any] = {"cache_salt": job.cache_salt, "priority": BACKGROUND + job.priority}
        try:
            async with Generation(self._engine, None, job.prompts, whole=True, **options) as generation:
                body = await whole_answer(generation, job.answer)
        except QueueFullError:
            raise
        except Exception as exc:
            if self._engine_has_stopped(exc):
                raise EngineDeadError("the engine has stopped; start again, and the batch goes on.") from exc
            return _failed(exc)
        request_id = generation.streams[0].request_id
        tokens = TokenCounts(generation.prompt_tokens, generation.output_tokens, generation.cached_tokens)
        return Response(200, body, request_id, tokens)

    def _engine_has_stopped(self, exc: Exception) -> bool:
        """Whether it is not the request's fault that it failed: it will be answered by the next run."""
        ended = isinstance(exc, ApiError) and exc.code in _ENDS_THE_RUN
        return ended or isinstance(exc, EngineDeadError) or not self._engine.healthy

    def _endpoint(self, url: str) -> GenerationEndpoint:
        endpoint = self._endpoints.get(url)
        if endpoint is None:
            near = difflib.get_close_matches(url[:100], self._endpoints, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"use {' or '.join(self._endpoints)}."
            message = f"url {url[:100]!r} cannot be asked in a batch; {hint}"
            raise ApiError(404, message, code="invalid_url", param="url")
        if self._only_url is not None and url != self._only_url:
            message = f"url {url!r} is not the batch's endpoint; this batch is for {self._only_url}."
            raise bad_request(message, "url", "mismatched_url")
        return endpoint


def offline_responder(engine: Engine, *, tool_call_parser: str | None = None) -> EngineResponder:
    """A responder for an engine without a server; `tool_call_parser` is the server's option."""
    config, metrics = ServerConfig(api_key=None, tool_call_parser=tool_call_parser), Metrics(engine)
    return EngineResponder(engine, generation_endpoints(engine, config, metrics))


def _prepared(request: BatchRequest, job: Job) -> Prepared:
    params = [params for _, params in job.prompts]
    return Prepared(
        request.line,
        request.custom_id,
        prefix_key(job.prompts[0][0]),
        sum(len(ids) for ids, _ in job.prompts),
        max(p.max_tokens or 0 for p in params),
        sum(p.n for p in params),
        work=job,
    )


def _failed(exc: Exception) -> Response:
    request_id = uuid4().hex
    error = to_api_error(exc, request_id)
    return Response(error.status, error.body(), request_id)
