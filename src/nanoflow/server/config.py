"""The server's options and limits. Loads neither FastAPI nor uvicorn, so the command line can list them quickly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nanoflow.core import env
from nanoflow.core.errors import ConfigError
from nanoflow.text.tool_calls.formats import PARSERS


def _doc(text: str, **kwargs: Any) -> Any:
    return field(metadata={"help": text}, **kwargs)


@dataclass(frozen=True)
class ServerConfig:
    """Where to listen, who may call, and how much one client may ask for. Raises `ConfigError` naming the field."""

    host: str = _doc("address to listen on; 0.0.0.0 opens the server to the network", default="127.0.0.1")
    port: int = _doc("TCP port; 0 takes a free one", default=8000)
    api_key: str | None = _doc(
        "key that clients must send as a bearer token; better set as $NANOFLOW_API_KEY, where `ps` does not show it",
        default_factory=env.api_key,
        repr=False,
    )
    max_body_bytes: int = _doc("largest request body in bytes; a larger one is answered 413", default=8 << 20)
    max_n: int = _doc("most choices (n) for one prompt", default=128)
    max_prompts: int = _doc("most prompts in one completions request", default=256)
    max_connections: int = _doc("most open connections; further ones are answered 503", default=4096)
    drain_s: float = _doc("seconds that running requests may take to finish after SIGTERM", default=30.0)
    receive_timeout_s: float = _doc("seconds a client may take to send its headers, and again its body", default=30.0)
    send_timeout_s: float = _doc("seconds a client may leave a response unread before it is cut off", default=60.0)
    keep_alive_s: int = _doc("seconds an idle connection stays open", default=30)
    data_dir: str | None = _doc("folder of uploaded files and batches; one server each", default=None)
    max_file_bytes: int = _doc("largest uploaded file in bytes", default=1 << 30)
    restart_on_failure: bool = _doc("start the whole server again when its engine has failed", default=False)
    batch_in_flight: int | None = _doc("most choices of batches in the engine at once", default=None)
    tool_call_parser: str | None = _doc(
        "how the model writes calls of tools: hermes, llama3_json or mistral; with none they stay text", default=None
    )

    def __post_init__(self) -> None:
        if not self.host:
            raise ConfigError("host is empty; use 127.0.0.1, or 0.0.0.0 to listen on every address.")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be from 0 to 65535, not {self.port}.")
        if self.api_key is not None and not self.api_key:
            raise ConfigError("api_key is empty; leave it out to serve without a key.")
        for name in ("max_body_bytes", "max_n", "max_prompts", "max_connections", "keep_alive_s", "max_file_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.batch_in_flight is not None and self.batch_in_flight < 1:
            raise ConfigError(f"batch_in_flight must be at least 1, not {self.batch_in_flight}.")
        if not self.drain_s >= 0:
            raise ConfigError(f"drain_s must be at least 0, not {self.drain_s}.")
        if self.tool_call_parser is not None and self.tool_call_parser not in PARSERS:
            raise ConfigError(f"tool_call_parser must be one of {', '.join(PARSERS)}, not {self.tool_call_parser!r}.")
        for name in ("receive_timeout_s", "send_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}.")
