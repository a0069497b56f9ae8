"""A wrong command line is answered by one sentence that names the command and what is wrong."""

from __future__ import annotations

import pytest

from nanoflow.cli.main import main


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("generate", "nanoflow generate: the following arguments are required: MODEL"),
        ("generate m --temprature 1", "nanoflow generate: there is no --temprature; did you mean --temperature?"),
        ("generate m --temprature=1", "nanoflow generate: there is no --temprature=1; did you mean --temperature?"),
        ("serve m --max-num-seqs 4", "nanoflow serve: there is no --max-num-seqs; here it is --max-running; see"),
        ("serve m --gpu-memory-utilization=0.9", "nanoflow serve: there is no --gpu-memory-utilization"),
        ("serve --model m", "nanoflow serve: there is no --model; MODEL stands alone, without a flag; see"),
        ("serve m --dtype int8", "nanoflow serve: argument --dtype: invalid choice: 'int8'"),
        ("models extra", "nanoflow models: there is no extra here"),
        ("frobnicate", "nanoflow: argument COMMAND: invalid choice: 'frobnicate'"),
        ("", "nanoflow: the following arguments are required: COMMAND"),
    ],
)
def test_one_sentence(words: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(sentence)
    assert said.err.count("\n") == 1
    assert "--help" in said.err
