"""JSON objects from strangers: a request's body, or a line of a batch file. Every fault becomes a sentence."""

from __future__ import annotations

import json
from typing import Any

from nanoflow.core.errors import InvalidRequestError


def parse_object(raw: bytes, what: str, example: str = '{"model": ...}') -> dict[str, Any]:
    """The JSON object in `raw` (UTF-8, a byte-order mark is skipped), lone surrogates replaced.

    `what` begins the sentences of `InvalidRequestError`, e.g. "The request body".
    """
    if not raw.strip():
        raise InvalidRequestError(f"{what} is empty; send a JSON object.")
    try:
        value = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant)
        if b"\\ud" in raw or b"\\uD" in raw:
            value = _without_lone_surrogates(value)
    except UnicodeDecodeError:
        raise InvalidRequestError(f"{what} is not UTF-8; encode it as UTF-8.") from None
    except json.JSONDecodeError as exc:
        raise InvalidRequestError(
            f"{what} is not valid JSON: {exc.msg} at line {exc.lineno}, column {exc.colno}."
        ) from None
    except RecursionError:
        where = what[0].lower() + what[1:]
        raise InvalidRequestError(f"The JSON in {where} is nested too deeply; flatten it.") from None
    except ValueError as exc:
        raise InvalidRequestError(f"{what} is not valid JSON: {exc}.") from None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{what} must be a JSON object, e.g. {example}.")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number; send a finite one")


def well_formed(text: str) -> str:
    """`text` with each lone surrogate (half of a UTF-16 pair) replaced by U+FFFD, so that it can be encoded."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _without_lone_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, list):
        return [_without_lone_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {well_formed(key): _without_lone_surrogates(item) for key, item in value.items()}
    return value
