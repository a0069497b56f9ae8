"""Measured rates kept between runs: one JSON file, keyed by what a measurement is valid for."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from nanoflow.core.hardware import MachineRates
from nanoflow.core.log import get_logger

log = get_logger(__name__)

FILE_VERSION = 1


class RateCache:
    """Rates by machine key. A file that cannot be understood is refused (with a warning) and rebuilt."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, key: str) -> MachineRates | None:
        """The rates kept for `key`, or None."""
        return self._read().get(key)

    def put(self, key: str, rates: MachineRates) -> None:
        """Keep `rates`. Written beside the file and renamed, so no reader sees half; a read-only folder is no error."""
        entries = {name: kept.to_dict() for name, kept in (self._read() | {key: rates}).items()}
        text = json.dumps({"version": FILE_VERSION, "machines": entries}, indent=1)
        temporary: str | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=".machine-")
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.replace(temporary, self.path)
        except OSError as error:
            log.warning("measured rates are not kept: %s", error)
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)

    def _read(self) -> dict[str, MachineRates]:
        try:
            content: Any = json.loads(self.path.read_text())
            if content["version"] != FILE_VERSION:
                raise ValueError(f"version {content['version']}, expected {FILE_VERSION}")
            return {str(key): MachineRates(**fields) for key, fields in content["machines"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s is not usable (%s); it will be written anew", self.path, error)
            return {}
