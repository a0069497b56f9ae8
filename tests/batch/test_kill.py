"""A job that is killed at any moment and run again: every answer once, none lost, whatever was torn."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path

import pytest

import nanoflow
from nanoflow.batch.counts import TokenCounts
from nanoflow.batch.job import BatchJob
from nanoflow.batch.paths import JobPaths
from nanoflow.batch.responder import Response
from nanoflow.batch.status import read_status
from nanoflow.core.errors import ConfigError
from tests.batch.scripted import IDENTITY, ScriptedResponder, answers, read_lines, request, run_job, write_input

ENV = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(nanoflow.__file__).parent.parent), os.getcwd()])}
N = 600


def requests(n: int) -> list[dict[str, object]]:
    return [request(f"id-{i}", "FAILED" if i % 10 == 3 else f"prompt {i}") for i in range(n)]


def expected(n: int) -> dict[str, str]:
    return {f"id-{i}": f"prompt {i}"[::-1] for i in range(n) if i % 10 != 3}


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    paths = JobPaths.beside(write_input(tmp_path / "in.jsonl", requests(N)), tmp_path / "out.jsonl")
    command = [sys.executable, "-m", "tests.batch.scripted", str(paths.input), str(paths.output), "0.06"]
    chance = random.Random(7)
    kept: set[str] = set()
    for _ in range(5):
        process = subprocess.Popen(command, env=ENV)
        before = paths.output.stat().st_size if paths.output.exists() else 0
        while process.poll() is None and (not paths.output.exists() or paths.output.stat().st_size == before):
            time.sleep(0.005)
        time.sleep(chance.random() * 0.15)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it had ended before it was killed"
        whole = [line for line in paths.output.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        now = {line.split(b'"')[7].decode() for line in whole}
        assert kept < now, "an answer that was in the output is gone"
        kept = now
    assert len(kept) < len(expected(N))
    assert subprocess.run(command, env=ENV, check=False).returncode == 0
    assert answers(paths.output) == expected(N)
    failed = read_lines(paths.errors)
    assert sorted(line["line"] for line in failed) == [i + 1 for i in range(N) if i % 10 == 3]
    texts = expected(N).values()
    n_prompt = sum(map(len, texts))
    assert read_status(paths.output).counts.tokens == TokenCounts(n_prompt, 2 * len(texts), len(texts))


@pytest.fixture
def half(tmp_path: Path) -> JobPaths:
    """A job of 20 requests with 10 outcomes, of which a checkpoint knows 6."""
    paths = JobPaths.beside(write_input(tmp_path / "in.jsonl", requests(20)), tmp_path / "out.jsonl")
    job = BatchJob.open(paths, IDENTITY)
    for line in range(1, 11):
        text = f"prompt {line - 1}"[::-1].encode()
        status = 500 if line == 4 else 200
        job.keep(line, f"id-{line - 1}", Response(status, b'{"text":"%s"}' % text, "q", TokenCounts(3, 2, 1)))
        if line == 6:
            job.save(job.checkpoint())
    job.close()
    return paths


def test_every_place_where_the_output_may_be_torn(half: JobPaths) -> None:
    """Cut after the last checkpoint at every byte of a line and around every line's end, the rest gone or zeros.

    Zeros are what a power failure may leave.
    """
    output, errors, journal = (path.read_bytes() for path in (half.output, half.errors, half.journal))
    ends = list(accumulate(map(len, output.splitlines(keepends=True))))
    around = {end + shift for end in ends[4:] for shift in (-2, -1, 0, 1)}
    for size in sorted({*range(ends[4], ends[5]), *(place for place in around if ends[4] <= place <= ends[-1])}):
        for torn in (output[:size], output[:size] + bytes(len(output) - size)):
            half.output.write_bytes(torn)
            half.errors.write_bytes(errors)
            half.journal.write_bytes(journal)
            job = BatchJob.open(half, IDENTITY)
            whole = output[:size].count(b"\n")
            assert job.counts.answered == whole
            assert [job.is_done(line) for line in (6, 7, 10)] == [True, whole > 5, whole == 9]
            assert half.output.read_bytes() == b"".join(output.splitlines(keepends=True)[:whole])
            job.close()
    run_job(half)
    assert answers(half.output) == expected(20)


def test_every_place_where_the_journal_may_be_torn(half: JobPaths) -> None:
    """The journal's end may be torn at any byte after the job's own record: the output tells the rest."""
    journal, output = half.journal.read_bytes(), half.output.read_bytes()
    header = len(journal.splitlines(keepends=True)[0])
    for size in range(header, len(journal) + 1):
        half.journal.write_bytes(journal[:size])
        job = BatchJob.open(half, IDENTITY)
        assert (job.counts.answered, job.counts.failed) == (9, 1)
        job.close()
        assert half.output.read_bytes() == output
    run_job(half)
    assert answers(half.output) == expected(20)
    assert len(read_lines(half.errors)) == 2


def test_a_job_killed_before_its_first_record_begins_anew(half: JobPaths) -> None:
    journal = half.journal.read_bytes()
    half.journal.write_bytes(journal[:40])
    with pytest.raises(ConfigError, match="exists and no journal tells"):
        BatchJob.open(half, IDENTITY)
    half.output.unlink()
    half.errors.unlink()
    run_job(half)
    assert answers(half.output) == expected(20)


def test_a_crash_of_the_responder_keeps_what_was_answered(tmp_path: Path) -> None:
    lines = requests(40)
    lines[30] = request("id-30", "CRASH")
    paths = JobPaths.beside(write_input(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    with pytest.raises(MemoryError, match="broke"):
        run_job(paths, ScriptedResponder(), in_flight=4, reorder=False)
    done = answers(paths.output)
    assert 20 < len(done) < 40
    with pytest.raises(MemoryError):
        run_job(paths, responder := ScriptedResponder(), in_flight=4, reorder=False)
    assert not set(responder.sent) & set(done), "what was answered is not asked again"
