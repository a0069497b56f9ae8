"""From a JSON object to checked values: request models, prompts, messages, sampling parameters.

Each check stops at the first fault and names it in a sentence, with the nearest known field for an unknown one.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

from pydantic import ValidationError

from nanoflow.core.request import MAX_PRIORITY
from nanoflow.core.sampling import SamplingParams
from nanoflow.server.errors import ApiError, bad_request
from nanoflow.server.protocol import (
    REFUSED,
    CalledFunction,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    GenerationFields,
    MessageCall,
    StreamOptions,
    StrictModel,
    TextPart,
)

Model = TypeVar("Model", bound=StrictModel)
Prompt = str | list[int]

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "finite_number": "a finite number",
    "int_parsing_size": "a whole number of at most 64 bits",
}
_JSON_NAMES = {str: "a string", bool: "true or false", list: "a list", dict: "an object", type(None): "null"}
_ROLES = ("system", "developer", "user", "assistant", "tool")
_PASSED_ON = (
    *("n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "top_k", "min_p"),
    *("repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "skip_special_tokens"),
    *("include_stop_str_in_output", "prompt_logprobs"),
)


def parse(model: type[Model], data: Any, path: str = "") -> Model:
    """`data` as a `model`. Raises a 400 for an unknown, missing, mistyped or refused field; `path` is where it is."""
    if not isinstance(data, dict):
        raise bad_request(f"{path} must be an object, not {shown(data)}.", path)
    prefix = f"{path}." if path else ""
    known = _field_names(model)
    for name in data:
        if name not in known:
            raise _unknown_field(name, prefix, model)
        if name in REFUSED and data[name] is not None:
            harmless, sentence = REFUSED[name]
            if data[name] not in harmless:
                raise bad_request(sentence, prefix + name, "unsupported_value")
    try:
        return model.model_validate(data)
    except ValidationError as exc:
        raise _invalid(exc, data, prefix) from None


@cache
def _field_names(model: type[StrictModel]) -> tuple[str, ...]:
    """What the fields are called in JSON."""
    return tuple(field.alias or name for name, field in model.model_fields.items())


def _unknown_field(name: str, prefix: str, model: type[StrictModel]) -> ApiError:
    near = difflib.get_close_matches(name[:100], _field_names(model), n=1, cutoff=0.55)
    hint = f"; did you mean {near[0]!r}?" if near else "; remove it."
    return bad_request(f"Unknown field {prefix + name[:100]!r}{hint}", prefix + name[:100], "unknown_field")


def _invalid(exc: ValidationError, data: dict[str, Any], prefix: str) -> ApiError:
    fault = exc.errors(include_url=False, include_context=False)[0]
    param = prefix + ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "missing":
        return bad_request(f"{param} is missing; add it to the request.", param)
    expected = _EXPECTED.get(fault["type"])
    if expected is None:
        return bad_request(f"{param}: {fault['msg']}.", param)
    return bad_request(f"{param} must be {expected}, not {shown(fault['input'])}.", param)


def shown(value: Any) -> str:
    """A value from a request, for a sentence about it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value) if abs(value) < 10**20 else "so large a number"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str) and len(value) <= 40:
        return f"the string {value!r}"
    return _JSON_NAMES.get(type(value), "that")


def stream_options(request: GenerationFields) -> StreamOptions:
    """The stream options; refused without `stream`."""
    if request.stream_options is None:
        return StreamOptions()
    if not request.stream:
        raise bad_request(
            "stream_options needs stream to be true; set it or leave stream_options out.", "stream_options"
        )
    return parse(StreamOptions, request.stream_options, "stream_options")


def prompts_of(request: CompletionRequest, max_prompts: int, vocab_size: int) -> list[Prompt]:
    """The prompts of a completions request, from any of the four shapes, token ids checked against the vocabulary."""
    value = request.prompt
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise bad_request(
            "prompt must be a string, a list of strings, a list of token ids or a list of token-id lists, "
            f"not {shown(value)}.",
            "prompt",
        )
    if not value:
        raise bad_request("prompt is empty; send some text or token ids.", "prompt")
    if type(value[0]) is int:
        value = [value]
    if len(value) > max_prompts:
        raise bad_request(f"prompt holds {len(value)} prompts; send at most {max_prompts} in one request.", "prompt")
    kind = type(value[0])
    for index, prompt in enumerate(value):
        if type(prompt) is not kind or kind not in (str, list):
            raise bad_request(f"prompt[{index}] must be text or a list of token ids, and all of one kind.", "prompt")
        if isinstance(prompt, list):
            check_token_ids(prompt, vocab_size, "prompt" if len(value) == 1 else f"prompt[{index}]")
    return value


def check_token_ids(ids: Sequence[Any], vocab_size: int, path: str) -> None:
    """Refuse anything but non-empty lists of ids from 0 to vocab_size - 1."""
    if not ids:
        raise bad_request(f"{path} is empty; send at least one token id.", path)
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size:
        return
    for token in ids:
        if type(token) is not int:
            raise bad_request(f"{path} must hold token ids only, not {shown(token)}.", path)
        if not 0 <= token < vocab_size:
            raise bad_request(
                f"Token id {shown(token)} in {path} is not in the vocabulary; ids run from 0 to {vocab_size - 1}.",
                path,
            )


def messages_of(request: ChatRequest) -> list[dict[str, Any]]:
    """The messages as the chat template wants them: role, content as one text, name, calls and their ids if given."""
    if not isinstance(request.messages, list):
        raise bad_request(f"messages must be a list of messages, not {shown(request.messages)}.", "messages")
    if not request.messages:
        raise bad_request("messages is empty; send at least one message.", "messages")
    return [_message(item, f"messages[{index}]") for index, item in enumerate(request.messages)]


def _message(item: Any, path: str) -> dict[str, Any]:
    message = parse(ChatMessage, item, path)
    if message.role not in _ROLES:
        raise bad_request(f"{path}.role must be one of {', '.join(_ROLES)}, not {message.role[:40]!r}.", f"{path}.role")
    role = "system" if message.role == "developer" else message.role
    content = "" if message.content is None and role == "assistant" else _content(message.content, f"{path}.content")
    rendered: dict[str, Any] = {"role": role, "content": content}
    if message.name is not None:
        rendered["name"] = message.name
    if message.tool_calls:
        rendered["tool_calls"] = _calls(message, path)
    if role == "tool" and message.tool_call_id is None:
        raise bad_request(f"{path}.tool_call_id is missing; name the call that this answers.", f"{path}.tool_call_id")
    if message.tool_call_id is not None:
        if role != "tool":
            here = f"{path}.tool_call_id"
            raise bad_request(f"{here} belongs to messages of role tool; leave it out.", here)
        rendered["tool_call_id"] = message.tool_call_id
    return rendered


def _calls(message: ChatMessage, path: str) -> list[dict[str, Any]]:
    """The calls that a message of the assistant made; their arguments stay text here."""
    path = f"{path}.tool_calls"
    if message.role != "assistant":
        raise bad_request(f"{path} belongs to messages of role assistant; leave it out.", path)
    if not isinstance(message.tool_calls, list):
        raise bad_request(f"{path} must be a list of calls, not {shown(message.tool_calls)}.", path)
    calls = []
    for index, item in enumerate(message.tool_calls):
        here = f"{path}[{index}]"
        call = parse(MessageCall, item, here)
        if call.type != "function":
            raise bad_request(f"{here}.type must be function, not {call.type[:40]!r}.", f"{here}.type")
        function = parse(CalledFunction, call.function, f"{here}.function")
        named = {"name": function.name, "arguments": function.arguments}
        calls.append({"id": call.id, "type": "function", "function": named})
    return calls


def _content(content: Any, path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{path} must be a string or a list of text parts, not {shown(content)}.", path)
    texts = []
    for index, part in enumerate(content):
        here = f"{path}[{index}]"
        if isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] != "text":
            raise bad_request(f"{here} is of type {part['type'][:40]!r}; this model reads text parts only.", here)
        texts.append(parse(TextPart, part, here).text)
    return "".join(texts)


def priority_of(request: GenerationFields) -> int:
    """The priority, checked; 0 if none was given."""
    priority = request.priority or 0
    if abs(priority) > MAX_PRIORITY:
        raise bad_request(f"priority must be from {-MAX_PRIORITY} (first) to {MAX_PRIORITY} (last).", "priority")
    return priority


def cache_salt_of(request: GenerationFields) -> str | None:
    """The salt that keeps this request's KV pages apart from those of other salts; refused if empty."""
    if request.cache_salt == "":
        raise bad_request("cache_salt is empty; send some text or leave it out.", "cache_salt")
    return request.cache_salt


def sampling_params(
    request: GenerationFields, *, max_tokens: int | None, logprobs: int | None, max_n: int, vocab_size: int
) -> SamplingParams:
    """The engine's parameters. Raises a 400 or `InvalidRequestError` naming the field."""
    if request.n is not None and request.n > max_n:
        raise bad_request(f"n is {shown(request.n)}; ask for at most {max_n} choices.", "n")
    if request.prompt_logprobs is not None and request.stream:
        raise bad_request("prompt_logprobs cannot be streamed; leave out one of the two.", "prompt_logprobs")
    if request.stop_token_ids is not None and not isinstance(request.stop_token_ids, list):
        raise bad_request(
            f"stop_token_ids must be a list of token ids, not {shown(request.stop_token_ids)}.", "stop_token_ids"
        )
    if request.stop_token_ids:
        check_token_ids(request.stop_token_ids, vocab_size, "stop_token_ids")
    values = {name: getattr(request, name) for name in _PASSED_ON if getattr(request, name) is not None}
    if "top_k" in values:
        values["top_k"] = min(values["top_k"], vocab_size)
    return SamplingParams(
        stop=_stop(request.stop),
        logit_bias=_logit_bias(request.logit_bias, vocab_size),
        max_tokens=max_tokens,
        logprobs=logprobs,
        **values,
    )


def _stop(value: Any) -> list[str]:
    if value is None:
        return []
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(item, str) for item in stops):
        raise bad_request("stop must be a string or a list of strings.", "stop")
    return stops


def _logit_bias(value: Any, vocab_size: int) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise bad_request(f"logit_bias must be an object of token id to number, not {shown(value)}.", "logit_bias")
    biases: dict[int, float] = {}
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 12 and int(token) < vocab_size):
            raise bad_request(
                f"logit_bias names {token[:40]!r}; its keys must be token ids from 0 to {vocab_size - 1}.", "logit_bias"
            )
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise bad_request(f"logit_bias of token {token} must be a number from -100 to 100.", "logit_bias")
        biases[int(token)] = bias
    return biases
