"""Recorded traces as CSV files: lengths, and where the file has them arrivals, prefix blocks or conversations.

Columns of a request trace: `input_len`, `output_len` (tokens); `arrival_s` or `arrival_ms` (since the first request);
`hash_ids`, the ids of the prompt's blocks of 512 tokens, as ranges (`0-13 20 22-24`): equal ids are equal tokens.
Columns of a conversation trace, a row a turn: `conv_id`, `turn`, `history_len`, `new_input_len`, `output_len`. Other
columns are ignored. Files are read as they are: nothing is dropped, scaled or reordered here.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanoflow.analysis.lengths import Lengths
from nanoflow.bench.arrivals import Seconds
from nanoflow.core.errors import ConfigError

BLOCK_TOKENS = 512
REQUEST_COLUMNS = ("input_len", "output_len")
TURN_COLUMNS = ("conv_id", "turn", "history_len", "new_input_len", "output_len")


@dataclass(frozen=True)
class RequestTrace:
    """Requests in the file's order; `arrival_s` and `blocks` are None where the file has no such column."""

    name: str
    prompt_tokens: Lengths
    output_tokens: Lengths
    arrival_s: Seconds | None = None
    blocks: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Turn:
    """One round: `history_tokens` came before it, `new_tokens` are asked, `output_tokens` answered."""

    history_tokens: int
    new_tokens: int
    output_tokens: int

    @property
    def prompt_tokens(self) -> int:
        return self.history_tokens + self.new_tokens

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True)
class Conversation:
    """Rounds in order."""

    conv_id: str
    turns: tuple[Turn, ...]


def is_conversation_trace(path: Path) -> bool:
    """Whether the file's header is that of conversations."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return set(TURN_COLUMNS) <= set(next(csv.reader(file), []))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace {path} cannot be read: {error}; check the path.") from error


def read_requests(path: Path) -> RequestTrace:
    """A request trace. `ConfigError` names the row that is wrong."""
    prompts: list[int] = []
    outputs: list[int] = []
    arrivals: list[float] = []
    blocks: list[tuple[int, ...]] = []
    for line, row in _rows(path, REQUEST_COLUMNS):
        prompts.append(_whole(row["input_len"], 1, path, line))
        outputs.append(_whole(row["output_len"], 1, path, line))
        if "arrival_s" in row or "arrival_ms" in row:
            arrivals.append(_arrival(row, path, line))
        if "hash_ids" in row:
            blocks.append(_block_ids(row["hash_ids"], path, line))
    return RequestTrace(
        path.stem,
        np.array(prompts, dtype=np.int64),
        np.array(outputs, dtype=np.int64),
        np.array(arrivals) if arrivals else None,
        tuple(blocks) if blocks else None,
    )


def read_conversations(path: Path) -> list[Conversation]:
    """A conversation trace, turns in the file's order. `ConfigError` names the row that is wrong."""
    turns: dict[str, list[Turn]] = {}
    for line, row in _rows(path, TURN_COLUMNS):
        numbers = [_whole(row[name], 0, path, line) for name in TURN_COLUMNS[2:]]
        turns.setdefault(str(row["conv_id"]), []).append(Turn(*numbers))
    return [Conversation(conv_id, tuple(found)) for conv_id, found in turns.items()]


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str | None]]]:
    n_rows = 0
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise ConfigError(f"{path} lacks the column {' and '.join(missing)}; add it to the header.")
            for row in reader:
                n_rows += 1
                yield reader.line_num, row
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace {path} cannot be read: {error}; check the path.") from error
    if n_rows == 0:
        raise ConfigError(f"trace {path} holds no row; it needs {', '.join(columns)}.")


def _whole(cell: str | None, low: int, path: Path, line: int) -> int:
    try:
        value = int(cell or "")
    except ValueError:
        value = -1
    if value < low:
        raise ConfigError(f"{path} line {line}: {cell!r} is no length; use whole numbers of at least {low}.")
    return value


def _arrival(row: dict[str, str | None], path: Path, line: int) -> float:
    scale = 1.0 if "arrival_s" in row else 1e-3
    cell = row["arrival_s"] if "arrival_s" in row else row["arrival_ms"]
    try:
        return float(cell or "") * scale
    except ValueError:
        raise ConfigError(f"{path} line {line}: {cell!r} is no time; write seconds or milliseconds.") from None


def _block_ids(cell: str | None, path: Path, line: int) -> tuple[int, ...]:
    """`0-13 20` → 0 … 13, 20."""
    found: list[int] = []
    try:
        for part in (cell or "").split():
            first, dash, last = part.partition("-")
            found += range(int(first), int(last) + 1) if dash else [int(first)]
    except ValueError:
        raise ConfigError(f"{path} line {line}: {cell!r} are no block ids; write them as in 0-13 20 22-24.") from None
    return tuple(found)
