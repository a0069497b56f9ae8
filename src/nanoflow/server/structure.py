"""From the fields of a request to what its answer must match: OpenAI's `response_format` and vLLM's `guided_*`.

At most one of them may ask for something. Whatever is wrong with it is said under the name that the client sent.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from nanoflow.core.errors import ConfigError, InvalidRequestError
from nanoflow.core.sampling import SamplingParams
from nanoflow.core.structured import StructuredOutput
from nanoflow.server.engine_api import Engine
from nanoflow.server.errors import bad_request
from nanoflow.server.parsing import parse, shown
from nanoflow.server.protocol import GenerationFields, JsonSchemaFormat, ResponseFormat, StructuredFields
from nanoflow.server.tools import Tools

_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
_FORMATS = ("text", "json_object", "json_schema")


async def with_structure(
    params: SamplingParams, request: GenerationFields, engine: Engine, tools: Tools | None = None
) -> SamplingParams:
    """`params` with what the request asks its answer to match, compiled in a thread so that `submit` finds it ready.

    That may be that it calls `tools`. Raises a 400 that says what is wrong with it.
    """
    asked = _asked(request)
    if asked is not None and tools is not None and tools.forced:
        raise bad_request(f"tool_choice and {asked[0]} ask for structured output; leave out all but one.", asked[0])
    forced = tools.structure() if tools is not None else None
    if asked is None and forced is None:
        return params
    name, values = asked or ("tools", {})
    try:
        wanted = forced or StructuredOutput(**values)
        if tools is not None and not tools.forced and tools.style.reads:
            wanted = _beside_tools(wanted, name, tools)
        await asyncio.to_thread(engine.prepare, wanted)
    except ConfigError as exc:
        raise bad_request(f"This server cannot do it: {exc}", name, "unsupported_value") from None
    except InvalidRequestError as exc:
        raise bad_request(f"{name}: {exc}", name) from None
    return replace(params, structured=wanted)


def _beside_tools(wanted: StructuredOutput, name: str, tools: Tools) -> StructuredOutput:
    """`wanted` for a model that may call instead."""
    if wanted.kind not in ("json", "json_object"):
        raise bad_request(
            f"{name}: only JSON can stand beside tools that the model may call; "
            f"leave {name} out, or send tool_choice none.",
            name,
        )
    return tools.or_else(wanted)


def _asked(request: GenerationFields) -> tuple[str, dict[str, Any]] | None:
    """The field that asks, and what it asks for in the terms of `StructuredOutput`."""
    asked: dict[str, dict[str, Any] | None] = {}
    if request.response_format is not None:
        asked["response_format"] = _format(request.response_format)
    if request.structured_outputs is not None:
        fields = parse(StructuredFields, request.structured_outputs, "structured_outputs")
        asked["structured_outputs"] = {k: v for k, v in fields.model_dump(by_alias=True).items() if v is not None}
    for name in _GUIDED:
        value = getattr(request, name)
        if value is not None:
            asked[name] = {name.removeprefix("guided_"): value}
    asking = [(name, values) for name, values in asked.items() if values is not None]
    if len(asking) > 1:
        names = [name for name, _ in asking]
        raise bad_request(f"{' and '.join(names)} ask for structured output; leave out all but one.", names[1])
    return asking[0] if asking else None


def _format(value: Any) -> dict[str, Any] | None:
    """What `response_format` asks for; None if it is plain text."""
    fields = parse(ResponseFormat, value, "response_format")
    if fields.type not in _FORMATS:
        kinds = ", ".join(_FORMATS)
        raise bad_request(
            f"response_format.type must be one of {kinds}, not {fields.type[:40]!r}.",
            "response_format.type",
            "unsupported_value",
        )
    if fields.type == "json_schema":
        schema = parse(JsonSchemaFormat, fields.json_schema, "response_format.json_schema").schema_
        if not isinstance(schema, dict):
            path = "response_format.json_schema.schema"
            raise bad_request(f"{path} must be a JSON schema (an object), not {shown(schema)}.", path)
        return {"json": schema}
    return {"json_object": True} if fields.type == "json_object" else None
