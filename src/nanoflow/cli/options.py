"""Command-line options made from the config dataclasses, so that a new engine option is a flag without another line.

Nothing here has a default of its own: an option that the user leaves out is absent from the namespace, and the
dataclass decides.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
import typing
from typing import Any

from nanoflow.core import config
from nanoflow.core.errors import ConfigError
from nanoflow.core.sampling import SamplingParams
from nanoflow.text.tool_calls.formats import PARSERS

SECTIONS = (config.ModelConfig, config.CacheConfig, config.SchedulerConfig, config.DeviceConfig, config.EngineConfig)
CHOICES = {
    "dtype": config.DTYPES,
    "load_format": config.LOAD_FORMATS,
    "device": config.DEVICES,
    "kernels": config.KERNELS,
    "tool_call_parser": PARSERS,
}
SAMPLING_HELP = {
    "n": "answers to each prompt",
    "temperature": "0 is greedy; higher is more varied",
    "top_p": "keep the smallest set of tokens with this much probability",
    "top_k": "keep the k likeliest tokens (0: all)",
    "min_p": "keep tokens with at least this share of the largest probability",
    "repetition_penalty": "above 1 discourages tokens that occurred before",
    "presence_penalty": "lowers tokens that the answer already holds",
    "frequency_penalty": "lowers tokens by how often the answer holds them",
    "logit_bias": "add to a token's logit (repeatable)",
    "stop": "end the answer before this text (repeatable)",
    "stop_token_ids": "end the answer after this token id (repeatable)",
    "include_stop_str_in_output": "keep the stop text in the answer",
    "max_tokens": "longest answer in tokens",
    "min_tokens": "shortest answer in tokens",
    "ignore_eos": "do not end at the model's end token",
    "logprobs": "also give log-probabilities of the chosen and the k likeliest tokens",
    "prompt_logprobs": "also score the prompt, with k alternatives a token",
    "skip_special_tokens": "leave special tokens out of the text",
    "shown_special_ids": "but leave this one in, by its id (repeatable)",
    "structured": "what each answer must match: a JSON object with json, json_object, regex, choice or grammar",
}
_SHORT = {"tensor_parallel_size": "--tp"}
_METAVARS = {int: "N", float: "X", str: "TEXT"}


def flag(name: str) -> str:
    """The command-line spelling of a field: `max_model_len` → `--max-model-len`."""
    return "--" + name.replace("_", "-")


def add_dataclass_options(parser: argparse._ArgumentGroup, kind: type, *, skip: frozenset[str] = frozenset()) -> None:
    """One flag for each field of `kind` that has a help text and a plain type; nested configs are left out."""
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        text = item.metadata.get("help")
        if text is None or item.name in skip:
            continue
        plain = _plain_type(hints[item.name])
        _add(parser, item.name, plain, _help(text, item.default), choices=CHOICES.get(item.name))


def add_engine_options(parser: argparse.ArgumentParser, *, skip: frozenset[str] = frozenset()) -> None:
    """MODEL and every option of `EngineConfig` but those to `skip`."""
    parser.add_argument(
        "model", metavar="MODEL", help="preset name, Hugging Face folder, or .gguf file (see `nanoflow models`)"
    )
    group = parser.add_argument_group("model and engine")
    for kind in SECTIONS:
        add_dataclass_options(group, kind, skip=skip | {"model"})


def add_old_name(group: argparse._ActionsContainer, name: str, now: argparse.Action) -> None:
    """Accept what an option was called before, without a word in the help."""
    group.add_argument(name, dest=now.dest, type=now.type or str, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The engine options that the user gave, as keywords of `EngineConfig.from_options` (checked)."""
    options = chosen(args, *SECTIONS)
    config.EngineConfig.from_options(**options)
    return options


def chosen(args: argparse.Namespace, *kinds: type) -> dict[str, Any]:
    """What the namespace holds of the fields of `kinds`."""
    names = [item.name for kind in kinds for item in dataclasses.fields(kind)]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def add_sampling_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """One flag for each field of `SamplingParams` but `seed`, which is among the engine's and serves both.

    `defaults` are those of the command where they are not the dataclass's; the help tells them.
    """
    defaults = {item.name: item.default for item in dataclasses.fields(SamplingParams)} | defaults
    group = parser.add_argument_group("sampling")
    hints = typing.get_type_hints(SamplingParams)
    for name, text in SAMPLING_HELP.items():
        if name == "logit_bias":
            group.add_argument(
                flag(name), metavar="ID=BIAS", type=_bias, action="append", default=argparse.SUPPRESS, help=text
            )
        elif name == "structured":
            group.add_argument(flag(name), metavar="JSON", type=_json_object, default=argparse.SUPPRESS, help=text)
        elif name in ("stop", "stop_token_ids", "shown_special_ids"):
            plain = str if name == "stop" else int
            group.add_argument(
                flag(name), metavar=_METAVARS[plain], type=plain, action="append", default=argparse.SUPPRESS, help=text
            )
        else:
            _add(group, name, _plain_type(hints[name]), _help(text, defaults[name]))


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that the user gave, as keywords of `SamplingParams`."""
    options = chosen(args, SamplingParams)
    if "logit_bias" in options:
        options["logit_bias"] = dict(options["logit_bias"])
    return options


def _add(
    group: argparse._ArgumentGroup, name: str, plain: type, text: str, *, choices: tuple[str, ...] | None = None
) -> None:
    text = text.replace("%", "%%")
    if plain is bool:
        group.add_argument(flag(name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        return
    metavar = None if choices else _METAVARS[plain]
    flags = [flag(name), *([_SHORT[name]] if name in _SHORT else [])]
    group.add_argument(*flags, type=plain, choices=choices, metavar=metavar, default=argparse.SUPPRESS, help=text)


def _help(text: str, default: Any) -> str:
    if default in (None, "auto", dataclasses.MISSING) or isinstance(default, bool):
        return text
    return f"{text} (default {default})"


def _plain_type(hint: Any) -> type:
    """`int | None` → int; a plain class is itself."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    assert isinstance(hint, type), hint
    return hint


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=BIAS, e.g. 50256=-100") from None


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('it must be a JSON object, e.g. \'{"choice": ["yes", "no"]}\'')
    return value


def check_positive(name: str, value: int) -> None:
    """Refuse a count below one."""
    if value < 1:
        raise ConfigError(f"{flag(name)} must be at least 1, not {value}.")
