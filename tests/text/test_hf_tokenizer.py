"""Tokenizers from Hugging Face folders, with the tokenizers and transformers libraries as oracles."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.core.errors import InvalidRequestError, ModelLoadError
from nanoflow.text.byte_tokenizer import ByteTokenizer
from nanoflow.text.hf_tokenizer import HfTokenizer, load_tokenizer_folder


@pytest.fixture
def folder(smollm2: HfTokenizer, tmp_path: Path) -> Path:
    """A model folder with SmolLM2's tokenizer."""
    smollm2._backend.save(str(tmp_path / "tokenizer.json"))
    config = {
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>"},
        "chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with a byte-level tokenizer of a few tokens, quick to read: for what no vocabulary changes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "a": 3, "Ġ": 4, "b": 5, "aa": 6}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "a")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(list(vocabulary)[:3])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return tmp_path


def test_folder_is_read_whole(folder: Path, smollm2: HfTokenizer) -> None:
    tokenizer = load_tokenizer_folder(folder, eos_ids=(0, 2))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (0, 2), 49_152)
    assert tokenizer.encode("Hello, wörld") == smollm2.encode("Hello, wörld")
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "<|im_start|>x"
    assert load_tokenizer_folder(folder / "tokenizer.json").encode("a") == smollm2.encode("a")


def test_template_file_outranks_the_config(small: Path) -> None:
    (small / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer_folder(small).render_chat([{"role": "user", "content": "x"}]) == "from the file"


def test_named_templates(small: Path) -> None:
    templates = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    (small / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert load_tokenizer_folder(small).render_chat([{"role": "user", "content": "x"}]) == "d"


def test_special_tokens_map_stands_in(small: Path) -> None:
    (small / "tokenizer_config.json").unlink()
    (small / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    assert load_tokenizer_folder(small).eos_ids == (2,)


@pytest.mark.parametrize("add_bos", [True, False, None])
def test_add_bos_of_the_config_outranks_the_file(small: Path, add_bos: bool | None) -> None:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    for file_adds in (True, False):
        backend = Tokenizer.from_file(str(small / "tokenizer.json"))
        single = "<|im_start|> $A" if file_adds else "$A"
        backend.post_processor = TemplateProcessing(single=single, special_tokens=[("<|im_start|>", 1)])
        backend.save(str(small / "tokenizer.json"))
        config = {"bos_token": "<|im_start|>"} | ({} if add_bos is None else {"add_bos_token": add_bos})
        (small / "tokenizer_config.json").write_text(json.dumps(config))
        ids = load_tokenizer_folder(small).encode("a")
        assert (ids[0] == 1) is (file_adds if add_bos is None else add_bos)
        assert len(ids) == 1 + (ids[0] == 1)


def test_truncation_and_padding_of_the_file_are_ignored(small: Path) -> None:
    from tokenizers import Tokenizer

    text = "a b aa a b b aa"
    whole = load_tokenizer_folder(small).encode(text)
    assert 4 < len(whole) < 64
    backend = Tokenizer.from_file(str(small / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(small / "tokenizer.json"))
    assert load_tokenizer_folder(small).encode(text) == whole


def test_damaged_files_are_named(small: Path) -> None:
    (small / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"tokenizer_config\.json cannot be read"):
        load_tokenizer_folder(small)
    (small / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer_folder(small)
    (small / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json is missing"):
        load_tokenizer_folder(small)


def test_unknown_decoder_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models

    backend = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelLoadError, match="decodes by WordPiece; supported: ByteLevel"):
        load_tokenizer_folder(tmp_path)


IDS = st.lists(st.integers(0, 49_151), max_size=40)


@settings(max_examples=200, deadline=None)
@given(ids=IDS, skip=st.booleans())
def test_decode_equals_the_librarys(smollm2: HfTokenizer, ids: list[int], skip: bool) -> None:
    assert smollm2.decode(ids, skip_special_tokens=skip) == smollm2._backend.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_sentencepiece_decode_equals_the_librarys(
    sentencepiece: HfTokenizer, sentencepiece_backend: Any, text: str
) -> None:
    ids = sentencepiece.encode(text)
    assert sentencepiece.decode(ids) == sentencepiece_backend.decode(ids, skip_special_tokens=True)


def test_decode_equals_transformers(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    oracle = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), clean_up_tokenization_spaces=False)
    ours = load_tokenizer_folder(folder)
    text = "<|im_start|>user\nHéllo  世界 don't 🙂!<|im_end|>"
    assert ours.encode(text) == oracle.encode(text)
    for skip in (True, False):
        assert ours.decode(oracle.encode(text), skip_special_tokens=skip) == oracle.decode(
            oracle.encode(text), skip_special_tokens=skip
        )


def test_every_byte_has_its_token(smollm2: HfTokenizer) -> None:
    for text in ("\x00\x01", "ÿ", "🙂", "a b"):
        ids = smollm2.encode(text)
        assert b"".join(smollm2.token_bytes(token) for token in ids) == text.encode()
    assert smollm2.token_text(smollm2.encode("🙂")[0]) != ""


def test_ids_outside_the_vocabulary_are_nothing(smollm2: HfTokenizer) -> None:
    assert smollm2.token_bytes(10**9) == smollm2.token_bytes(-1) == b""
    assert smollm2.decode([10**9, *smollm2.encode("ok")]) == "ok"


def test_lone_surrogates_do_not_crash(smollm2: HfTokenizer) -> None:
    assert smollm2.decode(smollm2.encode("a\ud800b")) == "a?b"


def test_batches_and_threads_agree(smollm2: HfTokenizer) -> None:
    texts = [f"text number {index} " * 20 for index in range(64)]
    expected = [smollm2.encode(text) for text in texts]
    assert smollm2.encode_batch(texts) == expected
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(smollm2.encode, texts)) == expected


def test_long_input(smollm2: HfTokenizer) -> None:
    text = "word " * 100_000
    assert smollm2.decode(smollm2.encode(text)) == text


def test_no_template_is_said(sentencepiece: HfTokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="no chat template") as caught:
        sentencepiece.render_chat([{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"
    assert sentencepiece.render_chat([{"role": "user", "content": "x"}], chat_template="T") == "T"


@given(text=st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer(1000)
    assert tokenizer.decode(tokenizer.encode(text)) == text.encode("utf-8", "replace").decode()
    assert tokenizer.encode_batch([text]) == [tokenizer.encode(text)]


def test_byte_tokenizer_shows_every_id_and_stays_in_a_small_vocabulary() -> None:
    assert all(ByteTokenizer(5000).token_text(token) for token in range(5000))
    assert max(ByteTokenizer(64).encode("zzzé")) < 64
    assert ByteTokenizer(300).render_chat([{"role": "user", "content": "x"}]) == "user: x\nassistant: "
