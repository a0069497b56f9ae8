"""Plain data to JSON and back: frozen dataclasses become objects, and what is read is checked against their types.

One decoder serves every class of a result file, so a new field needs a line in its dataclass and none here. A value of
another type, a missing field or an unknown one is refused with its place in the file.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

from nanoflow.core.errors import ConfigError

T = TypeVar("T")


def encode(value: Any) -> Any:
    """Dataclasses, enums, mappings, sequences and numbers as what `json` writes; `ConfigError` for NaN or infinity."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: encode(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): encode(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [encode(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"a result holds {value}, which JSON cannot; leave the number out (None).")
    if value is None or isinstance(value, str | int | float):
        return value
    if hasattr(value, "item"):  # a numpy number
        return encode(value.item())
    raise ConfigError(f"a result holds a {type(value).__name__}, which JSON cannot; make it plain.")


def decode(kind: type[T], value: Any, where: str) -> T:
    """`value`, as `json` read it, as an instance of `kind`. `where` names it in the `ConfigError` if it is not one."""
    found: T = _decode(kind, value, where)
    return found


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in parts:
            return None
        arms = [part for part in parts if part is not type(None)]
        if len(arms) == 1:
            return _decode(arms[0], value, where)
        _require(isinstance(value, tuple(arms)), where, " or ".join(arm.__name__ for arm in arms), value)
        return value
    if origin is typing.Literal:
        _require(value in parts, where, f"one of {', '.join(map(str, parts))}", value)
        return value
    if origin is tuple:
        _require(isinstance(value, list), where, "a list", value)
        if len(parts) == 2 and parts[1] is Ellipsis:
            return tuple(_decode(parts[0], entry, f"{where}[{index}]") for index, entry in enumerate(value))
        _require(len(value) == len(parts), where, f"{len(parts)} values", value)
        return tuple(_decode(part, entry, where) for part, entry in zip(parts, value, strict=True))
    if origin is not None and issubclass(origin, Mapping):
        _require(isinstance(value, dict), where, "an object", value)
        return {key: _decode(parts[1], entry, f"{where}.{key}") for key, entry in value.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if isinstance(kind, type) and issubclass(kind, Enum):
        known = [member.value for member in kind]
        _require(value in known, where, f"one of {', '.join(map(str, known))}", value)
        return kind(value)
    if kind is float:
        _require(isinstance(value, int | float) and not isinstance(value, bool), where, "a number", value)
        return float(value)
    _require(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)), where, kind.__name__, value)
    return value


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    _require(isinstance(value, dict), where, "an object", value)
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise ConfigError(f"{where} holds the unknown field {unknown[0]!r}; it was written by another version.")
    needed = [
        item.name
        for item in dataclasses.fields(kind)
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in needed if name not in value]
    if missing:
        raise ConfigError(f"{where} lacks the field {missing[0]!r}; write the file again with this version.")
    return kind(**{name: _decode(hints[name], entry, f"{where}.{name}") for name, entry in value.items()})


def _require(condition: bool, where: str, wanted: str, value: Any) -> None:
    if not condition:
        raise ConfigError(f"{where} must be {wanted}, not {str(value)[:60]!r}; the file is damaged or no result.")
