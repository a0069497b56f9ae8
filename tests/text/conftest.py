"""Tokenizers of both families: SmolLM2's byte-level BPE and a small SentencePiece-style one."""

from typing import Any

import pytest

from nanoflow.text.gguf_tokenizer import gguf_tokenizer
from nanoflow.text.hf_tokenizer import HfTokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world, how are you today?", "naïve café 123 456"] * 20


@pytest.fixture(scope="session")
def smollm2() -> HfTokenizer:
    """The packaged model's tokenizer."""
    from nanoflow.models.gguf_file import read_gguf
    from nanoflow.models.smollm2 import packaged_gguf

    file = read_gguf(packaged_gguf())
    return gguf_tokenizer(file.metadata, (2,), "smollm2")


@pytest.fixture(scope="session")
def sentencepiece_backend() -> Any:
    """A trained BPE with byte fallback, put together as in the tokenizer.json of Llama 2."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

    bytes_of = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[*special, *bytes_of], initial_alphabet=list("abcdefghijklmnopqrstuvwxyz▁")
    )
    backend.train_from_iterator(CORPUS, trainer)
    vocabulary = [token for token, _ in sorted(backend.get_vocab().items(), key=lambda item: item[1])]
    import json

    merges = [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    ids = {token: index for index, token in enumerate(vocabulary)}
    fresh = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fresh.normalizer = backend.normalizer
    fresh.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    fresh.decoder = decoders.Sequence(steps)
    return fresh


@pytest.fixture(scope="session")
def sentencepiece_metadata(sentencepiece_backend: Any) -> dict[str, Any]:
    """The same vocabulary as GGUF metadata: the earlier a piece is merged, the higher its score."""
    vocabulary = sorted(sentencepiece_backend.get_vocab().items(), key=lambda item: item[1])
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [token for token, _ in vocabulary],
        "tokenizer.ggml.scores": [-float(index) for _, index in vocabulary],
        "tokenizer.ggml.token_type": [6 if token.startswith("<0x") else kinds.get(token, 1) for token, _ in vocabulary],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_metadata: dict[str, Any]) -> HfTokenizer:
    """A SentencePiece-style tokenizer from GGUF metadata."""
    return gguf_tokenizer(sentencepiece_metadata, (2,), "test")
