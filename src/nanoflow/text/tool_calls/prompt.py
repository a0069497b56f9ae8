"""Conversations with tools, as chat templates want them: past calls, results, and the tools themselves.

A template that knows tools gets them as it expects. For any other, a system text of our own lists them and says how to
call, past calls are written as the model would write them, and results become messages of the user.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nanoflow.core.errors import InvalidRequestError
from nanoflow.text.base import Tokenizer
from nanoflow.text.chat import normalise_messages
from nanoflow.text.tool_calls.formats import CallFormat, loads, nested_too_deeply
from nanoflow.text.tool_calls.style import ToolStyle

Message = Mapping[str, Any]

_LIST = "You can call functions. These are available, each described by a line of JSON:"
_HOW = "To call one, write its name and arguments as JSON, like this:"
_RESULTS = "What it gave comes in the next message. Where no function helps, answer in words."
_MUST = "Answer with a JSON array of calls, each an object with name and {key}, and nothing else."
_MUST_ONE = "Call the function {name} now: answer with a JSON object of its arguments, and nothing else."


def uses_tools(messages: Sequence[Message]) -> bool:
    """Whether a conversation holds calls or their results."""
    kinds = [message for message in messages if isinstance(message, Mapping)]
    return any(message.get("tool_calls") or message.get("role") == "tool" for message in kinds)


def checked_tools(tools: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """`tools`, if each is a function with a name in OpenAI's form and can be written as JSON.

    Raises `InvalidRequestError` otherwise.
    """
    for place, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InvalidRequestError(
                f'tools[{place}] must be {{"type": "function", "function": {{"name": …, …}}}}.', "tools"
            )
        try:
            json.dumps(function)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequestError(f"tools[{place}] cannot be written as JSON: {error}.", "tools") from None
    return tools


def render_with_tools(
    tokenizer: Tokenizer,
    style: ToolStyle,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    *,
    required: bool = False,
    named: str | None = None,
) -> str:
    """The prompt of a conversation with `tools` (may be empty); `options` are keywords of `Tokenizer.render_chat`.

    Arguments of past calls may be text, as in OpenAI's API. `required` says that the answer will be an array of calls,
    `named` that it will be the arguments of this function. Raises `InvalidRequestError` if arguments are no JSON
    object, or if the template refuses the messages.
    """
    plain = _with_names(_with_objects(normalise_messages(messages)))
    if style.native:
        given = {**options, "tools": [_described(tool) for tool in tools]} if tools else options
        return tokenizer.render_chat(plain, **given)
    plain = _as_text(plain, style.format)
    if tools:
        plain = _with_system(plain, _instructions(tools, style.format, required, named))
    return tokenizer.render_chat(plain, **options)


def _with_objects(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with objects as the arguments of calls."""
    return [
        {**message, "tool_calls": _with_object_each(message["tool_calls"], f"messages[{place}].tool_calls")}
        if message.get("tool_calls")
        else message
        for place, message in enumerate(messages)
    ]


def _with_object_each(calls: Any, path: str) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence):
        raise InvalidRequestError(f"{path} must be a list of calls.", path)
    return [_with_object(call, f"{path}[{index}].function") for index, call in enumerate(calls)]


def _with_object(call: Mapping[str, Any], path: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequestError(f"{path} must be an object with name and arguments.", path)
    arguments, path = function.get("arguments"), f"{path}.arguments"
    if isinstance(arguments, str):
        try:
            arguments = loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise InvalidRequestError(f"{path} is not JSON ({error}); send the text of a JSON object.", path) from None
    if not isinstance(arguments, Mapping):
        raise InvalidRequestError(f"{path} must be the text of a JSON object.", path)
    if nested_too_deeply(arguments):
        raise InvalidRequestError(f"{path} is nested too deeply; flatten it.", path)
    return {**call, "function": {**function, "arguments": arguments}}


def _described(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as templates know it: with parameters, without `strict`."""
    function = {key: value for key, value in tool["function"].items() if key != "strict" and value is not None}
    function.setdefault("parameters", {"type": "object", "properties": {}})
    return {"type": "function", "function": function}


def _with_names(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results with the name of the function that gave them, which some templates write."""
    names: dict[Any, str] = {}
    named = []
    for message in messages:
        for call in message.get("tool_calls") or ():
            names[call.get("id")] = call["function"]["name"]
        name = names.get(message.get("tool_call_id")) if message["role"] == "tool" else None
        named.append({"name": name, **message} if name is not None else message)
    return named


def _as_text(messages: Sequence[dict[str, Any]], format: CallFormat) -> list[dict[str, Any]]:
    """Calls as text of the assistant, results in a row as one message of the user."""
    plain: list[dict[str, Any]] = []
    before = None
    for message in messages:
        content = message.get("content")
        if message["role"] == "tool":
            name = f" {message['name']}" if message.get("name") else ""
            text = f"The function{name} gave: {content}"
            if before == "tool":
                plain[-1]["content"] += f"\n{text}"
            else:
                plain.append({"role": "user", "content": text})
        elif message.get("tool_calls"):
            calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
            text = format.written(calls)
            plain.append({"role": message["role"], "content": f"{content}\n{text}" if content else text})
        else:
            plain.append(message)
        before = message["role"]
    return plain


def _with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The messages with `text` at the end of the first system message."""
    first = messages[0] if messages else {}
    if first.get("role") != "system" or not isinstance(first.get("content"), str):
        return [{"role": "system", "content": text}, *messages]
    return [{**first, "content": f"{first['content']}\n\n{text}".strip()}, *messages[1:]]


def _instructions(tools: Sequence[Mapping[str, Any]], format: CallFormat, required: bool, named: str | None) -> str:
    lines = [json.dumps(_described(tool)["function"], ensure_ascii=False) for tool in tools]
    if named is not None:
        how = [_MUST_ONE.format(name=named)]
    elif required:
        how = [_MUST.format(key=format.arguments_key)]
    else:
        how = [_HOW, format.written([("function_name", {"argument": "value"})]), _RESULTS]
    return "\n".join([_LIST, *lines, "", *how])
