"""`AsyncLLM`: the engine in a thread of its own, streaming to asyncio. The server stands on it.

The engine thread never touches asyncio objects. Once an iteration it hands the events of all streams to the event
loop in one call; text is made there, by the consumer that wants it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from nanoflow.analysis.report import RunReport
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import EngineDeadError, QueueFullError
from nanoflow.core.log import get_logger
from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.request import CompletionOutput, OutputDelta, RequestMetrics, RequestOutput
from nanoflow.core.sampling import SamplingParams
from nanoflow.core.stats import EngineStats, WorkDone
from nanoflow.core.structured import StructuredOutput
from nanoflow.engine.build import Engine, build_engine
from nanoflow.engine.core import InFlightBatch
from nanoflow.engine.outputs import completion_output, ends_with_hidden_stop_id, labelled, labelled_all, request_metrics
from nanoflow.engine.sequence import Sequence, TokenEvent
from nanoflow.engine.submission import Prompt
from nanoflow.engine.text_stream import TextStream
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.text.base import Tokenizer

_log = get_logger(__name__)


class RequestStream:
    """Deltas of one request as they come, for all its choices: an async iterator that ends when every choice has.

    Tokens that arrived since the last look come as one delta a choice. Leaving the iteration early does not stop the
    request; `abort` does.
    """

    def __init__(self, engine: AsyncLLM, sequences: list[Sequence], loop: asyncio.AbstractEventLoop) -> None:
        self.request_id = sequences[0].request.request_id
        self.prompt_token_ids = list(sequences[0].request.prompt_token_ids)
        self.loop = loop
        self._engine = engine
        self._sequences = sequences
        tokenizer = engine.tokenizer
        self._texts = [TextStream(tokenizer, sequence.request.params) for sequence in sequences]
        self._pending: deque[TokenEvent] = deque()
        self._arrived = asyncio.Event()
        self._open = len(sequences)
        self._prompt_shown = sequences[0].prompt_logprobs is None
        self._cached_shown = False

    def deliver(self, event: TokenEvent) -> None:
        """Called in the event loop for each event, in order."""
        self._pending.append(event)
        self._arrived.set()

    def abort(self) -> None:
        """Stop all choices and free their pages. Idempotent."""
        self._engine.abort(self._sequences)

    def metrics(self) -> RequestMetrics:
        """When the request arrived, showed its first token, and ended (as far as it has)."""
        return request_metrics(self._sequences)

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> OutputDelta:
        while not self._pending:
            if self._open == 0:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._next_delta()

    def _next_delta(self) -> OutputDelta:
        """One delta from the leading run of events that belong to the same choice."""
        sequence = self._pending[0].sequence
        if not sequence.streaming:
            self._pending.popleft()
            return self._whole_delta(sequence)
        events = [self._pending.popleft()]
        while self._pending and self._pending[0].sequence is sequence:
            events.append(self._pending.popleft())
        delta = OutputDelta(self.request_id, sequence.request.index)
        delta.token_ids = [event.token for event in events if event.token is not None]
        last = events[-1]
        if last.finish_reason is not None:
            self._open -= 1
            delta.finish_reason, delta.stop_reason, delta.error = (
                last.finish_reason,
                sequence.stop_reason,
                sequence.error,
            )
        delta.text = self._text_of(sequence, events, delta.token_ids)
        if sequence.logprobs is not None:
            tokenizer = self._engine.tokenizer
            delta.logprobs = [labelled(event.logprobs, tokenizer) for event in events if event.logprobs is not None]
        self._show_cached(sequence, delta)
        if not self._prompt_shown and delta.index == 0:
            self._prompt_shown = True
            delta.prompt_logprobs = labelled_all(self._sequences[0].prompt_logprobs, self._engine.tokenizer)
        return delta

    def _whole_delta(self, sequence: Sequence) -> OutputDelta:
        """All of a choice that was not streamed."""
        self._open -= 1
        output = completion_output(sequence, self._engine.tokenizer)
        delta = OutputDelta(self.request_id, output.index, output.text, output.token_ids, output.logprobs)
        delta.finish_reason, delta.stop_reason, delta.error = output.finish_reason, output.stop_reason, sequence.error
        self._show_cached(sequence, delta)
        if output.index == 0:
            delta.prompt_logprobs = labelled_all(sequence.prompt_logprobs, self._engine.tokenizer)
        return delta

    def _show_cached(self, sequence: Sequence, delta: OutputDelta) -> None:
        if delta.index == 0 and not self._cached_shown:
            self._cached_shown = True
            delta.cached_tokens = sequence.cached_tokens

    def _text_of(self, sequence: Sequence, events: list[TokenEvent], token_ids: list[int]) -> str:
        if sequence.stop_watch is not None:
            return "".join(event.text or "" for event in events)
        last = events[-1].finish_reason is not None
        hide = last and events[-1].token is not None and ends_with_hidden_stop_id(sequence)
        text, _ = self._texts[sequence.request.index].feed(token_ids, last=last, drop_last_token=hide)
        return text


class AsyncLLM:
    """A model that serves requests from an event loop; make it with `AsyncLLM.from_config`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._streams: dict[Sequence, RequestStream] = {}
        self._ended: deque[Sequence] = deque()  # those that are not streamed; only the engine thread touches it
        self._wake = threading.Condition()
        self._stopping = False
        self._draining = False
        self._dead: str | None = None
        if engine.ranks is not None:
            engine.ranks.on_failure = self._notice
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_config(cls, config: EngineConfig, *, show_progress: bool = True) -> AsyncLLM:
        """Load the model (blocking) and start the engine thread. Raises what `build_engine` raises."""
        return cls(build_engine(config, show_progress=show_progress))

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    @property
    def config(self) -> EngineConfig:
        """The resolved configuration."""
        return self._engine.config

    @property
    def spec(self) -> ModelSpec:
        return self._engine.spec

    @property
    def max_model_len(self) -> int:
        return self._engine.submission.max_model_len

    @property
    def pipeline_name(self) -> str:
        return self._engine.pipeline.name

    @property
    def pipeline(self) -> Pipeline:
        """What runs, with the times that its file holds."""
        return self._engine.pipeline

    @property
    def engine(self) -> Engine:
        """The parts underneath, for reports and tests."""
        return self._engine

    @property
    def healthy(self) -> bool:
        """Whether new requests are taken."""
        return self._dead is None and not self._draining

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None = None,
        *,
        whole: bool = False,
        cache_salt: str | None = None,
        priority: int = 0,
    ) -> RequestStream:
        """Check and queue a request; must be called in a running event loop.

        With `whole` each choice comes as one delta at its end, which spares the event loop the work of every token.
        Only requests with equal `cache_salt` share KV pages. Those with a smaller `priority` go first.
        Raises `InvalidRequestError`, `QueueFullError` or `EngineDeadError` at once.
        """
        core, limit = self._engine.core, self.config.scheduler.max_queued
        self._check_healthy()
        if core.n_queued + params.n > limit:
            raise QueueFullError(
                f"the queue holds its limit of {limit} requests; try again shortly.", retry_after_s=1.0
            )
        submission = self._engine.submission
        ids = submission.prompt_ids(prompt)
        sequences = submission.sequences(
            ids, params, request_id=request_id, streaming=not whole, cache_salt=cache_salt, priority=priority
        )
        stream = RequestStream(self, sequences, asyncio.get_running_loop())
        with self._wake:
            self._check_healthy()
            for sequence in sequences:
                self._streams[sequence] = stream
                sequence.on_end = self._ended.append if whole else None
                core.add(sequence)
            self._wake.notify()
        return stream

    def _check_healthy(self) -> None:
        if not self.healthy:
            raise EngineDeadError(self._dead or "the engine is shutting down; send the request elsewhere.")

    def prepare(self, wanted: StructuredOutput) -> None:
        """Compile what an answer shall match, so that `submit` need not; any thread may call it.

        Raises `InvalidRequestError`, or `ConfigError` where the library for it is missing.
        """
        self._engine.submission.grammars.compile(wanted)

    async def generate(
        self, prompt: Prompt, params: SamplingParams, request_id: str | None = None, *, priority: int = 0
    ) -> RequestOutput:
        """The whole answer to one prompt. Cancelling the task aborts the request."""
        stream = self.submit(prompt, params, request_id, priority=priority)
        text = prompt if isinstance(prompt, str) else None
        choices = [CompletionOutput(index) for index in range(params.n)]
        output = RequestOutput(stream.request_id, text, stream.prompt_token_ids, choices)
        try:
            async for delta in stream:
                output.extend(delta)
        except asyncio.CancelledError:
            stream.abort()
            raise
        output.metrics = stream.metrics()
        return output

    def abort(self, sequences: SequenceOf[Sequence]) -> None:
        """End sequences that have not ended; may be called from any thread."""
        for sequence in sequences:
            if sequence.finish_reason is None:
                self._engine.core.abort(sequence)
        with self._wake:
            self._wake.notify()

    def stats(self) -> EngineStats:
        """Counters and gauges now."""
        return replace(self._engine.core.stats(), energy_j=self._engine.energy_j())

    def report(self, elapsed_s: float, work: WorkDone) -> RunReport:
        """Work of `elapsed_s` seconds against the bound of this machine; the first call may measure it."""
        return self._engine.report(elapsed_s, work)

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Take no new requests, give running ones `drain_s` seconds, end the rest, stop the engine. Idempotent."""
        self._refuse_new()
        deadline = time.monotonic() + drain_s
        while self._streams and self._dead is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self.abort(list(self._streams))
        while self._streams and self._thread.is_alive():
            await asyncio.sleep(0.01)
        self._stop()

    def close(self) -> None:
        """`shutdown` without waiting, for callers that have no event loop. Idempotent."""
        self._refuse_new()
        self.abort(list(self._streams))
        self._stop()

    def _refuse_new(self) -> None:
        with self._wake:  # a `submit` in another thread is either done or refused
            self._draining = True

    def _stop(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=30)

    def _notice(self) -> None:
        """A rank has failed: the engine thread must not sleep on."""
        with self._wake:
            self._wake.notify()

    def _loop(self) -> None:
        """The engine thread: step while there is work, sleep while there is none."""
        engine, core = self._engine, self._engine.core
        in_flight: InFlightBatch | None = None
        try:
            while True:
                if in_flight is None and not core.has_work:
                    with self._wake:
                        self._wake.wait_for(lambda: core.has_work or self._stopping or engine.failed, core.idle_limit_s)
                    engine.check()
                    if self._stopping and not core.has_work:
                        break
                in_flight = core.step(in_flight)
                self._publish(self._take_events())
        except BaseException as error:
            _log.exception("the engine has stopped")
            with self._wake:  # so that no request is queued after the others were failed
                self._dead = f"the engine has stopped ({type(error).__name__}: {error}); restart the server."
                core.fail_all(self._dead)
            self._publish(self._take_events())
        finally:
            self._engine.close()

    def _take_events(self) -> list[TokenEvent]:
        """What streams have to hear: tokens of the streamed sequences, the end of the others."""
        events = self._engine.core.take_events()
        while self._ended:
            sequence = self._ended.popleft()
            events.append(TokenEvent(sequence, None, None, None, sequence.finish_reason))
        return events

    def _publish(self, events: list[TokenEvent]) -> None:
        """Hand events to the event loops that wait for them, one call a loop."""
        if not events:
            return
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[RequestStream, TokenEvent]]] = {}
        for event in events:
            ended = event.finish_reason is not None
            stream = self._streams.pop(event.sequence, None) if ended else self._streams.get(event.sequence)
            if stream is not None:
                by_loop.setdefault(stream.loop, []).append((stream, event))
        for loop, items in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver_all, items)
            except RuntimeError:  # that event loop is closed: nobody listens any more
                self.abort([event.sequence for _, event in items])


def _deliver_all(items: list[tuple[RequestStream, TokenEvent]]) -> None:
    for stream, event in items:
        stream.deliver(event)
