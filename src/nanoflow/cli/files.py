"""Where commands write: a folder that is named and missing is made, before the work rather than after it."""

from __future__ import annotations

from pathlib import Path

from nanoflow.core.errors import ConfigError


def make_folder_of(path: Path) -> None:
    """The folder that `path` will lie in, with all above it. Raises `ConfigError` if it cannot be made."""
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder of {path} cannot be made: {error.strerror}; choose another place.") from error
