"""An engine without a model: text that follows from the request, at a chosen pace, with failures on demand.

The tokenizer has one token a Unicode code point below 0x3000 (id = code point), so token counts and offsets can be
worked out by hand; everything above becomes the bytes of U+FFFD. Prompts steer the fake: see `FakeEngine`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nanoflow.analysis.report import RunReport
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import EngineDeadError, InvalidRequestError, QueueFullError
from nanoflow.core.hardware import MachineRates
from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.request import FinishReason, Logprob, OutputDelta, TokenLogprobs
from nanoflow.core.sampling import SamplingParams
from nanoflow.core.stats import EngineStats, WorkDone
from nanoflow.core.structured import StructuredOutput
from nanoflow.pipeline.baselines import sequential
from nanoflow.pipeline.graph import layer_graph
from nanoflow.text.grammars import Grammars

VOCAB = 0x3000
ANSWER = "Paris is the capital of France, été comme hiver. "
MODEL = "fake/model"
RATES = MachineRates("fake machine", "bfloat16", flops_per_s=1e9, mem_bytes_per_s=1e8, measured=True)
CACHED_TOKENS = 2


class FakeTokenizer:
    """A token a code point; `<s>` (id 1) begins texts when special tokens are asked for."""

    vocab_size = VOCAB
    bos_id = 1
    eos_ids = (2,)
    has_chat_template = True
    special_ids = frozenset({1, 2})

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        text.encode("utf-8")  # a real tokenizer cannot take lone surrogates either
        ids = [ord(char) if ord(char) < VOCAB else 0xFFFD % VOCAB for char in text]
        return [1, *ids] if add_special_tokens and text else ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(i) for i in token_ids if not (skip_special_tokens and i in (1, 2)))

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode("utf-8", "replace")

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **template_args: Any,
    ) -> str:
        if messages[0]["content"] == "REFUSE":
            raise InvalidRequestError("the template refuses this; send another first message.", "messages")
        body = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return body + "".join(f"[{k}={v}]" for k, v in template_args.items()) + "<a>" * add_generation_prompt


class FakeStream:
    """One prompt's deltas, a token each, produced by a task of the engine."""

    def __init__(self, request_id: str, ids: list[int]) -> None:
        self.request_id = request_id
        self.prompt_token_ids = ids
        self.queue: asyncio.Queue[OutputDelta | Exception | None] = asyncio.Queue()
        self.aborted_at: float | None = None
        self.task: asyncio.Task[None] | None = None

    async def __aiter__(self) -> AsyncIterator[OutputDelta]:
        while (item := await self.queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def abort(self) -> None:
        if self.task is not None and not self.task.done() and self.aborted_at is None:
            self.aborted_at = time.monotonic()
            self.task.cancel()


class FakeEngine:
    """Answers `ANSWER`, repeated, one character a token, `delay_s` apart.

    Last words of the prompt: ERROR ends with finish reason "error" after 3 tokens, BOOM raises an unforeseen
    exception, DEAD raises `EngineDeadError`, SUBMIT-BOOM fails in `submit`. `max_active` fills the queue. A `script`
    is answered once instead, and ends by itself.
    """

    def __init__(self, *, delay_s: float = 0.0, max_model_len: int = 4096, max_active: int = 10_000) -> None:
        self.tokenizer = FakeTokenizer()
        self.config = EngineConfig.from_options(model="fake", served_model_name=MODEL)
        self.spec = ModelSpec("fake", "FakeForCausalLM", VOCAB, 8, 1, 1, 1, 8, 8, max_model_len)
        self.max_model_len = max_model_len
        self.pipeline = sequential(layer_graph(self.spec), 64)
        self.pipeline_name = self.pipeline.name
        self.work = WorkDone(iterations=7, prompt_tokens=11)
        self.healthy = True
        self.delay_s = delay_s
        self.max_active = max_active
        self.grammars = Grammars(self.tokenizer, VOCAB, self.tokenizer.eos_ids)
        self.script: str | None = None
        self.streams: list[FakeStream] = []
        self.params: list[SamplingParams] = []
        self.salts: list[str | None] = []
        self.priorities: list[int] = []
        self.finished: dict[str, int] = {}
        self.output_tokens = 0
        self.energy_j: float | None = None
        self.refusing = False

    @property
    def active(self) -> list[FakeStream]:
        return [stream for stream in self.streams if stream.task is not None and not stream.task.done()]

    def prepare(self, wanted: StructuredOutput) -> None:
        self.grammars.compile(wanted)

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        request_id: str | None = None,
        *,
        whole: bool = False,
        cache_salt: str | None = None,
        priority: int = 0,
    ) -> FakeStream:
        assert not isinstance(prompt, str), "the server tokenises"
        assert params.max_tokens is not None
        if self.refusing:
            raise EngineDeadError("secret: shut down")
        if len(self.active) >= self.max_active:
            raise QueueFullError("The queue is full; try again later.", retry_after_s=1.5)
        words = self.tokenizer.decode(list(prompt)).removesuffix("<a>")
        if words.endswith("SUBMIT-BOOM"):
            raise RuntimeError("secret: device on fire")
        stream = FakeStream(request_id or "none", list(prompt))
        stream.task = asyncio.get_running_loop().create_task(self._produce(stream, words, params))
        self.streams.append(stream)
        self.params.append(params)
        self.salts.append(cache_salt)
        self.priorities.append(priority)
        return stream

    async def _produce(self, stream: FakeStream, words: str, params: SamplingParams) -> None:
        try:
            for position in range(params.max_tokens or 0):
                await asyncio.sleep(self.delay_s)
                if position == 3 and words.endswith(("ERROR", "BOOM", "DEAD")):
                    self._fail(stream, words)
                    return
                going_on = [self._step(stream, params, position, choice) for choice in range(params.n)]
                if True not in going_on:
                    break
        except asyncio.CancelledError:
            for choice in range(params.n):
                stream.queue.put_nowait(OutputDelta(stream.request_id, choice, finish_reason="abort"))
                self.finished["abort"] = self.finished.get("abort", 0) + 1
        finally:
            stream.queue.put_nowait(None)

    def _fail(self, stream: FakeStream, words: str) -> None:
        if words.endswith("ERROR"):
            stream.queue.put_nowait(
                OutputDelta(stream.request_id, 0, finish_reason="error", error="secret: out of pages")
            )
        else:
            stream.queue.put_nowait(
                EngineDeadError("secret: dead") if words.endswith("DEAD") else RuntimeError("secret: boom")
            )

    def _step(self, stream: FakeStream, params: SamplingParams, position: int, choice: int) -> bool:
        """One token of one choice; true while it goes on. Stop strings end it before they are shown."""
        text_so_far = (self.script or ANSWER * (position // len(ANSWER) + 1))[: position + 1]
        reason: FinishReason | None = "length" if position + 1 == params.max_tokens else None
        if self.script is not None and position + 1 == len(self.script):
            reason = "stop"
        hit = next((stop for stop in params.stop if text_so_far.endswith(stop)), None)
        if hit is not None and text_so_far.index(hit) + len(hit) <= position:
            return False
        token = ord(text_so_far[-1])
        delta = OutputDelta(stream.request_id, choice, text_so_far[-1], [token], finish_reason=reason)
        if hit is not None:
            delta.finish_reason, delta.stop_reason, delta.text = "stop", hit, ""
        if params.logprobs is not None:
            delta.logprobs = [table(token, params.logprobs)]
        if params.prompt_logprobs is not None and position == 0 and choice == 0:
            ids = stream.prompt_token_ids
            delta.prompt_logprobs = [None, *(table(i, params.prompt_logprobs) for i in ids[1:])]
        if position == 0 and choice == 0:
            delta.cached_tokens = CACHED_TOKENS
        stream.queue.put_nowait(delta)
        self.output_tokens += 1
        if delta.finish_reason is not None:
            self.finished[delta.finish_reason] = self.finished.get(delta.finish_reason, 0) + 1
        return delta.finish_reason is None

    def stats(self) -> EngineStats:
        return EngineStats(
            n_running=len(self.active),
            kv_pages_used=4 * len(self.active),
            kv_pages_total=100,
            dense_batch=64,
            batch_tokens=16,
            preemptions=3,
            finished=dict(self.finished),
            work=replace(self.work, output_tokens=self.output_tokens),
            busy_s=1.25,
            energy_j=self.energy_j,
        )

    def report(self, elapsed_s: float, work: WorkDone) -> RunReport:
        return RunReport.of(elapsed_s, work, RATES)

    async def shutdown(self, drain_s: float = 0.0) -> None:
        self.refusing = True
        deadline = time.monotonic() + drain_s
        while self.active and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        for stream in self.active:
            stream.abort()


def table(token: int, k: int) -> TokenLogprobs:
    """The k likeliest tokens, the chosen one second among them (or added); from k = 5 the last is impossible."""
    entries = {token: Logprob(-1.0, 2, chr(token))}
    if k > 0:
        entries[token + 1] = Logprob(-0.5, 1)
    for rank in range(3, k + 1):
        entries[token + rank - 1] = Logprob(float("-inf") if rank == k > 4 else -float(rank), rank)
    return entries
