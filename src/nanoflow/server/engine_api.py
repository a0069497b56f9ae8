"""What the server needs of an engine, as Protocols, so that it can be tested with a fake and knows nothing of torch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from nanoflow.analysis.report import RunReport
from nanoflow.core.config import EngineConfig
from nanoflow.core.model_spec import ModelSpec
from nanoflow.core.request import OutputDelta
from nanoflow.core.sampling import SamplingParams
from nanoflow.core.stats import EngineStats, WorkDone
from nanoflow.core.structured import StructuredOutput
from nanoflow.pipeline.pipeline import Pipeline
from nanoflow.text.base import Tokenizer


class RequestStream(Protocol):
    """The deltas of one prompt: for every choice 0..n-1, each choice ending with a `finish_reason`."""

    @property
    def request_id(self) -> str: ...

    @property
    def prompt_token_ids(self) -> Sequence[int]: ...

    def __aiter__(self) -> AsyncIterator[OutputDelta]: ...

    def abort(self) -> None:
        """Stop generating and free the pages. Idempotent; a finished stream ignores it."""
        ...


class Engine(Protocol):
    """An engine that is running. Everything is called in the event loop's thread."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def config(self) -> EngineConfig: ...

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def pipeline_name(self) -> str: ...

    @property
    def pipeline(self) -> Pipeline: ...

    @property
    def healthy(self) -> bool: ...

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        request_id: str | None = None,
        *,
        whole: bool = False,
        cache_salt: str | None = None,
        priority: int = 0,
    ) -> RequestStream:
        """Validate and queue at once; with `whole` each choice comes as one delta at its end.

        Only requests with equal `cache_salt` share KV pages; those with a smaller `priority` go first. The first delta
        of choice 0 tells `cached_tokens`.

        Raises `InvalidRequestError`, `QueueFullError`, `EngineDeadError`.
        """
        ...

    def prepare(self, wanted: StructuredOutput) -> None:
        """Compile what an answer shall match, so that `submit` need not. May block; any thread may call it.

        Raises `InvalidRequestError`, or `ConfigError` where the library for it is missing.
        """
        ...

    def stats(self) -> EngineStats: ...

    def report(self, elapsed_s: float, work: WorkDone) -> RunReport:
        """Work of `elapsed_s` seconds against the bound of this machine. The first call may block to measure it."""
        ...

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, wait up to `drain_s` seconds for the running ones, abort the rest."""
        ...


def served_model_name(engine: Engine) -> str:
    """The model id of the API: the name given for it, else what was loaded."""
    model = engine.config.model
    return model.served_model_name or model.model
