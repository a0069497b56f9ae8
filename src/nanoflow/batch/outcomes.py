"""The two files a job writes, in OpenAI's format: answers, and what could not be answered, a line each.

The id of a line, `batch_req_<job>_<number>`, ends with the number of the input line it belongs to. So the files tell by
themselves what is finished, whatever became of the journal's last seconds.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoflow.batch.counts import TokenCounts
from nanoflow.batch.responder import Response
from nanoflow.core.errors import ConfigError

_dumps = json.JSONEncoder(separators=(",", ":")).encode
_ID = re.compile(rb'\{"id":"batch_req_([0-9a-f]+)_([0-9]+)",')


@dataclass(frozen=True)
class Outcome:
    """A whole line of one of the files: which input line it ends, and what it took."""

    line: int
    tokens: TokenCounts
    end: int  # offset after it


def answer_line(job_id: str, line: int, custom_id: str, response: Response) -> bytes:
    """A line of the output file; of the error file (with `line`) if the status is not 200."""
    head = f'{{"id":"batch_req_{job_id}_{line}","custom_id":{_dumps(custom_id)},"response":{{"status_code":'
    head += f'{response.status},"request_id":{_dumps(response.request_id)},"body":'
    tail = '},"error":null}\n' if response.status == 200 else f'}},"error":null,"line":{line}}}\n'
    return head.encode("ascii") + response.body + tail.encode("ascii")


def failure_line(job_id: str, line: int, custom_id: str | None, code: str, message: str) -> bytes:
    """A line of the error file for an input line that is no request."""
    record = {
        "id": f"batch_req_{job_id}_{line}",
        "custom_id": custom_id,
        "response": None,
        "error": {"code": code, "message": message},
        "line": line,
    }
    return _dumps(record).encode("ascii") + b"\n"


def outcomes_after(path: Path, start: int, job_id: str) -> Iterator[Outcome]:
    """The whole lines of `job_id` from offset `start` on, up to the first that is torn or not ours.

    Raises `ConfigError` if the file is shorter than `start`: somebody cut it.
    """
    size = path.stat().st_size if path.exists() else 0
    if size < start:
        raise ConfigError(
            f"{path} is shorter than its journal says ({size} bytes instead of {start}): it was changed after the job "
            "wrote it; restore it, or begin again with --restart."
        )
    if size == start:
        return
    with path.open("rb") as file:
        file.seek(start)
        end = start
        for raw in file:
            end += len(raw)
            outcome = _outcome(raw, job_id, end)
            if outcome is None:
                return
            yield outcome


def cut(path: Path, size: int) -> None:
    """Drop what comes after `size`, if anything does."""
    if path.exists() and path.stat().st_size > size:
        os.truncate(path, size)


def _outcome(raw: bytes, job_id: str, end: int) -> Outcome | None:
    found = _ID.match(raw)
    if found is None or found[1] != job_id.encode() or not raw.endswith(b"}\n"):
        return None
    try:
        record: dict[str, Any] = json.loads(raw)
    except ValueError:
        return None
    usage = ((record.get("response") or {}).get("body") or {}).get("usage") or {}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    tokens = TokenCounts(usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0), cached)
    return Outcome(int(found[2]), tokens, end)
