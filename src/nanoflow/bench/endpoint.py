"""Any server with OpenAI's completions API, as a target of the load generator.

Chunks of the stream are looked at as bytes: only the last one, which holds the token counts, is parsed, so that the
client stays cheap. Needs the package aiohttp.
"""

from __future__ import annotations

import json
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from nanoflow.bench.load import Heard, RequestError
from nanoflow.core.errors import ConfigError

if TYPE_CHECKING:
    import aiohttp

EVENT = b"data:"
NO_CHOICE = (b'"choices":[]', b'"choices": []')
CONNECT_S = 10.0
MODEL_LIST_S = 30.0


class Endpoint:
    """A server at `url` (with or without `/v1`). Use as an asynchronous context manager."""

    def __init__(self, url: str, *, model: str | None = None, api_key: str | None = None) -> None:
        base = url.rstrip("/")
        self.url = base if base.endswith("/v1") else f"{base}/v1"
        self.model = model
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    @property
    def name(self) -> str:
        return self.url

    async def __aenter__(self) -> Self:
        http = import_aiohttp()
        timeout = http.ClientTimeout(total=None, sock_connect=CONNECT_S)
        connector = http.TCPConnector(limit=0)
        self._session = http.ClientSession(headers=self._headers, timeout=timeout, connector=connector)
        if self.model is None:
            try:
                self.model = await self._first_model()
            except BaseException:
                await self._session.close()
                raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.close()

    def prepare(self, prompt: list[int], max_tokens: int, seed: int) -> bytes:
        """The body of a streamed completion of exactly `max_tokens` tokens."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 1.0,
            "seed": seed,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(body).encode()

    async def send(self, request: bytes, heard: Heard) -> None:
        """Stream one completion. The tokens are those that the server counts."""
        http = import_aiohttp()
        assert self._session is not None
        headers = {"Content-Type": "application/json"}
        try:
            async with self._session.post(f"{self.url}/completions", data=request, headers=headers) as response:
                if response.status != 200:
                    raise RequestError(f"HTTP {response.status}: {(await response.text())[:150]}")
                usage = await _listen(response.content, heard)
        except (http.ClientError, OSError) as error:
            raise RequestError(f"{type(error).__name__}: {error}") from error
        if usage is None:
            raise RequestError("the stream ended without token counts (stream_options.include_usage)")
        heard.n_tokens = int(usage["completion_tokens"])
        details = usage.get("prompt_tokens_details") or {}
        if "cached_tokens" in details:
            heard.cached_tokens = int(details["cached_tokens"] or 0)

    async def _first_model(self) -> str:
        http = import_aiohttp()
        assert self._session is not None
        try:
            async with self._session.get(
                f"{self.url}/models", timeout=http.ClientTimeout(total=MODEL_LIST_S)
            ) as response:
                found = await response.json(content_type=None)
                return str(found["data"][0]["id"])
        except (http.ClientError, OSError, TimeoutError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"{self.url}/models does not say which model is served ({type(error).__name__}: {error}); "
                "check --url and --api-key, or name the model with --served-model-name."
            ) from error


async def _listen(stream: aiohttp.StreamReader, heard: Heard) -> dict[str, Any] | None:
    """Note the time of each event with a choice in it; the usage of the event that has one."""
    usage: dict[str, Any] | None = None
    async for line in stream:
        if not line.startswith(EVENT):
            continue
        if b'"usage":{' in line or b'"usage": {' in line:
            usage = json.loads(line[len(EVENT) :])["usage"]
        if heard.first_s is None and b'"choices"' in line and not any(empty in line for empty in NO_CHOICE):
            heard.tokens(1)
        if b'"error"' in line and b'"choices"' not in line:
            raise RequestError(f"the stream broke off: {line[len(EVENT) :].decode(errors='replace').strip()[:150]}")
    return usage


def import_aiohttp() -> Any:
    """The HTTP client, or a `ConfigError` that says how to get it."""
    try:
        import aiohttp
    except ImportError as error:
        raise ConfigError(
            "benchmarks over HTTP need the package aiohttp: pip install 'nanoflow-serve[bench]'."
        ) from error
    return aiohttp
