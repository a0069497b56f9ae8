"""Measured rates kept between runs: one JSON file, keyed by what a measurement is valid for."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanoflow.core.hardware import MachineRates
from nanoflow.core.log import get_logger

log = get_logger(__name__)

FILE_VERSION = 1


@dataclass(frozen=True)
class KeptRates:
    """Rates with whether they are `settled`: measured while nothing else used the machine."""

    rates: MachineRates
    settled: bool

    def best_of(self, other: KeptRates) -> KeptRates:
        """Of two measurements of one machine: the higher figures, since nothing makes a machine look too fast."""
        rates = replace(
            self.rates,
            flops_per_s=max(self.rates.flops_per_s, other.rates.flops_per_s),
            mem_bytes_per_s=max(self.rates.mem_bytes_per_s, other.rates.mem_bytes_per_s),
        )
        return KeptRates(rates, self.settled or other.settled)


class RateCache:
    """Rates by machine key. A file that cannot be understood is refused (with a warning) and rebuilt."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, key: str) -> KeptRates | None:
        """The rates kept for `key`, or None."""
        return self._read().get(key)

    def put(self, key: str, rates: KeptRates) -> None:
        """Keep `rates`. Written beside the file and renamed, so no reader sees half; a read-only folder is no error."""
        kept_rates = self._read() | {key: rates}
        entries = {name: {"settled": kept.settled, "rates": kept.rates.to_dict()} for name, kept in kept_rates.items()}
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

    def _read(self) -> dict[str, KeptRates]:
        try:
            content: Any = json.loads(self.path.read_text())
            if content["version"] != FILE_VERSION:
                raise ValueError(f"version {content['version']}, expected {FILE_VERSION}")
            return {
                str(key): KeptRates(MachineRates(**entry["rates"]), bool(entry["settled"]))
                for key, entry in content["machines"].items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s is not usable (%s); it will be written anew", self.path, error)
            return {}
