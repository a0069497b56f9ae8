"""`nanoflow batch` with a stand-in for the engine: what is written and printed, and with which exit code it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.batch.scripted import read_lines, write_input
from tests.server.fake_engine import ANSWER, MODEL, FakeEngine

from nanoflow.cli import batch
from nanoflow.cli.main import main


class ClosableEngine(FakeEngine):
    closed = False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ClosableEngine:
    fake = ClosableEngine()
    monkeypatch.setattr(batch, "start_engine", lambda config, scaleout: fake)
    return fake


def chat(custom_id: str, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Hello {custom_id}"}]
    body = {"messages": messages, "max_tokens": 5, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def completion(custom_id: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": "Go on", "max_tokens": 3, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def files(folder: Path, *lines: Any) -> tuple[str, str]:
    return str(write_input(folder / "in.jsonl", lines)), str(folder / "out.jsonl")


def test_both_endpoints_are_answered_as_the_server_would(
    engine: ClosableEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = files(tmp_path, chat("c", n=2), completion("t"))
    target = str(tmp_path / "a folder" / "to be made" / "out.jsonl")
    assert main(["batch", "run", "fake", source, target]) == 0
    found = {line["custom_id"]: line["response"]["body"] for line in read_lines(Path(target))}
    assert found["c"]["object"] == "chat.completion"
    assert [choice["message"]["content"] for choice in found["c"]["choices"]] == [ANSWER[:5]] * 2
    assert found["t"]["object"] == "text_completion"
    assert found["t"]["choices"][0]["text"] == ANSWER[:3]
    usage = found["t"]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (6, 3, 9)
    printed = capsys.readouterr().out
    assert "finished: 2 of 2 requests done, 0 of them failed" in printed
    assert "% of the" in printed
    assert engine.closed


def test_refusals_are_those_of_the_server_and_make_exit_code_1(engine: ClosableEngine, tmp_path: Path) -> None:
    lines = [
        chat("ok"),
        chat("temprature", temprature=1),
        chat("stream", stream=True),
        completion("model", model="gpt-4"),
        completion("url", "/v1/embeddings"),
        completion("long", prompt="x" * 5000),
        completion("broken", prompt="ERROR", max_tokens=9),
    ]
    source, target = files(tmp_path, *lines)
    assert main(["batch", "run", "fake", source, target]) == 1
    assert [line["custom_id"] for line in read_lines(Path(target))] == ["ok"]
    errors = {line["custom_id"]: line for line in read_lines(tmp_path / "out.errors.jsonl")}
    seen = {name: (line["line"], line["response"]["status_code"]) for name, line in errors.items()}
    assert seen == {
        "temprature": (2, 400),
        "stream": (3, 400),
        "model": (4, 404),
        "url": (5, 404),
        "long": (6, 400),
        "broken": (7, 500),
    }
    words = {name: line["response"]["body"]["error"]["message"] for name, line in errors.items()}
    assert "did you mean 'temperature'" in words["temprature"]
    assert "leave stream out" in words["stream"]
    assert "this server has" in words["model"]
    assert "cannot be asked in a batch" in words["url"]
    assert "secret" not in words["broken"]


def test_json_result_and_status(engine: ClosableEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = files(tmp_path, chat("a"), chat("b"))
    assert main(["batch", "run", "fake", source, target, "--json", "--log-level", "error"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["state"], result["answered"], result["failed"]) == ("finished", 2, 0)
    assert result["run"]["bound"] in ("compute", "memory")
    assert main(["batch", "status", target, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["output_tokens"] == 10
    assert main(["batch", "status", target]) == 0
    assert "finished: 2 of 2" in capsys.readouterr().out


def test_a_dead_engine_ends_the_run_and_the_next_one_goes_on(
    engine: ClosableEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = files(tmp_path, chat("a"), completion("dead", prompt="DEAD", max_tokens=9), chat("b"))
    options = ["batch", "run", "fake", source, target, "--in-flight", "1", "--keep-order"]
    assert main(options) == 2
    assert "engine" in capsys.readouterr().err
    assert [line["custom_id"] for line in read_lines(Path(target))] == ["a"]
    assert main(["batch", "status", target]) == 1
    assert "interrupted: 1 of 3 requests done" in capsys.readouterr().out
    assert not read_lines(tmp_path / "out.errors.jsonl"), "nobody's request is to blame"


def test_a_changed_model_or_input_is_a_sentence(
    engine: ClosableEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = files(tmp_path, chat("a"))
    assert main(["batch", "run", "fake", source, target]) == 0
    assert main(["batch", "run", "other", source, target]) == 2
    assert "begun with model = 'fake', not 'other'" in capsys.readouterr().err
    write_input(Path(source), [chat("b")])
    assert main(["batch", "run", "fake", source, target]) == 2
    assert "is not the file that this job was begun with" in capsys.readouterr().err
    assert main(["batch", "run", "fake", source, target, "--restart"]) == 0
    assert [line["custom_id"] for line in read_lines(Path(target))] == ["b"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["batch"], "ACTION"),
        (["batch", "run", "fake", "IN"], "OUT.jsonl"),
        (["batch", "run", "fake", "IN", "OUT", "--windo", "3"], "did you mean --window"),
        (["batch", "status"], "OUT.jsonl"),
    ],
)
def test_a_wrong_command_line_is_a_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--window", "0"], "window"),
        (["--in-flight", "0"], "in-flight"),
        (["--errors", "OUT"], "three different files"),
    ],
)
def test_wrong_options(
    options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["batch", "run", "fake", "IN", "OUT", *options]) == 2
    assert sentence in capsys.readouterr().err
