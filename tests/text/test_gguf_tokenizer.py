"""Tokenizers from GGUF metadata."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.core.errors import ModelLoadError
from nanoflow.text.gguf_tokenizer import gguf_tokenizer
from nanoflow.text.hf_tokenizer import HfTokenizer, byte_characters

# Ids that the tokenizer published with HuggingFaceTB/SmolLM2-135M-Instruct gives.
KNOWN = {
    "What is the capital of France?": [1780, 314, 260, 3575, 282, 4649, 47],
    "<|im_start|>user\n": [1, 4093, 198],
    "<|im_end|>": [2],
}


def test_smollm2_known_ids(smollm2: HfTokenizer) -> None:
    assert {text: smollm2.encode(text) for text in KNOWN} == KNOWN
    assert (smollm2.bos_id, smollm2.eos_ids, smollm2.vocab_size) == (1, (2,), 49_152)


def test_smollm2_adds_no_bos_and_splits_digits(smollm2: HfTokenizer) -> None:
    assert smollm2.encode("a", add_special_tokens=True) == smollm2.encode("a", add_special_tokens=False)
    assert len(smollm2.encode("2024")) == 4


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cc", "Cs"])))
def test_smollm2_round_trip(smollm2: HfTokenizer, text: str) -> None:
    """Of all text but what needs the 21 bytes (rare control characters, planes 4 and up) its vocabulary lacks."""
    assert smollm2.decode(smollm2.encode(text), skip_special_tokens=False) == text


def test_smollm2_chat_prompt(smollm2: HfTokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    user = "<|im_start|>user\nHi<|im_end|>\n"
    assert smollm2.render_chat(messages[:1]) == system + user + "<|im_start|>assistant\n"
    whole = smollm2.render_chat(messages, add_generation_prompt=False)
    assert whole == system + user + "<|im_start|>assistant\nHello<|im_end|>\n"
    own = [{"role": "system", "content": "Be brief."}, *messages[:1]]
    assert smollm2.render_chat(own).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


def byte_level(pre: str, extra: list[str], merges: list[str], **metadata: Any) -> HfTokenizer:
    """A tokenizer of all single bytes, some merges, and a special token."""
    tokens = [*byte_characters(), *extra, "<|end|>"]
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.ggml.{key}": value for key, value in metadata.items()},
    }
    return gguf_tokenizer(values, (), "test")


def pieces(tokenizer: HfTokenizer, text: str) -> list[str]:
    return [tokenizer.token_text(token) for token in tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("llama-bpe", ["123", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
        ("smollm", ["1", "2", "3", "4"]),
        ("gpt-2", ["1234"]),
        ("default", ["1234"]),
    ],
)
def test_pre_tokenizers_split_numbers_in_their_own_way(pre: str, expected: list[str]) -> None:
    tokenizer = byte_level(pre, ["12", "123", "1234"], ["1 2", "12 3", "123 4"])
    assert pieces(tokenizer, "1234") == expected


def test_llama_pattern_keeps_punctuation_with_the_word() -> None:
    tokenizer = byte_level("llama-bpe", [".a", "ab", ".ab"], [". a", ".a b", "a b"])
    assert pieces(tokenizer, ".ab") == [".ab"]
    assert pieces(byte_level("gpt-2", [".a", "ab", ".ab"], [". a", ".a b", "a b"]), ".ab") == [".", "ab"]


def test_llama_pattern_agrees_with_the_published_one() -> None:
    """Split of meta-llama/Meta-Llama-3-8B's tokenizer.json on a text with every branch of its pattern."""
    tokenizer = byte_level("llama-bpe", [], [])
    backend = tokenizer._backend
    text = "I'M  12345 ok!!\n\n  x\tÜber 世界 …"
    found = [text[start:stop] for _, (start, stop) in backend.pre_tokenizer.pre_tokenize_str(text)]
    expected = ["I", "'M", " ", " ", "123", "45", " ok", "!!\n\n", " ", " x", "\tÜber", " 世界", " …"]
    assert found == expected


def test_qwen2_normalises() -> None:
    assert byte_level("qwen2", [], []).decode(byte_level("qwen2", [], []).encode("e\u0301")) == "é"


def test_special_tokens_are_recognised_and_skipped() -> None:
    tokenizer = byte_level("gpt-2", [], [])
    ids = tokenizer.encode("a<|end|>b")
    assert len(ids) == 3
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|end|>b"


def test_add_bos_follows_the_metadata() -> None:
    with_bos = byte_level("gpt-2", [], [], bos_token_id=256, add_bos_token=True)
    assert with_bos.encode("a") == [256, *with_bos.encode("a", add_special_tokens=False)]
    without = byte_level("gpt-2", [], [], bos_token_id=256, add_bos_token=False)
    assert without.encode("a") == without.encode("a", add_special_tokens=False)


def test_llama3_adds_bos_unless_told() -> None:
    assert byte_level("llama-bpe", [], [], bos_token_id=256).encode("a")[0] == 256
    assert len(byte_level("llama-bpe", [], [], bos_token_id=256, add_bos_token=False).encode("a")) == 1


def test_damaged_vocabularies_are_refused() -> None:
    with pytest.raises(ModelLoadError, match="damaged"):
        byte_level("gpt-2", [], ["zz yy"])
    with pytest.raises(ModelLoadError, match="damaged"):
        byte_level("gpt-2", [], [], bos_token_id=9999, add_bos_token=True)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="thequickbrown foxé,1世", max_size=60))
def test_sentencepiece_encodes_like_the_original(
    sentencepiece: HfTokenizer, sentencepiece_backend: Any, text: str
) -> None:
    expected = sentencepiece_backend.encode(text, add_special_tokens=False).ids
    assert sentencepiece.encode(text, add_special_tokens=False) == expected
    assert sentencepiece.decode(expected) == text


def test_sentencepiece_adds_bos_and_has_no_template(sentencepiece: HfTokenizer) -> None:
    assert sentencepiece.encode("hello")[0] == 1
    assert not sentencepiece.has_chat_template
    assert sentencepiece.token_bytes(3 + 0xE9) == b"\xe9"
    assert sentencepiece.decode([*sentencepiece.encode("hello world"), 2]) == "hello world"


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({}, "no vocabulary"),
        ({"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.model": "t5"}, "'t5' is not supported"),
        (
            {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "tekken"},
            "'tekken' is not supported .*smollm",
        ),
    ],
)
def test_unsupported_kinds_are_refused(metadata: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelLoadError, match=match):
        gguf_tokenizer(metadata, (), "test")
