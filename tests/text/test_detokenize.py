"""Incremental detokenisation: pieces add up to the whole, none is taken back, and the cost does not grow."""

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.text.base import Tokenizer
from nanoflow.text.byte_tokenizer import ByteTokenizer
from nanoflow.text.detokenize import IncrementalDetokenizer
from nanoflow.text.hf_tokenizer import HfTokenizer


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool, step: int = 1) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    pieces = [detokenizer.push(ids[start : start + step]) for start in range(0, len(ids), step)]
    return [*pieces, detokenizer.finish()]


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 49_151), max_size=50), skip=st.booleans(), step=st.integers(1, 4))
def test_any_tokens_add_up(smollm2: HfTokenizer, ids: list[int], skip: bool, step: int) -> None:
    assert "".join(streamed(smollm2, ids, skip, step)) == smollm2.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 255) | st.sampled_from([0xE2, 0x82, 0xAC, 0xF0, 0x9F]), max_size=50))
def test_any_bytes_add_up(ids: list[int]) -> None:
    tokenizer = ByteTokenizer(256)
    assert "".join(streamed(tokenizer, ids, True)) == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_sentencepiece_adds_up(sentencepiece: HfTokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, sentencepiece.vocab_size - 1), max_size=30))
    assert "".join(streamed(sentencepiece, ids, skip)) == sentencepiece.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cc", "Cs"]), max_size=60))
def test_no_piece_of_valid_text_is_broken(smollm2: HfTokenizer, text: str) -> None:
    pieces = streamed(smollm2, smollm2.encode(text), skip=False)
    assert "".join(pieces) == text
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def test_character_over_several_tokens_comes_whole(smollm2: HfTokenizer) -> None:
    ids = smollm2.encode("𝛼")
    assert len(ids) > 1
    assert streamed(smollm2, ids, skip=True) == [""] * (len(ids) - 1) + ["𝛼", ""]


def test_unfinished_character_ends_as_replacement(smollm2: HfTokenizer) -> None:
    ids = smollm2.encode("𝛼")[:-1]
    assert streamed(smollm2, ids, skip=True)[-1] == "\ufffd"


def test_special_tokens_skipped_or_kept(smollm2: HfTokenizer) -> None:
    ids = smollm2.encode("<|im_start|>a<|im_end|>")
    assert "".join(streamed(smollm2, ids, skip=True)) == "a"
    assert "".join(streamed(smollm2, ids, skip=False)) == "<|im_start|>a<|im_end|>"


def test_cost_of_a_token_does_not_depend_on_those_before(smollm2: HfTokenizer) -> None:
    def best_s(n_tokens: int) -> float:
        ids = smollm2.encode("hello 世界 ") * (n_tokens // 5)
        times = []
        for _ in range(3):
            started = time.perf_counter()
            streamed(smollm2, ids, skip=True)
            times.append((time.perf_counter() - started) / len(ids))
        return min(times)

    best_s(1000)
    assert best_s(50_000) < 5 * best_s(1000)
