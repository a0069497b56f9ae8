"""`nanoflow generate`: answer a handful of prompts, or a file of them, in one batch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nanoflow.cli import options, prompts
from nanoflow.core.errors import ConfigError, InvalidRequestError
from nanoflow.core.request import CompletionOutput, RequestOutput
from nanoflow.core.sampling import SamplingParams

if TYPE_CHECKING:
    from nanoflow.engine.llm import LLM

HELP = "answer prompts in one batch"
LOG_LEVEL = "WARNING"
DEFAULT_MAX_TOKENS = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    options.add_engine_options(parser)
    group = parser.add_argument_group("prompts and output")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt (repeatable; - reads stdin)")
    group.add_argument("--prompts", action="append", metavar="FILE", help="JSONL file of prompts (repeatable)")
    form = group.add_mutually_exclusive_group()
    form.add_argument(
        "--chat",
        action="store_true",
        help="put every text in the chat template (default for --prompt where there is one)",
    )
    form.add_argument("--raw", action="store_true", help="continue the text as it is")
    group.add_argument("--json", action="store_true", help="print one JSON object a line and nothing else on stdout")
    options.add_sampling_options(parser, max_tokens=DEFAULT_MAX_TOKENS)


def run(args: argparse.Namespace) -> int:
    """Read the prompts, load the model, answer, print."""
    engine_options = options.engine_options(args)
    items = read_prompts(args)
    _check_shown(args)
    llm = load_llm(engine_options)
    try:
        inputs = [model_input(item, llm, chat=args.chat, raw=args.raw) for item in items]
        results = llm.generate(inputs, [item.params for item in items], use_tqdm=sys.stderr.isatty())
        (print_json if args.json else print_text)(items, results)
        sys.stdout.flush()  # the first report on a machine measures its rates: the answers need not wait for that
        print(llm.last_report.summary(), file=sys.stderr if args.json else sys.stdout)
    finally:
        llm.shutdown()
    failed = any(choice.finish_reason == "error" for result in results for choice in result.outputs)
    return 1 if failed else 0


def _check_shown(args: argparse.Namespace) -> None:
    """Refuse to compute what only `--json` shows."""
    for name in ("logprobs", "prompt_logprobs"):
        if hasattr(args, name) and not args.json:
            raise ConfigError(f"{options.flag(name)} is shown with --json only; add it.")


def load_llm(engine_options: dict[str, Any]) -> LLM:
    """The engine, imported only now: parsing a command line must not wait for torch."""
    from nanoflow.engine.llm import LLM

    return LLM(**engine_options, show_progress=sys.stderr.isatty())


def read_prompts(args: argparse.Namespace) -> list[prompts.PromptItem]:
    """Prompts of `--prompt` and `--prompts`, in that order, all checked."""
    sampling = {"max_tokens": DEFAULT_MAX_TOKENS, **options.sampling_options(args)}
    items = prompts.from_arguments(args.prompt or [], SamplingParams(**sampling), sys.stdin)
    for path in args.prompts or []:
        items += prompts.from_file(path, sampling, first_id=len(items))
    if not items:
        raise ConfigError("nothing to answer; give --prompt TEXT or --prompts FILE.jsonl.")
    return items


def model_input(item: prompts.PromptItem, llm: LLM, *, chat: bool, raw: bool) -> str | list[int]:
    """What `LLM.generate` takes: token ids, plain text, or the text that the chat template makes of it as token ids."""
    if item.token_ids is not None:
        return list(item.token_ids)
    tokenizer = llm.tokenizer
    if item.text is not None:
        if raw or not (chat or (item.typed and tokenizer.has_chat_template)):
            return item.text
        messages: Sequence[Any] = [{"role": "user", "content": item.text}]
    else:
        assert item.messages is not None
        messages = item.messages
    if not tokenizer.has_chat_template:
        raise InvalidRequestError(
            "this model has no chat template; leave --chat out, or send text instead of messages."
        )
    return tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)


def print_text(items: Sequence[prompts.PromptItem], results: Sequence[RequestOutput]) -> None:
    """Answers for people: each under its prompt, unless there is only one."""
    for item, result in zip(items, results, strict=True):
        if len(items) > 1:
            print(f"> {_shown(item)}")
        for choice in result.outputs:
            mark = f"[{choice.index}] " if len(result.outputs) > 1 else ""
            print(f"{mark}{choice.text.strip()}")
        print()


def print_json(items: Sequence[prompts.PromptItem], results: Sequence[RequestOutput]) -> None:
    """One object for each choice."""
    for item, result in zip(items, results, strict=True):
        for choice in result.outputs:
            print(json.dumps(json_object(item, result, choice), ensure_ascii=False))


def json_object(item: prompts.PromptItem, result: RequestOutput, choice: CompletionOutput) -> dict[str, Any]:
    """A choice with what it answers and what it cost in tokens."""
    n_prompt, n_output = len(result.prompt_token_ids), len(choice.token_ids)
    source: dict[str, Any] = {"messages": list(item.messages)} if item.messages is not None else {"prompt": item.text}
    if item.token_ids is not None:
        source = {"prompt_token_ids": list(item.token_ids)}
    answer: dict[str, Any] = {
        "id": item.id,
        "index": choice.index,
        **source,
        "text": choice.text,
        "finish_reason": choice.finish_reason,
        "usage": {"prompt_tokens": n_prompt, "completion_tokens": n_output, "total_tokens": n_prompt + n_output},
    }
    if choice.logprobs is not None:
        answer["token_ids"] = choice.token_ids
        answer["logprobs"] = [_json_logprobs(table) for table in choice.logprobs]
    if result.prompt_logprobs is not None:
        answer["prompt_logprobs"] = [table and _json_logprobs(table) for table in result.prompt_logprobs]
    return answer


def _json_logprobs(table: dict[int, Any]) -> dict[str, Any]:
    return {str(token): asdict(entry) for token, entry in table.items()}


def _shown(item: prompts.PromptItem) -> str:
    if item.text is not None:
        return item.text
    if item.messages is not None:
        return str(item.messages[-1].get("content", ""))
    return f"{len(item.token_ids or ())} token ids"
