"""Masks against the set of all texts that match, compiled grammars that are kept, and what must not end the process."""

from __future__ import annotations

import json
import re
import sys
import threading
from itertools import product

import llguidance
import numpy as np
import pytest
import tokenizers

from nanoflow.core.errors import ConfigError, InvalidRequestError
from nanoflow.core.structured import StructuredOutput
from nanoflow.text import grammars
from nanoflow.text.byte_tokenizer import ByteTokenizer
from nanoflow.text.grammars import Grammars, Guide, advance
from nanoflow.text.hf_tokenizer import HfTokenizer, TokenizerExtras

EOS = 0
WORDS = ["<eos>", "<user>", *"abcdefgh", "ab", "abc", "bc", "ca", "aa", "cab", "Ġa", "Ġ", "Ã", "©"]


def word_tokenizer() -> HfTokenizer:
    """Byte-level tokens of several letters; two special ones. Ã and © are the bytes of é."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(WORDS)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", "<user>"])
    return HfTokenizer(backend, TokenizerExtras(eos_ids=(EOS,)), "test")


def allowed(guide: Guide, barred: tuple[int, ...] = ()) -> set[int]:
    bits = np.unpackbits(guide.allowed(barred).view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def expected(prefix: bytes, texts: set[bytes], tokenizer: HfTokenizer, vocab_size: int) -> set[int]:
    """Tokens that a text of `texts` can go on with after `prefix`, and the end token where it may end."""
    going = {
        token
        for token in range(vocab_size)
        if token not in (0, 1) and (piece := tokenizer.token_bytes(token))
        if any(text.startswith(prefix + piece) for text in texts)
    }
    return going | ({EOS} if prefix in texts else set())


@pytest.mark.parametrize(
    ("wanted", "texts"),
    [
        (StructuredOutput(choice=["abc", "ab", "cab", "<user>"]), ["abc", "ab", "cab", "<user>"]),
        (
            StructuredOutput(regex="(a|bc){1,3}"),
            ["".join(x) for n in (1, 2, 3) for x in product(("a", "bc"), repeat=n)],
        ),
        (StructuredOutput(grammar='start: x x?\nx: "ab" | "c" "a"'), ["ab", "ca", "abab", "abca", "caab", "caca"]),
        (StructuredOutput(grammar='root ::= "a" [bc]? "é"'), ["aé", "abé", "acé"]),
    ],
)
def test_masks_are_those_of_all_texts(wanted: StructuredOutput, texts: list[str]) -> None:
    tokenizer = word_tokenizer()
    vocab_size = len(WORDS) + 40  # ids beyond the tokenizer's stand for nothing
    made = Grammars(tokenizer, vocab_size, (EOS,))
    whole = {text.encode() for text in texts}
    reached: dict[bytes, bool] = {}

    def walk(tokens: list[int], prefix: bytes) -> None:
        guide = made.compile(wanted).start()
        for token in tokens:
            advance([guide], [token])
        assert guide.failure is None
        reached[prefix] = guide.ended
        may = expected(prefix, whole, tokenizer, vocab_size)
        assert guide.ended == (may == {EOS})
        if not guide.ended:
            assert allowed(guide) == may, prefix
            for token in may - {EOS}:
                walk([*tokens, token], prefix + tokenizer.token_bytes(token))

    walk([], b"")
    assert whole - {b"<user>"} <= set(reached), "special tokens are no text, though they are called like one"


def test_end_tokens_can_be_barred_unless_nothing_else_may_follow() -> None:
    made = Grammars(ByteTokenizer(300), 300, (2, 7))
    guide = made.compile(StructuredOutput(regex="ab?")).start()
    advance([guide], [ord("a")])
    letters = {ord("b"), *(i for i in range(256, 300) if 97 + i % 26 == ord("b"))}
    assert allowed(guide) == letters | {2, 7}
    assert allowed(guide, (2, 7)) == letters
    assert allowed(guide) == letters | {2, 7}, "asking changes nothing"
    only_end = made.compile(StructuredOutput(regex="(a{3}){0}")).start()
    assert allowed(only_end, (2, 7)) == {2, 7}


def test_a_model_without_end_token_ends_where_nothing_can_follow() -> None:
    made = Grammars(ByteTokenizer(320), 320, ())
    guide = made.compile(StructuredOutput(regex="ab?")).start()
    advance([guide], [ord("a")])
    assert not guide.ended and all(token < 320 for token in allowed(guide))
    advance([guide], [ord("b")])
    assert guide.ended and guide.ended_in_text and guide.failure is None
    with pytest.raises(InvalidRequestError, match="no token of this model's vocabulary can begin it"):
        made.compile(StructuredOutput(regex="(a{3}){0}"))


def test_guides_advance_together_as_they_would_alone() -> None:
    made = Grammars(ByteTokenizer(320), 320, (1,))
    text = b'{"a": [12, true, "x"]}'
    grammar = made.compile(StructuredOutput(json_object=True))
    many = [grammar.start() for _ in range(5)]
    for place, byte in enumerate(text):
        alone = grammar.start()
        for earlier in text[:place]:
            advance([alone], [earlier])
        assert all(allowed(guide) == allowed(alone) for guide in many), text[:place]
        advance(many, [byte] * len(many))
    assert all(guide.ended_in_text for guide in many)


@pytest.mark.parametrize("text", ['{"a":1}', '{ "a" : [ 1 ,\n  2 ] }', '{"é":"\\n"}', "{}"])
def test_json_with_and_without_spaces_is_allowed(text: str) -> None:
    guide = Grammars(ByteTokenizer(320), 320, (1,)).compile(StructuredOutput(json_object=True)).start()
    for byte in text.encode():
        assert byte in allowed(guide)
        advance([guide], [byte])
    assert guide.ended_in_text


def test_spaces_have_an_end() -> None:
    guide = Grammars(ByteTokenizer(320), 320, (1,)).compile(StructuredOutput(json_object=True)).start()
    for byte in b"{" + b" " * 20:
        advance([guide], [byte])
    assert allowed(guide) == {ord('"'), ord("}")}


def test_grammars_are_kept_and_the_oldest_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "KEPT_GRAMMARS", 2)
    made = Grammars(ByteTokenizer(320), 320, (1,))
    first = made.compile(StructuredOutput(regex="a"))
    made.compile(StructuredOutput(regex="b"))
    assert made.compile(StructuredOutput(regex="a")) is first
    made.compile(StructuredOutput(regex="c"))
    assert made.compile(StructuredOutput(regex="a")) is first, "used more lately than b"
    assert len(made._kept) == 2


def test_threads_may_compile_at_once() -> None:
    made = Grammars(ByteTokenizer(320), 320, (1,))
    done: list[set[int]] = []
    wanted = [StructuredOutput(regex=letter) for letter in "abcd"] * 3
    threads = [threading.Thread(target=lambda w=w: done.append(allowed(made.compile(w).start()))) for w in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 12 and len(set(map(frozenset, done))) == 4


CHAIN = 5000
CHAINED_RULES = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(CHAIN)) + f'\nr{CHAIN}: "a"'
CHAINED_SCHEMA = {
    "$defs": {**{f"{i}": {"$ref": f"#/$defs/{i + 1}"} for i in range(CHAIN)}, f"{CHAIN}": {"type": "null"}},
    "$ref": "#/$defs/0",
}


@pytest.mark.parametrize(
    ("wanted", "start"),
    [(StructuredOutput(grammar=CHAINED_RULES), "a"), (StructuredOutput(json=CHAINED_SCHEMA), "n")],
    ids=["rules", "schema"],
)
def test_long_chains_of_rules_do_not_overflow_the_stack(wanted: StructuredOutput, start: str) -> None:
    """On a usual stack each of them ends the process."""
    guide = Grammars(ByteTokenizer(300), 300, (1,)).compile(wanted).start()
    assert ord(start) in allowed(guide)
    advance([guide], [ord(start)])
    assert guide.failure is None


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (StructuredOutput(regex="(" * 5000 + "a" + ")" * 5000), "the regular expression cannot be followed"),
        (StructuredOutput(grammar='root ::= "a' + "(" * 20_000), "the grammar cannot be followed"),
        (StructuredOutput(grammar="start: " + "(" * 5000 + '"a"' + ")" * 5000), "nested"),
        (StructuredOutput(regex="a(?=b)"), "look-around"),
        (StructuredOutput(json={"type": "array", "uniqueItems": True}), "uniqueItems"),
        (StructuredOutput(json={"enum": []}), "the JSON schema cannot be followed"),
        (StructuredOutput(choice=["x" * 300_000]), "262144 are allowed"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_a_sentence(wanted: StructuredOutput, sentence: str) -> None:
    with pytest.raises(InvalidRequestError, match=sentence) as refusal:
        Grammars(ByteTokenizer(300), 300, (1,)).compile(wanted)
    assert str(refusal.value).endswith("; change it.") and len(str(refusal.value)) < 400
    assert refusal.value.param == wanted.kind


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"install it with `pip install 'nanoflow-serve\[structured\]'`"):
        Grammars(ByteTokenizer(300), 300, (1,)).compile(StructuredOutput(regex="a"))


@pytest.mark.parametrize("version", ["1.8.3", "0.7.30", "1"])
def test_an_older_library_is_named(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llguidance, "__version__", version)
    wanted = rf"needs llguidance 1\.9 or newer, and here is {re.escape(version)}; install it with `pip install"
    with pytest.raises(ConfigError, match=wanted):
        Grammars(ByteTokenizer(300), 300, (1,)).compile(StructuredOutput(regex="a"))


def test_a_library_too_old_to_tell_its_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(llguidance, "__version__")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.1.2" if name == "llguidance" else "9")
    with pytest.raises(ConfigError, match=r"or newer, and here is 1\.1\.2; install it"):
        Grammars(ByteTokenizer(300), 300, (1,)).compile(StructuredOutput(regex="a"))


@pytest.mark.parametrize("version", ["1.9", "1.10.0rc1", "2.0.0"])
def test_newer_libraries_are_welcome(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llguidance, "__version__", version)
    assert ord("a") in allowed(Grammars(ByteTokenizer(300), 300, (1,)).compile(StructuredOutput(regex="a")).start())


def test_choices_may_hold_any_character() -> None:
    texts = ['"', "\\n", "\n", "\x00\x1f", "😀", "/", "a" * 200]
    made = Grammars(ByteTokenizer(300), 300, (1,))
    for text in texts:
        guide = made.compile(StructuredOutput(choice=[text, json.dumps(text) + "!"])).start()
        for byte in text.encode():
            advance([guide], [byte])
        assert guide.failure is None and (guide.ended_in_text or 1 in allowed(guide))


def test_what_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Grammars(ByteTokenizer(300), 300, (1,))
    end = threading.Event()
    compiled = grammars._compiled
    monkeypatch.setattr(grammars, "LONGEST_COMPILE_S", 0.05)
    monkeypatch.setattr(grammars, "_compiled", lambda wanted, vocabulary: end.wait(20) and compiled(wanted, vocabulary))
    for letter in "abcde":  # the last finds no compiler free
        with pytest.raises(InvalidRequestError, match=r"compiling it takes longer than 0\.05 s; change it"):
            made.compile(StructuredOutput(regex=letter))
    end.set()
    monkeypatch.setattr(grammars, "LONGEST_COMPILE_S", 20)
    assert ord("z") in allowed(made.compile(StructuredOutput(regex="z")).start())
