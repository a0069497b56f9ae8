"""What a job refuses, what it says about it, and what its files hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nanoflow.batch import lines as lines_module
from nanoflow.batch.job import BatchJob, OutputError
from nanoflow.batch.paths import JobPaths
from nanoflow.batch.responder import Response
from nanoflow.batch.status import duration, read_status
from nanoflow.core.errors import ConfigError
from tests.batch.scripted import IDENTITY, ScriptedResponder, answers, read_lines, request, run_job, write_input


@pytest.fixture
def paths(tmp_path: Path) -> JobPaths:
    return JobPaths.beside(
        write_input(tmp_path / "in.jsonl", [request(str(i), f"p{i}") for i in range(5)]), tmp_path / "out.jsonl"
    )


def begun(paths: JobPaths) -> None:
    """One answer of the job is there."""
    job = BatchJob.open(paths, IDENTITY)
    job.keep(1, "0", Response(200, b'{"text":"0p"}', "q"))
    job.save(job.checkpoint())
    job.close()


def test_lines_are_openai_s_format(paths: JobPaths) -> None:
    run_job(paths)
    line = read_lines(paths.output)[0]
    assert list(line) == ["id", "custom_id", "response", "error"]
    assert line["id"].startswith("batch_req_")
    assert line["response"]["status_code"] == 200
    assert line["response"]["request_id"] == "q"
    assert line["error"] is None
    assert answers(paths.output) == {str(i): f"{i}p" for i in range(5)}


BAD: list[tuple[Any, str, str]] = [
    (b"{", "invalid_json", "not valid JSON"),
    (b"\xff\xfe", "invalid_json", "UTF-8"),
    (b"[1]", "invalid_json", "must be a JSON object"),
    (b'{"custom_id": NaN}', "invalid_json", "NaN"),
    (b"[" * 100_000, "invalid_json", "nested too deeply"),
    ({"method": "POST"}, "invalid_custom_id", "custom_id"),
    ({**request("", "p")}, "invalid_custom_id", "custom_id"),
    ({**request("x" * 600, "p")}, "invalid_custom_id", "1 to 512"),
    ({**request("m", "p"), "method": "GET"}, "invalid_method", "POST"),
    ({**request("u", "p"), "url": None}, "invalid_url", "url"),
    ({**request("b", "p"), "body": "p"}, "invalid_body", "body"),
    ({**request("f", "p"), "bodi": {}}, "unknown_field", "'bodi'"),
    (request("good", "again"), "duplicate_custom_id", "earlier line"),
]


def test_bad_lines_end_in_the_error_file_with_their_numbers(tmp_path: Path) -> None:
    lines = [request("good", "p"), b"", b"  \r", *(bad for bad, _, _ in BAD), request("no", "REFUSED"), b""]
    paths = JobPaths.beside(write_input(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    run_job(paths)
    assert answers(paths.output) == {"good": "p"}
    errors = {line["line"]: line for line in read_lines(paths.errors)}
    for number, (_, code, words) in enumerate(BAD, start=4):
        error = errors.pop(number)
        assert error["error"]["code"] == code
        assert words in error["error"]["message"]
        assert error["response"] is None
    refused = errors.pop(4 + len(BAD))
    assert refused["custom_id"] == "no"
    assert refused["response"]["status_code"] == 400
    assert not errors
    status = read_status(paths.output)
    assert (status.state, status.requests, status.counts.failed) == ("finished", len(BAD) + 2, len(BAD) + 1)


def test_a_line_longer_than_the_limit_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 200)
    lines = [request("a", "p"), request("long", "x" * 500), request("b", "q")]
    paths = JobPaths.beside(write_input(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    run_job(paths)
    assert answers(paths.output) == {"a": "p", "b": "q"}
    assert [(line["line"], line["error"]["code"]) for line in read_lines(paths.errors)] == [(2, "line_too_long")]


def test_a_changed_input_is_refused(paths: JobPaths) -> None:
    begun(paths)
    original = paths.input.read_bytes()
    for changed in (original.replace(b"p3", b"p4"), original + b"\n", original[:-9]):
        paths.input.write_bytes(changed)
        with pytest.raises(ConfigError, match="is not the file that this job was begun with"):
            BatchJob.open(paths, IDENTITY)
    paths.input.write_bytes(original)
    run_job(paths)
    assert len(answers(paths.output)) == 5


def test_another_model_is_refused(paths: JobPaths) -> None:
    begun(paths)
    with pytest.raises(ConfigError, match="begun with model = 'scripted', not 'other'"):
        BatchJob.open(paths, {"model": "other"})


def test_a_shortened_output_is_refused(paths: JobPaths) -> None:
    begun(paths)
    paths.output.write_bytes(paths.output.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="shorter than its journal says"):
        BatchJob.open(paths, IDENTITY)


def test_an_edited_journal_is_refused(paths: JobPaths) -> None:
    begun(paths)
    lines = paths.journal.read_bytes().splitlines(keepends=True)
    paths.journal.write_bytes(lines[0].replace(b"scripted", b"scribbled") + b"".join(lines[1:]))
    with pytest.raises(ConfigError, match="damaged at byte 0"):
        BatchJob.open(paths, IDENTITY)


def test_an_output_of_somebody_else_is_not_touched(paths: JobPaths) -> None:
    paths.output.write_text("precious")
    with pytest.raises(ConfigError, match="no journal tells where it comes from"):
        BatchJob.open(paths, IDENTITY)
    assert paths.output.read_text() == "precious"
    run_restarted(paths)
    assert len(answers(paths.output)) == 5


def run_restarted(paths: JobPaths) -> None:
    BatchJob.open(paths, IDENTITY, restart=True).close()
    run_job(paths)


def test_restart_drops_what_was_answered(paths: JobPaths) -> None:
    run_job(paths)
    first = read_status(paths.output).job_id
    run_restarted(paths)
    assert len(answers(paths.output)) == 5
    assert read_status(paths.output).job_id != first


def test_a_finished_job_asks_nothing(paths: JobPaths) -> None:
    run_job(paths)
    before = paths.output.read_bytes()
    run_job(paths, responder := ScriptedResponder())
    assert responder.n_prepared == 0
    assert paths.output.read_bytes() == before


def test_two_runs_at_once_are_refused(paths: JobPaths) -> None:
    job = BatchJob.open(paths, IDENTITY)
    with pytest.raises(ConfigError, match="another run is writing"):
        BatchJob.open(paths, IDENTITY)
    assert read_status(paths.output).state == "running"
    job.close()
    assert read_status(paths.output).state == "interrupted"


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl", [])
    with pytest.raises(ConfigError, match="cannot be made"):
        BatchJob.open(JobPaths.beside(source, source / "below" / "out.jsonl"), {})


def test_files_must_differ_and_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="three different files"):
        JobPaths.beside(tmp_path / "a.jsonl", tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="there is no file"):
        BatchJob.open(JobPaths.beside(tmp_path / "a", tmp_path / "b"), IDENTITY)
    with pytest.raises(ConfigError, match="has no journal"):
        read_status(tmp_path / "b")


def test_an_input_that_grows_while_it_is_read_is_noticed(paths: JobPaths) -> None:
    job = BatchJob.open(paths, IDENTITY)
    write_input(paths.input, [request(str(i), "p") for i in range(7)])
    with pytest.raises(ConfigError, match="is not the file"):
        job.end()
    job.close()


def test_a_full_disk_is_a_sentence_and_loses_nothing(paths: JobPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    job = BatchJob.open(paths, IDENTITY)
    job.keep(1, "0", Response(200, b'{"text":"0p"}', "q"))

    def full(fd: int, data: bytes) -> None:
        os.write(fd, data[:7])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("nanoflow.batch.job.write_all", full)
        with pytest.raises(OutputError, match="No space left on device; mend that and run the same command again"):
            job.keep(2, "1", Response(200, b'{"text":"1p"}', "q"))
    job.keep(3, "2", Response(200, b'{"text":"2p"}', "q"))
    job.close()
    run_job(paths)
    assert len(answers(paths.output)) == 5


def test_a_checkpoint_that_fails_is_made_up_for(paths: JobPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    job = BatchJob.open(paths, IDENTITY)

    def full(fd: int, data: bytes) -> None:
        os.write(fd, data[:7])
        raise OSError(28, "No space left on device")

    job.keep(1, "0", Response(200, b'{"text":"0p"}', "q"))
    with monkeypatch.context() as patched:
        patched.setattr("nanoflow.batch.journal.write_all", full)
        with pytest.raises(OutputError, match="No space left on device"):
            job.save(job.checkpoint())
    job.keep(2, "1", Response(200, b'{"text":"1p"}', "q"))
    job.save(job.checkpoint())
    job.close()
    assert read_status(paths.output).counts.answered == 2
    run_job(paths)
    assert len(answers(paths.output)) == 5


def test_status_counts_what_the_tail_holds(paths: JobPaths) -> None:
    begun(paths)
    status = read_status(paths.output)
    assert status.to_dict() | {"seconds_since_checkpoint": 0} == {
        "state": "interrupted",
        "job": status.job_id,
        "model": "scripted",
        "requests": 5,
        "answered": 1,
        "failed": 0,
        "prompt_tokens": 0,
        "cached_tokens": 0,
        "output_tokens": 0,
        "seconds": status.seconds,
        "tokens_per_s": 0.0,
        "seconds_left": status.seconds_left,
        "seconds_since_checkpoint": 0,
    }
    assert "1 of 5 requests done" in status.summary()
    json.dumps(status.to_dict())


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4 s"), (75, "1 min 15 s"), (7260, "2 h 1 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
