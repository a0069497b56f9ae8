"""`nanoflow chat` with a stand-in for the engine: history, commands, Ctrl-C, errors, and the engine's own thread."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import pytest

from nanoflow.cli import chat
from nanoflow.cli.main import main
from nanoflow.core.errors import EngineDeadError, InvalidRequestError, ModelLoadError
from nanoflow.core.request import OutputDelta
from nanoflow.core.sampling import SamplingParams


class FakeTokenizer:
    has_chat_template = True

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        return "|".join(f"{m['role'][0]}:{m['content']}" for m in messages)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]


class FakeStream:
    """Yields the engine's words; an exception among them is raised in its place."""

    def __init__(self, words: list[str | BaseException]) -> None:
        self.words = words
        self.ended = False
        self.aborted = False

    async def __aiter__(self) -> AsyncIterator[OutputDelta]:
        for word in self.words:
            if isinstance(word, BaseException):
                raise word
            yield OutputDelta("r", 0, text=word)
            await asyncio.sleep(0)
        self.ended = True
        yield OutputDelta("r", 0, finish_reason="stop")

    def abort(self) -> None:
        self.aborted = not self.ended


class FakeEngine:
    """Streams `words` for every prompt; remembers prompts as text."""

    def __init__(self) -> None:
        self.tokenizer = FakeTokenizer()
        self.words: list[str | BaseException] = ["Hel", "lo"]
        self.prompts: list[str] = []
        self.params: list[SamplingParams] = []
        self.streams: list[FakeStream] = []
        self.closed = False

    def submit(self, prompt: list[int], params: SamplingParams) -> FakeStream:
        asyncio.get_running_loop()
        self.prompts.append("".join(map(chr, prompt)))
        self.params.append(params)
        self.streams.append(FakeStream(self.words))
        return self.streams[-1]

    async def shutdown(self) -> None:
        self.closed = True


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()

    async def start(config: Any) -> FakeEngine:
        return fake

    monkeypatch.setattr(chat, "_start", start)
    return fake


def talk(monkeypatch: pytest.MonkeyPatch, text: str, *options: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return main(["chat", "m", *options])


def test_history_grows_and_answers_stream(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(monkeypatch, "one\n\ntwo\n", "--system", "S") == 0
    assert engine.prompts == ["s:S|u:one", "s:S|u:one|a:Hello|u:two"]
    assert capsys.readouterr().out == "Hello\nHello\n"
    assert engine.closed
    assert engine.params[0].max_tokens is None
    assert not any(stream.aborted for stream in engine.streams)


def test_reset_and_quit(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert talk(monkeypatch, "one\n/reset\ntwo\n/quit\nthree\n", "--system", "S") == 0
    assert engine.prompts == ["s:S|u:one", "s:S|u:two"]


def test_a_refused_turn_is_forgotten(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.words = [InvalidRequestError("the prompt is too long.")]
    assert talk(monkeypatch, "one\ntwo\n") == 0
    assert engine.prompts == ["u:one", "u:two"]
    assert "the prompt is too long." in capsys.readouterr().err


def test_a_dead_engine_ends_the_chat(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.words = ["He", EngineDeadError("the engine has stopped.")]
    assert talk(monkeypatch, "one\ntwo\n") == 2
    assert engine.prompts == ["u:one"]
    assert engine.closed


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = chat.BackgroundEngine.stream
    interrupts = iter([True, False])

    def interrupted(self: chat.BackgroundEngine, ids: list[int], params: SamplingParams) -> Iterator[OutputDelta]:
        deltas = stream(self, ids, params)
        yield next(deltas)
        if next(interrupts):
            raise KeyboardInterrupt
        yield from deltas

    monkeypatch.setattr(chat.BackgroundEngine, "stream", interrupted)
    assert talk(monkeypatch, "one\ntwo\n") == 0
    assert engine.prompts[1] == "u:one|a:Hel|u:two"
    assert "Hel (stopped)" in capsys.readouterr().out


def test_closing_a_stream_early_aborts_the_request(engine: FakeEngine) -> None:
    engine.words = ["word"] * 100_000
    background = chat.BackgroundEngine(None)  # type: ignore[arg-type] - the stand-in reads no config
    stream = background.stream([65], SamplingParams())
    assert next(stream).text == "word"
    stream.close()  # type: ignore[attr-defined]
    background.shutdown()
    assert engine.streams[0].aborted


def test_a_model_without_template_is_refused(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.tokenizer.has_chat_template = False
    assert talk(monkeypatch, "one\n") == 2
    assert "use `nanoflow generate`" in capsys.readouterr().err
    assert engine.closed


def test_a_model_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    async def refuse(config: Any) -> None:
        raise ModelLoadError("no such model.")

    monkeypatch.setattr(chat, "_start", refuse)
    assert talk(monkeypatch, "one\n") == 2
    assert capsys.readouterr().err == "nanoflow: no such model.\n"
