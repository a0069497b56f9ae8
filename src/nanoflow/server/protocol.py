"""The request bodies: OpenAI's fields, vLLM's extras, what is ignored and what is refused. Types are strict.

Fields typed `Any` hold several JSON types; `parsing.py` checks those by hand, which stops at the first fault where a
pydantic union would list one fault per element of a million.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class StrictModel(BaseModel):
    """No unknown field, no conversion between types."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False)


class StreamOptions(StrictModel):
    """`include_usage` adds a last chunk with token counts; `include_obfuscation` is accepted and has no effect."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class IgnoredFields(StrictModel):
    """Fields that clients send and that change nothing about the text: accepted, not used."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prediction: Any = None
    parallel_tool_calls: Any = None


class GenerationFields(IgnoredFields):
    """What chat and plain completions share. `None` means the default."""

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Any = None
    seed: int | None = None
    stop: Any = None
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: Any = None
    response_format: Any = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Any = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = None
    reasoning_effort: Any = None
    verbosity: Any = None
    cache_salt: str | None = None
    priority: int | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    structured_outputs: Any = None
    use_beam_search: Any = None
    length_penalty: Any = None
    truncate_prompt_tokens: Any = None


class ChatRequest(GenerationFields):
    """Body of `/v1/chat/completions`."""

    messages: Any
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None


class CompletionRequest(GenerationFields):
    """Body of `/v1/completions`. `logprobs` counts the alternatives a token."""

    prompt: Any
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: Any = None


class ChatMessage(StrictModel):
    """One message. From `refusal` on, the fields are what clients send back from an answer they got."""

    role: str
    content: Any = None
    name: str | None = None
    refusal: Any = None
    annotations: Any = None
    tool_calls: Any = None
    tool_call_id: str | None = None
    function_call: Any = None
    audio: Any = None
    parsed: Any = None


class ToolField(StrictModel):
    """An item of `tools`, a `tool_choice` of one function, or a call that a message made, by what `function` holds."""

    type: str = "function"
    function: Any = None


class MessageCall(ToolField):
    """A call in a message of the assistant. `index` is what streams add."""

    id: str
    index: int | None = None


class FunctionFields(StrictModel):
    """A function that may be called. `strict` is met where the answer is forced to call, see docs/tool-calls.md."""

    name: str
    description: str | None = None
    parameters: Any = None
    strict: bool | None = None


class FunctionName(StrictModel):
    """The function of a `tool_choice`."""

    name: str


class CalledFunction(StrictModel):
    """The function of a call; `parsed_arguments` is what OpenAI's client adds to its own copies."""

    name: str
    arguments: str
    parsed_arguments: Any = None


class TextPart(StrictModel):
    """A part of a message's content; only text is understood."""

    type: str
    text: str


class ResponseFormat(StrictModel):
    """What `response_format` says."""

    type: str
    json_schema: Any = None


class JsonSchemaFormat(StrictModel):
    """OpenAI's wrapping of a schema. It is always followed to the letter, whatever `strict` says."""

    name: str | None = None
    description: str | None = None
    schema_: Any = Field(default=None, alias="schema")
    strict: bool | None = None


class StructuredFields(StrictModel):
    """vLLM's `structured_outputs`."""

    json_: Any = Field(default=None, alias="json")
    json_object: Any = None
    regex: Any = None
    choice: Any = None
    grammar: Any = None


REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "functions": (([],), "functions is of the API before tools and not supported; send them as tools."),
    "function_call": (("none", "auto"), "function_call is of the API before tools and not supported; use tool_choice."),
    "modalities": ((["text"],), 'Only text is produced; leave modalities out or send ["text"].'),
    "audio": ((), "Audio is not supported; leave audio out."),
    "web_search_options": ((), "Web search is not supported; leave web_search_options out."),
    "suffix": (("",), "Insertion before a suffix is not supported; leave suffix out."),
    "use_beam_search": ((False,), "Beam search is not supported; leave use_beam_search out."),
    "length_penalty": ((1.0,), "length_penalty belongs to beam search, which is not supported; leave it out."),
    "truncate_prompt_tokens": ((), "Prompts are never cut; shorten the prompt and leave truncate_prompt_tokens out."),
    "reasoning_effort": ((), "reasoning_effort has no meaning for this model; leave it out."),
    "verbosity": (("medium",), "verbosity has no meaning for this model; leave it out."),
}
"""Field → the values that change nothing (and are let through besides null), and the sentence for all others."""
