"""From the fields of a chat request to the tools it offers and the calls it wants.

What is wrong is said under the name of the field, before anything is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nanoflow.core.sampling import SamplingParams
from nanoflow.core.structured import StructuredOutput
from nanoflow.server.calls import CallShape
from nanoflow.server.errors import bad_request
from nanoflow.server.parsing import parse, shown
from nanoflow.server.protocol import ChatRequest, FunctionFields, FunctionName, ToolField
from nanoflow.text.grammars import ANY_OBJECT
from nanoflow.text.tool_calls.either import calls_or_json
from nanoflow.text.tool_calls.forced import NamedReader, RequiredReader, named_output, required_output
from nanoflow.text.tool_calls.formats import nested_too_deeply
from nanoflow.text.tool_calls.reader import CallReader, FreeReader
from nanoflow.text.tool_calls.style import ToolStyle

_CHOICES = ("none", "auto", "required")


@dataclass(frozen=True)
class Tools:
    """The tools of a request, at least one. The model decides, or it is `required` to call, or to call `named`."""

    style: ToolStyle
    items: tuple[dict[str, Any], ...]
    required: bool = False
    named: str | None = None
    parallel: bool = True

    @property
    def forced(self) -> bool:
        """Whether the answer is calls and nothing else."""
        return self.required or self.named is not None

    @property
    def functions(self) -> dict[str, dict[str, Any]]:
        """By name."""
        return {item["function"]["name"]: item["function"] for item in self.items}

    def structure(self) -> StructuredOutput | None:
        """What the answer must match so that it calls as it was told to; None where the model decides."""
        if self.named is not None:
            return named_output(self.functions[self.named])
        if self.required:
            return required_output(list(self.functions.values()), self.style.format, parallel=self.parallel)
        return None

    def or_else(self, wanted: StructuredOutput) -> StructuredOutput:
        """What an answer must match that may call, and is `wanted`, some JSON, if it does not."""
        schema = wanted.json if isinstance(wanted.json, str) else ANY_OBJECT
        return calls_or_json(list(self.functions.values()), self.style, schema, parallel=self.parallel)

    def shape(self) -> CallShape | None:
        """How calls are read out of the answers; None if they stay text."""
        if not self.forced and not self.style.reads:
            return None
        return CallShape(self._reader, self.style.format.new_id, ends_by_calls=self.named is None)

    def visible(self, params: SamplingParams) -> SamplingParams:
        """`params` with the special tokens that mark calls kept in the text."""
        if self.forced or not self.style.reads:
            return params
        return replace(params, shown_special_ids=tuple(sorted(self.style.marker_ids)))

    def _reader(self) -> CallReader:
        if self.named is not None:
            return NamedReader(self.named)
        if self.required:
            return RequiredReader()
        return FreeReader(self.style.format, self.functions, parallel=self.parallel)


def tools_of(request: ChatRequest, style: Callable[[], ToolStyle]) -> Tools | None:
    """The tools that the model may or must call; None if there are none, or `tool_choice` is none.

    `style` is asked for the model's where there are some.
    """
    items = _items(request.tools)
    choice = request.tool_choice
    if not items and choice not in (None, "none"):
        raise bad_request("tool_choice needs tools; send some or leave tool_choice out.", "tool_choice")
    if isinstance(choice, str) and choice not in _CHOICES:
        kinds = ", ".join(_CHOICES)
        raise bad_request(f"tool_choice must be {kinds} or an object, not {shown(choice)}.", "tool_choice")
    if not items or choice == "none":
        return None
    tools = Tools(style(), tuple(items), choice == "required", parallel=request.parallel_tool_calls is not False)
    return tools if isinstance(choice, str | None) else replace(tools, named=_named(choice, tools))


def _items(value: Any) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise bad_request(f"tools must be a list of functions, not {shown(value)}.", "tools")
    items = [_item(item, f"tools[{place}]") for place, item in enumerate(value)]
    seen: set[str] = set()
    for place, item in enumerate(items):
        name = item["function"]["name"]
        if name in seen:
            path = f"tools[{place}].function.name"
            raise bad_request(f"{path}: {name[:100]!r} is the name of two functions; give each its own.", path)
        seen.add(name)
    return items


def _item(value: Any, path: str) -> dict[str, Any]:
    """A tool as it was sent, checked."""
    _check_type(value, path)
    here = f"{path}.function"
    function = parse(FunctionFields, parse(ToolField, value, path).function, here)
    if not function.name:
        raise bad_request(f"{here}.name is empty; name the function.", f"{here}.name")
    _check_parameters(function.parameters, f"{here}.parameters")
    fields = {name: getattr(function, name) for name in FunctionFields.model_fields}
    return {"type": "function", "function": {name: value for name, value in fields.items() if value is not None}}


def _check_parameters(value: Any, path: str) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        raise bad_request(f"{path} must be a JSON schema (an object), not {shown(value)}.", path)
    if value.get("type", "object") != "object":
        raise bad_request(f"{path}.type must be 'object', since arguments have names; correct it.", f"{path}.type")
    if nested_too_deeply(value):
        raise bad_request(f"{path} is nested too deeply; flatten it.", path)


def _check_type(value: Any, path: str) -> None:
    """Refuse kinds of tools that are not functions in a sentence of its own."""
    kind = value.get("type", "function") if isinstance(value, dict) else "function"
    if isinstance(kind, str) and kind != "function":
        sentence = f"{path}.type must be function; {kind[:40]!r} is not supported."
        raise bad_request(sentence, f"{path}.type", "unsupported_value")


def _named(choice: Any, tools: Tools) -> str:
    """The function that a `tool_choice` names."""
    _check_type(choice, "tool_choice")
    path = "tool_choice.function"
    name = parse(FunctionName, parse(ToolField, choice, "tool_choice").function, path).name
    if name not in tools.functions:
        known = ", ".join(repr(one[:40]) for one in list(tools.functions)[:8])
        raise bad_request(f"{path}.name: {name[:100]!r} is not among the tools; there are {known}.", f"{path}.name")
    return name
