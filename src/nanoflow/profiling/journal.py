"""Results kept while a long measurement runs: one JSON line each, so that a second run continues where one stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanoflow.core.errors import ConfigError
from nanoflow.core.log import get_logger

log = get_logger(__name__)


class Journal:
    """Records by key. The first line says what they belong to; another header starts the file anew."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        """Raises `ConfigError` if the file cannot be written."""
        self.path = path
        self._header = json.loads(json.dumps(header))
        self.records: dict[str, Any] = self._read()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [self._header, *({"key": key, "value": value} for key, value in self.records.items())]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}; name another output file.") from error

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def add(self, key: str, value: Any) -> None:
        """Keep `value` (plain JSON values) at once."""
        self.records[key] = value
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "value": value}) + "\n")

    def remove(self) -> None:
        """Delete the file: what it held is safe elsewhere."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        """Records of an earlier run; a line that was cut off while it was written is left out."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return {}
        parsed = [line for line in map(_parse, lines) if line is not None]
        if not parsed:
            return {}
        if parsed[0] != self._header:
            log.warning("%s belongs to another measurement (machine, model or settings); it starts anew", self.path)
            return {}
        return {line["key"]: line["value"] for line in parsed[1:] if {"key", "value"} <= line.keys()}


def _parse(line: str) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None
