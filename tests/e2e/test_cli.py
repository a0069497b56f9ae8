"""The command line with the real small model: a right answer, clean JSON, a file of prompts, a piped chat.

One command and the server run as processes, as users start them; the others only need `main`, which both go through.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

import nanoflow
from nanoflow.cli.main import main

ENV = {**os.environ, "PYTHONPATH": str(Path(nanoflow.__file__).parent.parent)}
FRANCE = "What is the capital of France?"


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process; what comes back is what `subprocess.run` gives."""

    def run(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main(words)
        said = capsys.readouterr()
        return subprocess.CompletedProcess(words, code, said.out, said.err)

    return run


def run_process(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nanoflow.cli.main", *words]
    return subprocess.run(command, capture_output=True, text=True, env=ENV, input="", check=False, timeout=180)


def test_the_capital_of_france() -> None:
    done = run_process("generate", "smollm2", "--prompt", FRANCE, "--max-tokens", "16", "--temperature", "0", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert "Paris" in answer["text"]
    assert answer["finish_reason"] in ("stop", "length")
    usage = answer["usage"]
    assert 1 <= usage["completion_tokens"] <= 16
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert "% of the" in done.stderr
    assert "bound" in done.stderr


def test_a_file_of_prompts_and_stdin(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"id": "chat", "messages": [{"role": "user", "content": FRANCE}]},
        {"id": "raw", "prompt": "The capital of France is", "max_tokens": 4},
        {"id": "ids", "prompt_token_ids": [504, 3575, 282], "ignore_eos": True, "max_tokens": 5, "n": 2},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--max-tokens", "12", "--temperature", "0", "--json", "--dtype", "float32")
    done = run("generate", "smollm2", "--prompts", str(path), "--prompt", "-", *options, stdin=FRANCE + "\n")
    assert done.returncode == 0, done.stderr
    typed, chat, raw, ids_0, ids_1 = [json.loads(line) for line in done.stdout.splitlines()]
    assert chat["id"] == "chat"
    assert "Paris" in chat["text"]
    assert typed["text"] == chat["text"], "a typed prompt is the same chat"
    assert "Paris" in raw["text"]
    assert raw["usage"]["completion_tokens"] <= 4
    assert (ids_0["index"], ids_1["index"]) == (0, 1)
    assert ids_0["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


def test_a_piped_chat_remembers(run: Run) -> None:
    options = ("--temperature", "0", "--max-tokens", "24", "--dtype", "float32")
    done = run("chat", "smollm2", *options, stdin=f"{FRANCE}\nRepeat that.\n/quit\nnever read\n")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "Paris" in first
    assert "Paris" in second, "the second answer needs the first"


def test_serve_answers_and_drains() -> None:
    """From the log line that names the port to a clean exit on SIGTERM."""
    command = [sys.executable, "-m", "nanoflow.cli.main", "serve", "smollm2", "--port", "0", "--dtype", "float32"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENV) as server:
        assert server.stderr is not None
        try:
            said = []
            for line in server.stderr:
                said.append(line)
                if found := re.search(r"http://[\d.:]+", line):
                    break
            assert found, "".join(said)
            body = {"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
            request = urllib.request.Request(f"{found[0]}/v1/completions", json.dumps(body).encode())
            request.add_header("Content-Type", "application/json")
            with urllib.request.urlopen(request, timeout=60) as reply:
                assert "Paris" in json.load(reply)["choices"][0]["text"]
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=30) == 0
        finally:
            server.kill()


def test_an_unknown_model_is_a_sentence(run: Run) -> None:
    done = run("generate", "smolm2", "--prompt", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert "smollm2" in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_says_what_will_be_used(run: Run) -> None:
    done = run("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    usable = [offer["name"] for offer in found["kernels"] if offer["usable"]]
    assert found["use"]["kernels"] == usable[0]
    assert found["use"]["why"], "each choice comes with its reason"
    assert found["rates"]["flops_per_s"] > 1e9
    assert found["rates"]["mem_bytes_per_s"] > 1e8


def test_models_lists_presets_and_the_packaged_weights(run: Run) -> None:
    done = run("models", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in map(json.loads, done.stdout.splitlines()) if "name" in row}
    assert rows["smollm2"]["weights"] is not None
    assert rows["llama-3-70b"]["weights"] is None
    assert rows["llama-3-70b"]["parameters"] == pytest.approx(70.6e9, rel=0.01)
