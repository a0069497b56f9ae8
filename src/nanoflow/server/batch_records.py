"""Batches as OpenAI's API shows them: a JSON object with a status and the time of each change."""

from __future__ import annotations

import time
from typing import Any

from nanoflow.batch.counts import Counts
from nanoflow.server.errors import bad_request
from nanoflow.server.parsing import parse
from nanoflow.server.protocol import StrictModel
from nanoflow.server.store import new_id

ENDED = ("completed", "failed", "cancelled")
COMPLETION_WINDOW = "24h"
MAX_METADATA = 16
_TIMES = ("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at")

Record = dict[str, Any]


class BatchCreate(StrictModel):
    """Body of `POST /v1/batches`."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, Any] | None = None


def parse_create(body: dict[str, Any], endpoints: tuple[str, ...]) -> BatchCreate:
    """The checked body. Raises a 400 naming the field."""
    asked = parse(BatchCreate, body)
    if asked.endpoint not in endpoints:
        raise bad_request(f"endpoint must be {' or '.join(endpoints)}, not {asked.endpoint[:100]!r}.", "endpoint")
    if asked.completion_window != COMPLETION_WINDOW:
        raise bad_request(f"completion_window must be {COMPLETION_WINDOW!r}.", "completion_window")
    metadata = asked.metadata or {}
    if len(metadata) > MAX_METADATA or any(not isinstance(value, str) for value in metadata.values()):
        raise bad_request(f"metadata must hold at most {MAX_METADATA} texts.", "metadata")
    return asked


def new_record(asked: BatchCreate, model: str) -> Record:
    """A batch that was just created."""
    record: Record = {
        "id": new_id("batch"),
        "object": "batch",
        "endpoint": asked.endpoint,
        "model": model,
        "errors": None,
        "input_file_id": asked.input_file_id,
        "completion_window": asked.completion_window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": int(time.time()),
    }
    record |= dict.fromkeys(_TIMES)
    return record | {"expires_at": None, "metadata": asked.metadata} | progress(0, Counts())


def progress(total: int, counts: Counts) -> Record:
    """`request_counts` and `usage`."""
    tokens = counts.tokens
    return {
        "request_counts": {"total": total, "completed": counts.answered, "failed": counts.failed},
        "usage": {
            "input_tokens": tokens.prompt,
            "input_tokens_details": {"cached_tokens": tokens.cached},
            "output_tokens": tokens.output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": tokens.prompt + tokens.output,
        },
    }


def changed(record: Record, status: str, **more: Any) -> Record:
    """The record in another status, with the time of the change."""
    return record | {"status": status, f"{status}_at": int(time.time())} | more


def failure(code: str, message: str) -> Record:
    """`errors` of a batch that failed as a whole."""
    return {"object": "list", "data": [{"code": code, "message": message, "param": None, "line": None}]}
