"""The files of a benchmark: what there is of its results after each round, so that a kill loses one round at most."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nanoflow.cli.files import make_folder_of
from nanoflow.core.errors import ConfigError

if TYPE_CHECKING:
    from nanoflow.bench.result import BenchResult


class ResultFiles:
    """Writes results to `output` (a .json file, or a folder where there are `several`) and a page, each when told."""

    def __init__(self, output: Path | None, page: Path | None, *, several: bool) -> None:
        """Raises `ConfigError` if a folder cannot be made."""
        self._output = output
        self._page = page
        self._several = several
        self._there: dict[Path | str, BenchResult] = {}
        for path in (output, page):
            if path is not None:
                make_folder_of(path)

    def keep(self, result: BenchResult) -> None:
        """Write what there is of a result. A failure is told but ends nothing, since there is more to measure."""
        file = self.place(result)
        self._there[file or result.workload.name] = result
        try:
            self._write_result(result)
            self._write_page(list(self._there.values()))
        except ConfigError as error:
            print(f"nanoflow: {error}", file=sys.stderr, flush=True)

    def finish(self, results: Sequence[BenchResult]) -> None:
        """Write the whole. Raises `ConfigError` if it cannot be."""
        for result in results:
            self._write_result(result)
        self._write_page(results)

    def place(self, result: BenchResult) -> Path | None:
        """The file of a result: the one named, or one in the folder named by what was measured."""
        output = self._output
        if output is None or (output.suffix == ".json" and not self._several):
            return output
        words = f"{result.model.name}_{result.kind}_{result.workload.name}"
        return output.with_suffix("") / f"{re.sub(r'[^A-Za-z0-9_.~-]+', '-', words)}.json"

    def _write_result(self, result: BenchResult) -> None:
        file = self.place(result)
        if file is not None:
            result.save(file)

    def _write_page(self, results: Sequence[BenchResult]) -> None:
        if self._page is None:
            return
        from nanoflow.bench.pages import page_of
        from nanoflow.bench.result import save_text

        try:
            save_text(self._page, page_of(results, [self.place(result) for result in results]))
        except OSError as error:
            raise ConfigError(f"the page cannot be written to {self._page}: {error}; choose another place.") from error
