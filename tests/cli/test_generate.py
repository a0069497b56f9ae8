"""`nanoflow generate` with a stand-in for the engine: what the engine is asked, what is printed, which exit code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from nanoflow.cli import generate
from nanoflow.cli.main import main
from nanoflow.core.errors import ModelLoadError
from nanoflow.core.request import CompletionOutput, Logprob, RequestOutput
from nanoflow.core.sampling import SamplingParams


class FakeTokenizer:
    has_chat_template = True

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens, "the template writes the special tokens"
        return [ord(letter) for letter in text]


class FakeReport:
    def summary(self) -> str:
        return "12.0 tokens/s, 34 % of the memory bound"


class FakeLLM:
    """Answers each prompt with its position; remembers what it was asked."""

    def __init__(self) -> None:
        self.tokenizer = FakeTokenizer()
        self.last_report = FakeReport()
        self.inputs: list[str | list[int]] = []
        self.params: list[SamplingParams] = []
        self.closed = False
        self.finish_reason: Any = "stop"

    def generate(self, inputs: list[Any], params: list[SamplingParams], use_tqdm: bool) -> list[RequestOutput]:
        self.inputs, self.params = inputs, params
        return [self._answer(i, params[i]) for i in range(len(inputs))]

    def _answer(self, i: int, params: SamplingParams) -> RequestOutput:
        logprobs = [{7: Logprob(-0.5, 1, "x")}] if params.logprobs is not None else None
        choices = [
            CompletionOutput(n, f" answer {i}.{n}", [7], logprobs, finish_reason=self.finish_reason)
            for n in range(params.n)
        ]
        return RequestOutput(str(i), None, [1, 2, 3], choices, finished=True)

    def shutdown(self) -> None:
        self.closed = True


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    fake = FakeLLM()
    monkeypatch.setattr(generate, "load_llm", lambda options: fake)
    return fake


def text_of(token_ids: Any) -> str:
    return "".join(map(chr, token_ids))


def test_json_is_one_object_a_line_and_nothing_else(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "m", "--prompt", "Hi", "--prompt", "Ho", "--json", "--n", "2"]) == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["id"], row["index"], row["prompt"]) for row in rows] == [
        (0, 0, "Hi"),
        (0, 1, "Hi"),
        (1, 0, "Ho"),
        (1, 1, "Ho"),
    ]
    assert rows[1]["text"] == " answer 0.1"
    assert rows[0]["finish_reason"] == "stop"
    assert rows[0]["usage"] == {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
    assert "of the memory bound" in err
    assert llm.closed


def test_typed_prompts_are_asked_as_a_chat(llm: FakeLLM) -> None:
    main(["generate", "m", "--prompt", "Hi"])
    assert text_of(llm.inputs[0]) == "<user>Hi"
    main(["generate", "m", "--prompt", "Hi", "--raw"])
    assert llm.inputs == ["Hi"]
    llm.tokenizer.has_chat_template = False
    main(["generate", "m", "--prompt", "Hi"])
    assert llm.inputs == ["Hi"]


def test_file_prompts_are_continued_unless_told(
    llm: FakeLLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "Hi"}\n{"messages": [{"role": "user", "content": "Yo"}]}\n{"prompt_token_ids": [5, 6], "seed": 3}\n'
    )
    assert main(["generate", "m", "--prompts", str(path), "--seed", "8", "--json"]) == 0
    assert llm.inputs[0] == "Hi"
    assert text_of(llm.inputs[1]) == "<user>Yo"
    assert llm.inputs[2] == [5, 6]
    assert [params.seed for params in llm.params] == [8, 8, 3]
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[1]["messages"] == [{"role": "user", "content": "Yo"}]
    assert rows[2]["prompt_token_ids"] == [5, 6]
    main(["generate", "m", "--prompts", str(path), "--chat"])
    assert text_of(llm.inputs[0]) == "<user>Hi"


def test_text_output_ends_with_the_bound(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "m", "--prompt", "Hi", "--prompt", "Ho"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["> Hi", "answer 0.0"]
    assert lines[-1] == "12.0 tokens/s, 34 % of the memory bound"


def test_logprobs_are_in_the_json(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    main(["generate", "m", "--prompt", "Hi", "--logprobs", "0", "--json"])
    row = json.loads(capsys.readouterr().out)
    assert row["logprobs"] == [{"7": {"logprob": -0.5, "rank": 1, "decoded_token": "x"}}]
    assert row["token_ids"] == [7]


def test_logprobs_that_nobody_would_see_are_refused(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "m", "--prompt", "Hi", "--logprobs", "2"]) == 2
    assert "--logprobs is shown with --json only" in capsys.readouterr().err
    assert not llm.inputs


def test_a_failed_request_fails_the_command(llm: FakeLLM) -> None:
    llm.finish_reason = "error"
    assert main(["generate", "m", "--prompt", "Hi"]) == 1


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("generate m", "give --prompt TEXT or --prompts FILE.jsonl"),
        ("generate m --prompt a --temperature -1", "temperature must be"),
        ("generate m --prompt a --dense-batch 0", "dense_batch must be"),
        ("generate m --prompts /no/such/file", "cannot read --prompts"),
    ],
)
def test_user_errors_are_one_sentence_and_exit_2(
    llm: FakeLLM, line: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("nanoflow: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert not llm.inputs, "refused before the model was asked"


def test_messages_need_a_template(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.tokenizer.has_chat_template = False
    assert main(["generate", "m", "--prompt", "Hi", "--chat"]) == 2
    assert "no chat template" in capsys.readouterr().err
    assert llm.closed, "the engine is shut down on errors too"


def test_a_model_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(options: dict[str, Any]) -> None:
        raise ModelLoadError("'m' is not a preset; did you mean smollm2?")

    monkeypatch.setattr(generate, "load_llm", refuse)
    assert main(["generate", "m", "--prompt", "Hi"]) == 2
    assert "did you mean smollm2?" in capsys.readouterr().err


def test_ctrl_c_exits_130_and_shuts_down(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(llm, "generate", interrupted)
    assert main(["generate", "m", "--prompt", "Hi"]) == 130
    assert llm.closed
