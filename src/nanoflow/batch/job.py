"""A batch job on disk: what is finished, and how an answer becomes finished for good.

An answer is appended to the output by one `write` as soon as it is there, so a killed process loses none. About once a
second a checkpoint brings the files to disk and notes in the journal how long they are and which lines they answer. A
second run believes the journal up to there, reads the lines after it one by one, cuts off what a kill or a power
failure tore, and goes on.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nanoflow.batch.counts import NO_TOKENS, Checkpoint, Counts, TokenCounts
from nanoflow.batch.journal import Journal, write_all
from nanoflow.batch.outcomes import answer_line, cut, failure_line, outcomes_after
from nanoflow.batch.paths import JobPaths
from nanoflow.batch.responder import Response
from nanoflow.batch.survey import Survey, fingerprint, survey
from nanoflow.core.errors import ConfigError, NanoflowError

FORMAT = 1
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC


class OutputError(NanoflowError, OSError):
    """An answer could not be written (a full disk); everything before it is kept."""


class BatchJob:
    """An open job. One thread reads and adds; `save` may run in another. Close it to let others run the job."""

    def __init__(self, paths: JobPaths, journal: Journal, job_id: str, found: Survey) -> None:
        self.paths = paths
        self.id = job_id
        self.survey = found
        self.counts = Counts()
        self.ended = False
        self._journal = journal
        self._done = bytearray(found.n_lines // 8 + 1)
        self._unsaved: list[int] = []
        self._output_bytes = self._error_bytes = 0
        self._seconds_before = 0.0
        self._started_s: float | None = None
        self._output_fd = self._error_fd = -1

    @classmethod
    def open(
        cls,
        paths: JobPaths,
        identity: Mapping[str, Any],
        *,
        restart: bool = False,
        on_survey: Callable[[int], None] | None = None,
    ) -> BatchJob:
        """Begin a job, or go on with the one that `paths.journal` tells of.

        `identity` is what the answers depend on besides the input (the model); it must be the same in every run.
        Raises `ConfigError` if the input or the identity changed, if the output belongs to something else, or if
        another run has the job. `restart` drops the output and begins anew.
        """
        if not paths.input.is_file():
            raise ConfigError(f"there is no file {paths.input}; name a JSONL file of requests.")
        paths.make_folders()
        journal = Journal(paths.journal)
        try:
            if restart:
                journal.clear()
                cut(paths.output, 0)
                cut(paths.errors, 0)
            records = journal.recover()
            header = next(records, None)
            if header is None:
                job = _new(paths, journal, identity, on_survey)
            else:
                job = _resumed(paths, journal, header, records, identity)
            job._open_outputs()
        except BaseException:
            journal.close()
            raise
        return job

    def start_clock(self) -> None:
        """From now on time counts as spent on answering."""
        self._started_s = time.monotonic()

    def is_done(self, line: int) -> bool:
        """Whether an input line has its outcome already."""
        return bool(self._done[line >> 3] & (1 << (line & 7)))

    def keep(self, line: int, custom_id: str, response: Response) -> None:
        """Write an answer; from here on no kill loses it. Raises `OutputError`."""
        data = answer_line(self.id, line, custom_id, response)
        self._write(line, data, response.status != 200, response.tokens)

    def refuse(self, line: int, custom_id: str | None, code: str, message: str) -> None:
        """Write an input line that is no request into the error file. Raises `OutputError`."""
        self._write(line, failure_line(self.id, line, custom_id, code, message), True, NO_TOKENS)

    def checkpoint(self) -> Checkpoint | None:
        """What has to be saved now; None if nothing has. Hand it to `save`."""
        if not self._unsaved:
            return None
        lines, self._unsaved = self._unsaved, []
        return Checkpoint(lines, self._output_bytes, self._error_bytes, self.counts, self.seconds)

    def save(self, checkpoint: Checkpoint | None) -> None:
        """Bring answers to disk, then the journal's word on them. Raises `OutputError`; nothing is lost by it."""
        if checkpoint is None:
            return
        try:
            os.fsync(self._output_fd)
            os.fsync(self._error_fd)
            self._journal.append(checkpoint.record())
        except OSError as error:
            self._unsaved = checkpoint.lines + self._unsaved
            raise OutputError(f"cannot write {self.paths.journal}: {error.strerror}; then run it again.") from error

    def end(self) -> None:
        """Mark the job as finished. Raises `ConfigError` if the input was changed while it was read."""
        self.save(self.checkpoint())
        if self.paths.input.stat().st_size != self.survey.n_bytes:
            raise _changed(self.paths.input)
        if not self.ended:
            self._journal.append({"kind": "end", "at": time.time()})
            self.ended = True

    def close(self) -> None:
        """Close the files. Idempotent."""
        for fd in (self._output_fd, self._error_fd):
            if fd >= 0:
                os.close(fd)
        if self._output_fd >= 0:
            self._journal.close()
        self._output_fd = self._error_fd = -1

    @property
    def seconds(self) -> float:
        """Time spent on answering, over all runs."""
        this_run = 0.0 if self._started_s is None else time.monotonic() - self._started_s
        return self._seconds_before + this_run

    def _write(self, line: int, data: bytes, failed: bool, tokens: TokenCounts) -> None:
        assert not self.is_done(line), f"line {line} has its outcome already"
        path, fd = (self.paths.errors, self._error_fd) if failed else (self.paths.output, self._output_fd)
        try:
            write_all(fd, data)
        except OSError as error:
            with contextlib.suppress(OSError):  # what is torn would be cut off by the next run anyway
                os.ftruncate(fd, self._error_bytes if failed else self._output_bytes)
            raise OutputError(
                f"cannot write {path}: {error.strerror}; mend that and run the same command again, nothing is lost."
            ) from error
        if failed:
            self._error_bytes += len(data)
        else:
            self._output_bytes += len(data)
        self._unsaved.append(line)
        self._note(line, failed, tokens)

    def _note(self, line: int, failed: bool, tokens: TokenCounts) -> None:
        self._mark(line)
        self.counts = self.counts.plus(failed, tokens)

    def _mark(self, line: int) -> None:
        self._done[line >> 3] |= 1 << (line & 7)

    def _open_outputs(self) -> None:
        try:
            self._output_fd = os.open(self.paths.output, _APPEND, 0o644)
            self._error_fd = os.open(self.paths.errors, _APPEND, 0o644)
        except OSError as error:
            raise ConfigError(f"cannot write {error.filename}: {error.strerror}; choose another output.") from None

    def replay(self, record: Mapping[str, Any]) -> None:
        """Take in a journal record of an earlier run."""
        if record["kind"] == "end":
            self.ended = True
            return
        for line in record["lines"]:
            self._mark(line)
        self.counts = Counts.of_list(record["counts"])
        self._output_bytes, self._error_bytes = record["bytes"]
        self._seconds_before = record["seconds"]

    def recover_tails(self) -> None:
        """Take in what was written after the last checkpoint, and cut off what is torn."""
        for failed, path, start in (
            (False, self.paths.output, self._output_bytes),
            (True, self.paths.errors, self._error_bytes),
        ):
            end = start
            for outcome in outcomes_after(path, start, self.id):
                if not 0 < outcome.line <= self.survey.n_lines or self.is_done(outcome.line):
                    break
                self._note(outcome.line, failed, outcome.tokens)
                self._unsaved.append(outcome.line)
                end = outcome.end
            cut(path, end)
            if failed:
                self._error_bytes = end
            else:
                self._output_bytes = end


def _new(
    paths: JobPaths, journal: Journal, identity: Mapping[str, Any], on_survey: Callable[[int], None] | None
) -> BatchJob:
    for path in (paths.output, paths.errors):
        if path.exists() and path.stat().st_size:
            raise ConfigError(
                f"{path} exists and no journal tells where it comes from; choose another output, or drop it with "
                "--restart."
            )
    found = survey(paths.input, on_survey)
    job_id = secrets.token_hex(6)
    header = {"kind": "job", "format": FORMAT, "job": job_id, "identity": dict(identity), "created": time.time()}
    header["input"] = {"path": str(paths.input.absolute()), "bytes": found.n_bytes, "sha256": found.sha256}
    header |= {"lines": found.n_lines, "requests": found.n_requests, "repeated": found.repeated}
    journal.append(header)
    return BatchJob(paths, journal, job_id, found)


def _resumed(
    paths: JobPaths,
    journal: Journal,
    header: Mapping[str, Any],
    records: Iterator[dict[str, Any]],
    identity: Mapping[str, Any],
) -> BatchJob:
    if header.get("kind") != "job" or header.get("format") != FORMAT:
        raise ConfigError(f"{paths.journal} was not written by this version; choose another output, or use --restart.")
    for name in sorted({*identity, *header["identity"]}):
        was, now = header["identity"].get(name), identity.get(name)
        if was != now:
            raise ConfigError(
                f"this job was begun with {name} = {was!r}, not {now!r}; use {was!r} again, choose another output, or "
                "begin anew with --restart."
            )
    n_bytes, sha256 = header["input"]["bytes"], header["input"]["sha256"]
    if paths.input.stat().st_size != n_bytes or fingerprint(paths.input) != (n_bytes, sha256):
        raise _changed(paths.input)
    found = Survey(header["lines"], header["requests"], n_bytes, sha256, header["repeated"])
    job = BatchJob(paths, journal, header["job"], found)
    for record in records:
        job.replay(record)
    job.recover_tails()
    return job


def _changed(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} is not the file that this job was begun with; restore it, choose another output for the new one, or "
        "begin anew with --restart."
    )
