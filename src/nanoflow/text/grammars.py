"""Grammars over a model's tokens: which may come next so that the answer can still match what was asked for.

The parser is the library llguidance (MIT; an Earley parser over lexemes with derivatives of regular expressions, run
along a trie of the vocabulary). It is an extra and loaded on first use. `Grammars` compiles and remembers, in any
thread; a `Guide` is one answer's place in its grammar, and belongs to whoever advances it.

A mask is one bit a token of the vocabulary, V of them in words of 32: W = ceil(V / 32).
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Any, TypeVar

import numpy as np

from nanoflow.core.batch import Int32Array
from nanoflow.core.env import available_cores
from nanoflow.core.errors import ConfigError, InvalidRequestError
from nanoflow.core.structured import StructuredOutput
from nanoflow.text.base import Tokenizer

T = TypeVar("T")

KEPT_GRAMMARS = 64
"""Compiled grammars that are remembered, the last used ones."""

WHITESPACE = r"[ \t\r\n]{1,20}"
"""Between the parts of a JSON text: a limit, so that a model cannot fill its answer with spaces."""

LONGEST_COMPILE_S = 10.0
"""A few schemas (dozens of patterns that must hold at once) take hours. The thread cannot be stopped: it goes on."""

COMPILERS = 4
"""Grammars that are compiled at a time, so that those that take too long hold no more cores."""

MAX_DEFINITION_CHARS = 1 << 18
"""Longest schema, expression or grammar."""

MAX_GBNF_CHARS = 1 << 14
"""Longest grammar in GBNF: converting it takes time that grows with the square (measured: up to 2 s for this one)."""

_STACK_BYTES = 256 << 20
"""For compiling: rules that lead to rules recurse, and a definition of the largest size must not overflow the stack
(measured: 2 to 3 KiB a rule; memory is taken only as far as it is used)."""

_WORD_BITS = 32

_LEAST_VERSION = (1, 9)
"""Earlier ones take other arguments."""

_INSTALL = "install it with `pip install 'nanoflow-serve[structured]'`"


class Guide:
    """What an answer may go on with. `bits_w` is the mask of its next token."""

    __slots__ = ("_matcher", "_vocabulary", "bits_w", "ended", "ended_in_text", "failure")

    def __init__(self, matcher: Any, bits_w: Int32Array, vocabulary: _Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self.bits_w = bits_w
        self.ended = False  # nothing may follow
        self.ended_in_text = False  # without an end token: the last token is part of the text
        self.failure: str | None = None

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        return self._vocabulary.eos_ids

    def allowed(self, barred: Iterable[int]) -> Int32Array:
        """The mask (W) without the tokens `barred`, unless nothing else may follow."""
        bits_1w = self.bits_w[None].copy()
        _clear(bits_1w, barred)
        return bits_1w[0] if bits_1w.any() else self.bits_w

    def _take(self, token: int) -> None:
        matcher = self._matcher
        if not matcher.consume_token(token):
            self._fail(matcher.get_error())
        elif matcher.is_stopped():
            self.ended, self.ended_in_text = True, token not in self.eos_ids

    def _expect(self, bits_w: Int32Array) -> None:
        """`bits_w` is the mask that was found after the last token."""
        if self._matcher.is_error():
            self._fail(self._matcher.get_error())
        elif bits_w.any():
            self.bits_w = bits_w
        elif self._matcher.is_accepting():
            self.ended = self.ended_in_text = True
        else:
            self._fail("no token of this model's vocabulary can follow")

    def _fail(self, why: str) -> None:
        self.ended, self.failure = True, _one_line(why)


def advance(guides: Sequence[Guide], tokens: Sequence[int]) -> None:
    """Give each of `guides` (all of one `Grammars`) its next token and find what may follow, over several threads."""
    for guide, token in zip(guides, tokens, strict=True):
        guide._take(token)
    going = [guide for guide in guides if not guide.ended]
    if not going:
        return
    masks_gw = going[0]._vocabulary.masks([guide._matcher for guide in going])
    for guide, bits_w in zip(going, masks_gw, strict=True):
        guide._expect(bits_w)


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar at its beginning."""

    matcher: Any
    start_w: Int32Array
    vocabulary: _Vocabulary

    def start(self) -> Guide:
        """A guide for a new answer."""
        return Guide(self.matcher.deep_copy(), self.start_w, self.vocabulary)


class Grammars:
    """Compiles for one vocabulary of `vocab_size` tokens, of which `eos_ids` end a text. Safe to use in any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = [token for token in dict.fromkeys(eos_ids) if token < vocab_size]
        self._kept: OrderedDict[StructuredOutput, Grammar] = OrderedDict()
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._compilers = threading.BoundedSemaphore(COMPILERS)
        self._vocabulary: _Vocabulary | None = None

    def compile(self, wanted: StructuredOutput) -> Grammar:
        """The grammar of `wanted`; a new one takes milliseconds, a very large one up to a second.

        Raises `InvalidRequestError` that says what is wrong with it, or `ConfigError` where llguidance is missing or
        too old.
        """
        with self._lock:
            known = self._kept.get(wanted)
            if known is not None:
                self._kept.move_to_end(wanted)
                return known
        vocabulary = self._known_vocabulary()
        try:
            grammar = self._on_deep_stack(lambda: _compiled(wanted, vocabulary))
        except TimeoutError:
            raise _refusal(wanted, f"compiling it takes longer than {LONGEST_COMPILE_S:g} s") from None
        with self._lock:
            self._kept[wanted] = grammar
            while len(self._kept) > KEPT_GRAMMARS:
                self._kept.popitem(last=False)
        return grammar

    def _on_deep_stack(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread of its own with a large stack. Raises `TimeoutError` if it takes too long."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            finally:
                self._compilers.release()

        if not self._compilers.acquire(timeout=LONGEST_COMPILE_S):
            raise TimeoutError
        with self._making:
            usual = threading.stack_size(_STACK_BYTES)
            try:
                threading.Thread(target=run, name="grammar", daemon=True).start()
            finally:
                threading.stack_size(usual)
        return future.result(LONGEST_COMPILE_S)

    def _known_vocabulary(self) -> _Vocabulary:
        with self._making:
            if self._vocabulary is None:
                self._vocabulary = _Vocabulary(self._tokenizer, self._vocab_size, self._eos_ids)
            return self._vocabulary


def _compiled(wanted: StructuredOutput, vocabulary: _Vocabulary) -> Grammar:
    library = _library()
    limits = library.LLParserLimits(verbose_errors=False)
    try:
        matcher = library.LLMatcher(vocabulary.trie, _definition(wanted), log_level=0, limits=limits)
    except ValueError as error:
        raise _refusal(wanted, str(error)) from None
    if matcher.is_error():
        raise _refusal(wanted, matcher.get_error())
    start_1w = vocabulary.masks([matcher])
    if matcher.is_error():
        raise _refusal(wanted, matcher.get_error())
    if not start_1w.any():
        raise _refusal(wanted, "no token of this model's vocabulary can begin it")
    return Grammar(matcher, start_1w[0], vocabulary)


class _Vocabulary:
    """The tokens as llguidance wants them. It needs an end token: where there is none it gets one beyond the
    vocabulary, of which no mask tells."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        library = _library()
        self.eos_ids = frozenset(eos_ids)
        self.eos_token_id = eos_ids[0] if eos_ids else vocab_size
        self.bos_token_id = None
        special = {token for token in tokenizer.special_ids if token < vocab_size}
        self.special_token_ids = sorted(special | self.eos_ids | {self.eos_token_id})
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        if not eos_ids:
            self.tokens.append(b"<end>")
        self._beyond = range(vocab_size, len(self.tokens))
        self._tokenizer = tokenizer
        self.trie = library.LLTokenizer(library.TokenizerWrapper(self), eos_token=list(eos_ids) or [vocab_size])

    def __call__(self, text: str) -> list[int]:
        """Token ids of `text`."""
        if not isinstance(text, str):
            raise TypeError("texts only")
        return self._tokenizer.encode(text, add_special_tokens=False)

    def masks(self, matchers: Sequence[Any]) -> Int32Array:
        """The mask (W) of each matcher. The interpreter's lock is given up meanwhile."""
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask, fill_next_token_bitmask_par

        masks_gw: Int32Array = allocate_token_bitmask(len(matchers), len(self.tokens))
        if len(matchers) == 1:
            fill_next_token_bitmask(matchers[0], masks_gw)
        else:
            fill_next_token_bitmask_par(_threads(), [(matcher, row) for row, matcher in enumerate(matchers)], masks_gw)
        _clear(masks_gw, self._beyond)
        return masks_gw


def _clear(masks_gw: Int32Array, tokens: Iterable[int]) -> None:
    """Forbid `tokens` in every mask."""
    words_gw = masks_gw.view(np.uint32)
    for token in tokens:
        words_gw[:, token // _WORD_BITS] &= np.uint32(~(1 << token % _WORD_BITS) & 0xFFFFFFFF)


def _definition(wanted: StructuredOutput) -> str:
    """`wanted` in llguidance's dialect of Lark. Raises `ValueError` for a grammar in neither notation."""
    if wanted.json is not None or wanted.json_object:
        rules = f"start: %json {with_short_gaps(_short(wanted.json or ANY_OBJECT))}"
    elif wanted.regex is not None:
        rules = f"start: /{_library().regex_to_lark(_short(wanted.regex))}/"
    elif wanted.choice is not None:
        rules = "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in wanted.choice)
    else:
        rules = _lark(_short(wanted.grammar))
    return f"{_short(rules)}\n{_OPTIONS}"


def _lark(grammar: str) -> str:
    """`grammar` in Lark's notation, if it is GBNF (which has `::=`)."""
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import any_to_lark

    if len(grammar) > MAX_GBNF_CHARS:
        raise ValueError(
            f"it is GBNF of {len(grammar)} characters, and {MAX_GBNF_CHARS} are allowed (Lark may be longer)"
        )
    try:
        return any_to_lark(grammar)
    except Exception as error:  # of many kinds, for what it cannot read
        raise ValueError(f"it is no GBNF: {error}") from None


def with_short_gaps(text: str) -> str:
    """The schema `text` with a limit on white space, unless it brings llguidance's options for it."""
    schema = json.loads(text)
    options = schema.get("x-guidance", {})
    if isinstance(options, dict) and not {"whitespace_pattern", "whitespace_flexible"} & set(options):
        schema["x-guidance"] = {**options, "whitespace_pattern": WHITESPACE}
    return json.dumps(schema, ensure_ascii=False)


def _short(text: Any) -> str:
    if len(text) > MAX_DEFINITION_CHARS:
        raise ValueError(f"it has {len(text)} characters, and {MAX_DEFINITION_CHARS} are allowed")
    return str(text)


_OPTIONS = '%llguidance {"no_forcing": true}'
"""Where only one text can follow, leave it to the model into which tokens it is cut, as everywhere else."""

ANY_OBJECT = '{"type": "object"}'

_NAMES = {"json": "JSON schema", "json_object": "JSON schema", "regex": "regular expression", "choice": "choice"}


def _refusal(wanted: StructuredOutput, why: str) -> InvalidRequestError:
    name = _NAMES.get(wanted.kind, wanted.kind)
    if wanted.kind != "grammar":  # places are those in the grammar made of it
        why = re.sub(r"^\d+\(\d+\): ", "", why)
    return InvalidRequestError(f"the {name} cannot be followed: {_one_line(why)}; change it.", wanted.kind)


def _one_line(why: str) -> str:
    """The library's words without the excerpt that it adds."""
    words = " ".join(re.split(r"\n *\d+ \|", why)[0].split()).rstrip(".;")
    return words if len(words) <= 300 else f"{words[:297]}..."


@lru_cache(maxsize=1)
def _threads() -> Any:
    """Half of the cores, of which the model's own work needs some."""
    return _library().LLExecutor(min(16, max(1, available_cores() // 2)))


def _library() -> Any:
    """llguidance. Raises `ConfigError` where it is missing or too old."""
    try:
        import llguidance
    except ImportError:
        raise ConfigError(f"structured output needs llguidance; {_INSTALL}.") from None
    found = getattr(llguidance, "__version__", None) or metadata.version("llguidance")  # not all of them tell
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < _LEAST_VERSION:
        least = ".".join(map(str, _LEAST_VERSION))
        raise ConfigError(f"structured output needs llguidance {least} or newer, and here is {found}; {_INSTALL}.")
    return llguidance
