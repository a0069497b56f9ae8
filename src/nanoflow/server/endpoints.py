"""The two endpoints that generate: read, check, tokenise, submit, deliver. Each is a plain ASGI application.

They own `receive`, so a client that leaves is noticed while the answer is computed, streamed or not.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from nanoflow.core.errors import InvalidRequestError
from nanoflow.core.log import get_logger
from nanoflow.core.sampling import SamplingParams
from nanoflow.server import parsing
from nanoflow.server.answers import Answer, ChatAnswer, CompletionAnswer
from nanoflow.server.body import read_json_object
from nanoflow.server.config import ServerConfig
from nanoflow.server.delivery import send_stream, send_whole, while_connected
from nanoflow.server.engine_api import Engine, served_model_name
from nanoflow.server.errors import ApiError, bad_request
from nanoflow.server.generation import Generation
from nanoflow.server.metrics import Metrics
from nanoflow.server.protocol import ChatRequest, CompletionRequest, GenerationFields
from nanoflow.server.structure import with_structure
from nanoflow.server.tools import Tools, tools_of
from nanoflow.text.tool_calls.prompt import render_with_tools, uses_tools
from nanoflow.text.tool_calls.style import ToolStyle, style_of

log = get_logger(__name__)

DEFAULT_COMPLETION_TOKENS = 16
_LONG_TEXT_CHARS = 8192
_RESERVED_TEMPLATE_ARGS = ("messages", "chat_template", "add_generation_prompt", "self", "tools")

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """A checked request: what to submit and how to answer."""

    prompts: list[tuple[list[int], SamplingParams]]
    answer: Answer
    stream: bool
    cache_salt: str | None = None
    priority: int = 0


class GenerationEndpoint(ABC):
    """What both endpoints do around their own `prepare`."""

    def __init__(self, engine: Engine, config: ServerConfig, metrics: Metrics) -> None:
        self.engine = engine
        self.config = config
        self.metrics = metrics
        self.model = served_model_name(engine)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json_object(scope, receive, self.config)
        await while_connected(receive, self._serve(body, send, scope["state"]["request_id"]))

    async def _serve(self, body: dict[str, Any], send: Send, request_id: str) -> None:
        job = await self.prepare(body)
        latencies = self.metrics.latencies
        async with Generation(
            self.engine, latencies, job.prompts, cache_salt=job.cache_salt, priority=job.priority
        ) as generation:
            if job.stream:
                await send_stream(send, generation, job.answer, self.metrics, request_id)
            else:
                await send_whole(send, generation, job.answer)

    @abstractmethod
    async def prepare(self, body: dict[str, Any]) -> Job:
        """Check the body and tokenise. Raises `ApiError` or `InvalidRequestError`."""

    def check_model(self, request: GenerationFields) -> None:
        """Refuse any model but the served one; a request that names none means that."""
        if request.model is not None and request.model != self.model:
            raise unknown_model(request.model, self.model)

    def fit(self, prompt_tokens: int, wanted: int | None, default: int | None, param: str) -> int:
        """How many tokens to generate at most: `wanted`, else `default` or less, else the rest of the context."""
        limit = self.engine.max_model_len
        room = limit - prompt_tokens
        if room < 1:
            raise bad_request(
                f"The prompt has {prompt_tokens} tokens, but the model's context is {limit} tokens and must hold the "
                f"answer too; shorten the prompt to at most {limit - 1} tokens.",
                param,
                "context_length_exceeded",
            )
        if wanted is None:
            return room if default is None else min(default, room)
        if wanted > room:
            shown = wanted if wanted < 10**20 else "far more"
            raise bad_request(
                f"The prompt has {prompt_tokens} tokens and max_tokens asks for {shown}, but the model's context is "
                f"{limit} tokens; lower max_tokens to at most {room} or shorten the prompt.",
                "max_tokens",
                "context_length_exceeded",
            )
        return wanted


def unknown_model(name: str, served: str) -> ApiError:
    """404 for a model that is not served here."""
    message = f"The model {name[:200]!r} does not exist here; this server has {served!r}."
    return ApiError(404, message, code="model_not_found", param="model")


async def off_loop(n_chars: int, work: Callable[[], T]) -> T:
    """Run `work`, in a thread if its text is long enough to hold up other requests."""
    return work() if n_chars <= _LONG_TEXT_CHARS else await asyncio.to_thread(work)


class ChatEndpoint(GenerationEndpoint):
    """`POST /v1/chat/completions`."""

    @cached_property
    def style(self) -> ToolStyle:
        """How this model is told of tools and calls them."""
        style = style_of(self.engine.tokenizer, self.config.tool_call_parser)
        told = (
            "its chat template knows tools" if style.native else "its chat template knows no tools, a text of ours does"
        )
        log.info("Calls of tools are %s; %s.", f"read as {style.format.name}" if style.reads else "left as text", told)
        return style

    async def prepare(self, body: dict[str, Any]) -> Job:
        request = parsing.parse(ChatRequest, body)
        self.check_model(request)
        options = parsing.stream_options(request)
        messages = parsing.messages_of(request)
        tools = tools_of(request, lambda: self.style)
        wanted = request.max_completion_tokens
        if wanted is None:
            wanted = request.max_tokens
        logprobs = _chat_logprobs(request)
        params = parsing.sampling_params(
            request,
            max_tokens=wanted,
            logprobs=logprobs,
            max_n=self.config.max_n,
            vocab_size=self.engine.spec.vocab_size,
        )
        ids = await off_loop(_n_chars(messages, tools), lambda: self._tokenise(request, messages, tools))
        if not ids:
            raise bad_request("messages hold no text; send at least one message with some.", "messages")
        params = replace(params, max_tokens=self.fit(len(ids), wanted, None, "messages"))
        params = await with_structure(params, request, self.engine, tools)
        answer = ChatAnswer(
            self.model,
            self.engine.tokenizer,
            n_logprobs=logprobs,
            include_usage=bool(options.include_usage),
            calls=None if tools is None else tools.shape(),
        )
        priority = parsing.priority_of(request)
        params = params if tools is None else tools.visible(params)
        return Job([(ids, params)], answer, bool(request.stream), parsing.cache_salt_of(request), priority)

    def _tokenise(self, request: ChatRequest, messages: Sequence[dict[str, Any]], tools: Tools | None) -> list[int]:
        tokenizer = self.engine.tokenizer
        if not tokenizer.has_chat_template:
            raise bad_request("This model has no chat template; use /v1/completions.")
        extra = request.chat_template_kwargs or {}
        for name in _RESERVED_TEMPLATE_ARGS:
            if name in extra:
                raise bad_request(f"chat_template_kwargs must not hold {name!r}; remove it.", "chat_template_kwargs")
        options = {**extra, "add_generation_prompt": request.add_generation_prompt is not False}
        if tools is None and not uses_tools(messages):
            text = tokenizer.render_chat(messages, **options)
        else:
            items, required, named = ((), False, None) if tools is None else (tools.items, tools.required, tools.named)
            text = render_with_tools(tokenizer, self.style, messages, items, options, required=required, named=named)
        return tokenizer.encode(text, add_special_tokens=False)


def _n_chars(messages: Sequence[dict[str, Any]], tools: Tools | None) -> int:
    """About how much text the prompt will have."""
    calls = sum(len(str(message["tool_calls"])) for message in messages if "tool_calls" in message)
    listed = 0 if tools is None else len(str(tools.items))
    return sum(len(message["content"]) for message in messages) + calls + listed


def _chat_logprobs(request: ChatRequest) -> int | None:
    if not request.logprobs:
        if request.top_logprobs:
            raise bad_request("top_logprobs needs logprobs to be true; set it.", "top_logprobs")
        return None
    k = request.top_logprobs or 0
    if not 0 <= k <= 20:
        raise bad_request("top_logprobs must be from 0 to 20.", "top_logprobs")
    return k


class CompletionEndpoint(GenerationEndpoint):
    """`POST /v1/completions`."""

    async def prepare(self, body: dict[str, Any]) -> Job:
        request = parsing.parse(CompletionRequest, body)
        self.check_model(request)
        options = parsing.stream_options(request)
        prompts = parsing.prompts_of(request, self.config.max_prompts, self.engine.spec.vocab_size)
        params, prompt_only = self._params(request)
        params = await with_structure(params, request, self.engine)
        self._check_counts(len(prompts), params.n)
        n_chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        ids = await off_loop(n_chars, lambda: [self._tokenise(prompt) for prompt in prompts])
        wanted = 1 if prompt_only else request.max_tokens
        jobs = [
            (tokens, replace(params, max_tokens=self.fit(len(tokens), wanted, DEFAULT_COMPLETION_TOKENS, "prompt")))
            for tokens in ids
        ]
        answer = CompletionAnswer(
            self.model,
            self.engine.tokenizer,
            n=params.n,
            n_logprobs=request.logprobs,
            include_usage=bool(options.include_usage),
            echo_texts=[self._text(prompt) for prompt in prompts] if request.echo else None,
            echo_ids=ids if request.echo else (),
            show_prompt_logprobs=request.prompt_logprobs is not None,
            prompt_only=prompt_only,
        )
        priority = parsing.priority_of(request)
        return Job(jobs, answer, bool(request.stream), parsing.cache_salt_of(request), priority)

    def _params(self, request: CompletionRequest) -> tuple[SamplingParams, bool]:
        """The parameters (max_tokens still as asked), and whether only the prompt is to be scored."""
        if request.best_of is not None and request.best_of != (request.n or 1):
            raise bad_request("best_of must equal n; leave it out and choose among n answers yourself.", "best_of")
        prompt_only = request.max_tokens == 0
        if prompt_only and not request.echo:
            raise bad_request("max_tokens must be at least 1; 0 works only with echo.", "max_tokens")
        params = parsing.sampling_params(
            request,
            max_tokens=1 if prompt_only else request.max_tokens,
            logprobs=request.logprobs,
            max_n=self.config.max_n,
            vocab_size=self.engine.spec.vocab_size,
        )
        if request.echo and request.logprobs is not None:
            params = replace(params, prompt_logprobs=max(request.logprobs, params.prompt_logprobs or 0))
        return params, prompt_only

    def _check_counts(self, n_prompts: int, n: int) -> None:
        places = self.engine.config.scheduler.max_queued
        if n_prompts * n > places:
            raise bad_request(
                f"{n_prompts} prompts with n = {n} make {n_prompts * n} sequences, but the queue holds {places}; "
                "send fewer prompts at once or lower n.",
                "n",
            )

    def _tokenise(self, prompt: parsing.Prompt) -> list[int]:
        ids = self.engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise InvalidRequestError("prompt is empty; send some text or token ids.", "prompt")
        return ids

    def _text(self, prompt: parsing.Prompt) -> str:
        if isinstance(prompt, str):
            return prompt
        return self.engine.tokenizer.decode(prompt, skip_special_tokens=False)


def generation_endpoints(engine: Engine, config: ServerConfig, metrics: Metrics) -> dict[str, GenerationEndpoint]:
    """Both endpoints by path."""
    return {
        "/v1/chat/completions": ChatEndpoint(engine, config, metrics),
        "/v1/completions": CompletionEndpoint(engine, config, metrics),
    }
