"""`LLM`: the offline Python API, in the shape that users of vLLM know. It drives the engine in the caller's thread."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from numbers import Integral
from types import FrameType, TracebackType
from typing import Any

from tqdm import tqdm

from nanoflow.analysis.report import RunReport
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import ConfigError, EngineDeadError, InvalidRequestError
from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.request import RequestOutput
from nanoflow.core.sampling import SamplingParams
from nanoflow.core.stats import EngineStats, WorkDone
from nanoflow.engine.build import Engine, build_engine
from nanoflow.engine.core import InFlightBatch
from nanoflow.engine.outputs import request_output
from nanoflow.engine.sequence import Sequence
from nanoflow.engine.submission import Prompt
from nanoflow.text.base import Tokenizer
from nanoflow.text.tool_calls.prompt import checked_tools, render_with_tools, uses_tools
from nanoflow.text.tool_calls.style import style_of

Message = Mapping[str, Any]


class LLM:
    """A model ready to generate.

    `LLM("smollm2", dtype="float32").generate(["Hello"], SamplingParams(max_tokens=8))[0].outputs[0].text`

    `options` are those of `EngineConfig.from_options`; docs/configuration.md lists them. Usable as a context manager.
    """

    def __init__(self, model: str, *, show_progress: bool = True, **options: Any) -> None:
        config = EngineConfig.from_options(model=model, **options)
        self._engine: Engine = build_engine(config, show_progress=show_progress)
        self._lock = threading.Lock()
        self._last_run: tuple[float, WorkDone] | None = None
        self._dead: str | None = None
        weakref.finalize(self, self._engine.close)  # a dropped LLM gives its threads and weights back

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
    def last_report(self) -> RunReport:
        """Throughput and percent of bound of the last `generate` or `chat` call."""
        if self._last_run is None:
            raise ConfigError("no run to report yet; call generate or chat first.")
        return self._engine.report(*self._last_run)

    def stats(self) -> EngineStats:
        """Counters and gauges of the engine so far."""
        return self._engine.core.stats()

    def generate(
        self,
        prompts: Prompt | Message | SequenceOf[Prompt | Message],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        *,
        priority: SequenceOf[int] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts, each a text, a list of token ids, or a mapping with `prompt` or `prompt_token_ids`.

        A mapping may bring a `cache_salt` too: only prompts with equal salts share KV pages. `priority` has a number
        for each prompt; smaller ones go first.
        Results come in the order of the prompts. Raises `InvalidRequestError` before anything runs if one is wrong.
        """
        given = _as_list(prompts)
        items, salts = [_unpacked(item) for item in given], [_salt_of(item) for item in given]
        params = _params_for(items, sampling_params)
        priorities = [0] * len(items) if priority is None else list(priority)
        if len(priorities) != len(items):
            raise InvalidRequestError(f"{len(items)} prompts but {len(priorities)} priorities; give one for each.")
        with self._lock:
            if self._dead is not None:
                raise EngineDeadError(f"the engine has stopped: {self._dead}; make a new LLM.")
            submission = self._engine.submission
            requests = [
                submission.sequences(submission.prompt_ids(item), choice, cache_salt=salt, priority=number)
                for item, choice, salt, number in zip(items, params, salts, priorities, strict=True)
            ]
            self._run([sequence for request in requests for sequence in request], use_tqdm=use_tqdm)
        texts = [item if isinstance(item, str) else None for item in items]
        return [request_output(text, request, self.tokenizer) for text, request in zip(texts, requests, strict=True)]

    def chat(
        self,
        messages: SequenceOf[Message] | SequenceOf[SequenceOf[Message]],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: SequenceOf[Message] | None = None,
        cache_salt: str | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of messages) or several (a list of such lists) by the chat template.

        `tools`, in OpenAI's form, are told to the model; its calls stay text (`text/tool_calls/reader.py` reads them).
        Only conversations with equal `cache_salt` share KV pages.
        """
        conversations: list[Any] = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        options = {"add_generation_prompt": add_generation_prompt, "chat_template": chat_template}
        rendered = [self._rendered(conversation, tools or (), options) for conversation in conversations]
        ids = [self.tokenizer.encode(text, add_special_tokens=False) for text in rendered]
        prompts = [{"prompt_token_ids": one, "cache_salt": cache_salt} for one in ids]
        outputs = self.generate(prompts, sampling_params, use_tqdm=use_tqdm)
        for output, text in zip(outputs, rendered, strict=True):
            output.prompt = text
        return outputs

    def _rendered(self, messages: SequenceOf[Message], tools: SequenceOf[Message], options: dict[str, Any]) -> str:
        """The prompt of one conversation."""
        if not tools and not uses_tools(messages):
            return self.tokenizer.render_chat(messages, **options)
        style = style_of(self.tokenizer, chat_template=options["chat_template"])
        return render_with_tools(self.tokenizer, style, messages, checked_tools(tools), options)

    def shutdown(self) -> None:
        """Keep KV pages where the config says, then stop the device's lanes. Idempotent.

        Later calls of `generate` raise `EngineDeadError`.
        """
        with self._lock:
            self._dead = self._dead or "it was shut down"
            self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _run(self, sequences: list[Sequence], *, use_tqdm: bool) -> None:
        core = self._engine.core
        before, started = core.stats().work, time.perf_counter()
        for sequence in sequences:
            core.add(sequence)
        in_flight: InFlightBatch | None = None
        progress = _Progress(core.stats, len(sequences), enabled=use_tqdm)
        interrupted = threading.Event()
        try:
            with _deferred_interrupt(interrupted):
                while core.has_work or in_flight is not None:
                    in_flight = core.step(in_flight)
                    progress.update()
                    if interrupted.is_set():  # end all, but let the device finish: the next call starts clean
                        for sequence in sequences:
                            if sequence.finish_reason is None:
                                core.abort(sequence)
        except BaseException as error:
            self._dead = f"{type(error).__name__}: {error}"
            core.fail_all(self._dead)
            raise
        finally:
            progress.close()
        if interrupted.is_set():
            raise KeyboardInterrupt
        self._last_run = (time.perf_counter() - started, core.stats().work - before)


@contextlib.contextmanager
def _deferred_interrupt(interrupted: threading.Event) -> Iterator[None]:
    """Ctrl-C sets `interrupted` instead of breaking into the middle of an iteration; a second one breaks in.

    Only where Ctrl-C would raise `KeyboardInterrupt`: who ignores or handles the signal goes on doing so.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Progress:
    """A bar over finished requests with tokens per second beside it."""

    def __init__(self, stats: Any, total: int, *, enabled: bool) -> None:
        self._stats = stats
        self._base: EngineStats = stats()
        self._bar = tqdm(total=total, unit="req", disable=not enabled, dynamic_ncols=True)
        self._started = time.perf_counter()
        self._next = 0.0

    def update(self) -> None:
        now = time.perf_counter()
        if self._bar.disable or now < self._next:
            return
        self._next = now + 0.2
        stats: EngineStats = self._stats()
        work = stats.work - self._base.work
        rate = (work.prompt_tokens + work.output_tokens) / max(now - self._started, 1e-9)
        self._bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
        done = sum(stats.finished.values()) - sum(self._base.finished.values())
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._next = 0.0
        self.update()
        self._bar.close()


def _as_list(prompts: Prompt | Message | SequenceOf[Prompt | Message]) -> list[Any]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    items = list(prompts)
    return [items] if items and isinstance(items[0], Integral) else items


def _unpacked(item: Any) -> Prompt:
    if isinstance(item, Mapping):
        for name in ("prompt_token_ids", "prompt"):
            if name in item:
                return item[name]  # type: ignore[no-any-return]
        raise InvalidRequestError("a prompt given as a mapping needs 'prompt' or 'prompt_token_ids'.", "prompt")
    return item  # type: ignore[no-any-return]


def _salt_of(item: Any) -> str | None:
    return item.get("cache_salt") if isinstance(item, Mapping) else None


def _params_for(
    items: list[Prompt], params: SamplingParams | SequenceOf[SamplingParams] | None
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(items)
    if len(params) != len(items):
        raise InvalidRequestError(
            f"{len(items)} prompts but {len(params)} sampling parameters; give one for each, or one for all."
        )
    return list(params)
