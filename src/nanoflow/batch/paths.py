"""Which files a job has: what the user names, and what lies beside the output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanoflow.core.errors import ConfigError


@dataclass(frozen=True)
class JobPaths:
    """The four files of a job."""

    input: Path
    output: Path
    errors: Path
    journal: Path

    @classmethod
    def beside(cls, input_: Path, output: Path, errors: Path | None = None) -> JobPaths:
        """`OUT.jsonl` has `OUT.errors.jsonl` and `OUT.jsonl.journal` beside it. Raises `ConfigError` if two are one."""
        errors = output.with_name(f"{output.stem}.errors{output.suffix}") if errors is None else errors
        paths = cls(input_, output, errors, journal_of(output))
        names = [paths.input, paths.output, paths.errors, paths.journal]
        if len({path.resolve() for path in names}) < len(names):
            raise ConfigError("input, output and error file must be three different files; rename one.")
        return paths

    def make_folders(self) -> None:
        """The folders of what is written. Raises `ConfigError` if one cannot be made."""
        for path in (self.output, self.errors):
            try:
                path.absolute().parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"the folder of {path} cannot be made: {error.strerror}; choose another place."
                ) from error


def journal_of(output: Path) -> Path:
    """The journal of the job that writes `output`."""
    return output.with_name(output.name + ".journal")
