"""What a batch job needs of whoever answers its requests: the engine behind the server's endpoints, or a far replica.

The job knows files, order and restarts; the responder knows what a request means. Neither imports the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from nanoflow.batch.counts import NO_TOKENS, TokenCounts
from nanoflow.batch.lines import BatchRequest

KEY_TOKENS = 2048
"""Prompt tokens that ordering looks at."""


@dataclass(frozen=True)
class Response:
    """An answer as HTTP would give it: `body` is one JSON object in ASCII. Status 200 is a success."""

    status: int
    body: bytes
    request_id: str
    tokens: TokenCounts = NO_TOKENS


@dataclass(frozen=True)
class Prepared:
    """A request that was checked and tokenised, waiting for its turn.

    `prefix_key` begins with the prompt's tokens, four big-endian bytes each, so that comparing keys compares prompts.
    `refusal` is the whole answer where the request was refused already; `work` is the responder's own.
    """

    line: int
    custom_id: str
    prefix_key: bytes = b""
    prompt_tokens: int = 0
    max_output_tokens: int = 0
    n_sequences: int = 1
    refusal: Response | None = None
    work: Any = field(default=None, repr=False)


class Responder(Protocol):
    """Answers requests; called in one event loop."""

    async def prepare(self, request: BatchRequest) -> Prepared:
        """Check and tokenise; a faulty request gets its refusal. Raises nothing for what a request can hold."""
        ...

    async def answer(self, prepared: Prepared) -> Response:
        """Generate. Cancelling it frees what it holds. A request that fails gets a response with its status.

        Raises `QueueFullError` to be asked again later, `EngineDeadError` if no request can be answered any more.
        """
        ...
