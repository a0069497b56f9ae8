"""`nanoflow chat`: talk to a model, word by word.

The engine runs on an event loop in a thread of its own, so that the main thread can wait for a line of input and
Ctrl-C can stop an answer without stopping the program.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import queue
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nanoflow.cli import options
from nanoflow.core.config import EngineConfig
from nanoflow.core.errors import InvalidRequestError, QueueFullError
from nanoflow.core.request import OutputDelta
from nanoflow.core.sampling import SamplingParams

if TYPE_CHECKING:
    from nanoflow.engine.async_llm import AsyncLLM

HELP = "talk to a model"
LOG_LEVEL = "WARNING"
DEFAULTS = {"max_tokens": None, "temperature": 0.7, "top_p": 0.95}
GREETING = "Ctrl-C stops an answer; /reset forgets the conversation; /quit or Ctrl-D ends it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    options.add_engine_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message that every conversation begins with")
    options.add_sampling_options(parser, **DEFAULTS)


def run(args: argparse.Namespace) -> int:
    """Load the model and talk until the input ends."""
    params = SamplingParams(**{**DEFAULTS, **options.sampling_options(args)})
    config = EngineConfig.from_options(**options.engine_options(args))
    if params.n != 1:
        raise InvalidRequestError("a chat has one answer at a time; leave --n out.", "n")
    engine = BackgroundEngine(config)
    try:
        if not engine.tokenizer.has_chat_template:
            raise InvalidRequestError("this model has no chat template; use `nanoflow generate` instead.")
        talk(engine, params, args.system)
    finally:
        engine.shutdown()
    return 0


class BackgroundEngine:
    """An `AsyncLLM` on its own event loop and thread, seen as plain iterators."""

    def __init__(self, config: EngineConfig) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chat-engine", daemon=True)
        self._thread.start()
        try:
            self._engine: AsyncLLM = asyncio.run_coroutine_threadsafe(_start(config), self._loop).result()
        except BaseException:
            self._stop_loop()
            raise
        self.tokenizer = self._engine.tokenizer

    def stream(self, prompt_ids: list[int], params: SamplingParams) -> Iterator[OutputDelta]:
        """Deltas of one answer; closing the iterator early aborts the request."""
        deltas: queue.SimpleQueue[OutputDelta | BaseException | None] = queue.SimpleQueue()

        async def pump() -> None:
            try:
                stream = self._engine.submit(prompt_ids, params)
                try:
                    async for delta in stream:
                        deltas.put(delta)
                finally:
                    stream.abort()
            except Exception as error:
                deltas.put(error)
            finally:
                deltas.put(None)

        future = asyncio.run_coroutine_threadsafe(pump(), self._loop)
        try:
            while (item := deltas.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            future.cancel()

    def shutdown(self) -> None:
        """Stop the engine and its thread."""
        asyncio.run_coroutine_threadsafe(self._engine.shutdown(), self._loop).result(timeout=30)
        self._stop_loop()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)


async def _start(config: EngineConfig) -> AsyncLLM:
    from nanoflow.engine.async_llm import AsyncLLM

    return AsyncLLM.from_config(config, show_progress=sys.stderr.isatty())


def talk(engine: BackgroundEngine, params: SamplingParams, system: str | None) -> None:
    """Read a line, stream the answer, remember both."""
    opening = [{"role": "system", "content": system}] if system else []
    history: list[dict[str, Any]] = list(opening)
    interactive = sys.stdin.isatty()
    if interactive:
        print(GREETING)
    while (line := read_line(interactive)) is not None:
        if line == "/quit":
            return
        if line == "/reset":
            history = list(opening)
            print("(forgotten)" if interactive else "", end="\n" if interactive else "")
        elif line:
            history.append({"role": "user", "content": line})
            answer = print_answer(engine, history, params)
            if answer is None:
                history.pop()
            else:
                history.append({"role": "assistant", "content": answer})


def read_line(interactive: bool) -> str | None:
    """The next line, stripped; None at the end of input."""
    if not interactive:
        line = sys.stdin.readline()
        return line.strip() if line else None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() a history and arrow keys
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return None


def print_answer(engine: BackgroundEngine, history: list[dict[str, Any]], params: SamplingParams) -> str | None:
    """Stream one answer to stdout and return it; None if the request was refused. Ctrl-C keeps what was said so far."""
    said: list[str] = []
    try:
        prompt_ids = engine.tokenizer.encode(engine.tokenizer.render_chat(history), add_special_tokens=False)
        stream = engine.stream(prompt_ids, params)
        try:
            for delta in stream:
                if delta.finish_reason == "error":
                    raise InvalidRequestError(delta.error or "the request failed.")
                said.append(delta.text)
                print(delta.text, end="", flush=True)
        finally:
            stream.close()  # type: ignore[attr-defined]
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    except (InvalidRequestError, QueueFullError) as error:
        print(f"nanoflow: {error} (/reset starts anew)", file=sys.stderr)
        return None
    print(flush=True)
    return "".join(said)
