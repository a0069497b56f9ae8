"""Builds a tokenizer from the metadata of a GGUF file: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`).

GGUF names its pre-tokenizer instead of spelling it out; the patterns here are those of the models' published
`tokenizer.json` files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nanoflow.core.errors import ModelLoadError
from nanoflow.text.hf_tokenizer import HfTokenizer, TokenizerExtras, prepend_bos

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # meta-llama/Meta-Llama-3-8B
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")  # Qwen/Qwen2-7B
_GPT2_NAMES = ("default", "gpt-2", "gpt2")
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_SPLIT_PATTERNS = {**dict.fromkeys(_LLAMA3_NAMES, _LLAMA3), "qwen2": _QWEN2}
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # token types of the GGUF format


def gguf_tokenizer(metadata: Mapping[str, Any], eos_ids: Sequence[int], origin: str) -> HfTokenizer:
    """The tokenizer that the `tokenizer.*` metadata describes. Raises `ModelLoadError` for an unsupported kind."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens") or []
    if not tokens:
        raise ModelLoadError(f"{origin} holds no vocabulary; name a tokenizer folder with --tokenizer.")
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if kind not in ("gpt2", "llama"):
        raise ModelLoadError(
            f"{origin}: tokenizer kind {kind!r} is not supported (gpt2 and llama are); use --tokenizer FOLDER."
        )
    try:
        backend = (
            _byte_level_bpe(metadata, tokens, origin) if kind == "gpt2" else _sentencepiece_bpe(metadata, tokens, types)
        )
        special = _add_special_tokens(backend, tokens, types)
        bos_id = metadata.get("tokenizer.ggml.bos_token_id")
        if bos_id is not None and metadata.get("tokenizer.ggml.add_bos_token", _adds_bos_unless_told(metadata)):
            prepend_bos(backend, tokens[bos_id], bos_id)
    except ModelLoadError:
        raise
    except Exception as error:  # the library raises plain Exception for a vocabulary that does not fit its merges
        raise ModelLoadError(f"{origin}: the tokenizer is damaged ({error}); use --tokenizer FOLDER.") from error
    extras = TokenizerExtras(
        bos_id=bos_id,
        eos_ids=tuple(eos_ids),
        chat_template=metadata.get("tokenizer.chat_template"),
        template_tokens=_template_tokens(metadata, tokens),
        extra_special_ids=special,
    )
    return HfTokenizer(backend, extras, origin)


def _adds_bos_unless_told(metadata: Mapping[str, Any]) -> bool:
    """llama.cpp's default: SentencePiece and Llama 3 vocabularies begin a text with the beginning-of-sequence token."""
    return metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") in _LLAMA3_NAMES


def _template_tokens(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, str]:
    keys = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: tokens[token_id] for name, token_id in ids.items() if token_id is not None and token_id < len(tokens)}


def _byte_level_bpe(metadata: Mapping[str, Any], tokens: Sequence[str], origin: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre", "default")
    merges = [_merge(text) for text in metadata.get("tokenizer.ggml.merges") or []]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _LLAMA3_NAMES))
    if pre in _GPT2_NAMES:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif pre == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif pre in _SPLIT_PATTERNS:
        split = pre_tokenizers.Split(Regex(_SPLIT_PATTERNS[pre]), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    else:
        known = ", ".join([*_GPT2_NAMES, "smollm", *_SPLIT_PATTERNS])
        raise ModelLoadError(f"{origin}: pre-tokenizer {pre!r} is not supported ({known} are); use --tokenizer FOLDER.")
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _merge(text: str) -> tuple[str, str]:
    left, _, right = text.partition(" ")
    return left, right


def _sentencepiece_bpe(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> Any:
    """SentencePiece BPE: a piece of higher score is merged earlier, whatever pair it comes from."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = metadata.get("tokenizer.ggml.scores") or [-float(index) for index in range(len(tokens))]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = _merges_from_scores(vocabulary, scores, types)
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    )
    add_space = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("\u2581")] if add_space else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", 1, 0)] if add_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges_from_scores(
    vocabulary: Mapping[str, int], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """All ways to make each normal piece of two others, best scores first."""
    merges: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece, token_id in vocabulary.items():
        if types[token_id] in (_UNKNOWN, _CONTROL, _BYTE):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-scores[token_id], vocabulary[left], vocabulary[right], (left, right)))
    return [pair for _, _, _, pair in sorted(merges)]


def _add_special_tokens(backend: Any, tokens: Sequence[str], types: Sequence[int]) -> frozenset[int]:
    """Register control tokens (special) and user-defined ones (kept in texts); returns the special ids."""
    from tokenizers import AddedToken

    special = [token_id for token_id, kind in enumerate(types) if kind == _CONTROL]
    user_defined = [token_id for token_id, kind in enumerate(types) if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(tokens[token_id], special=True, normalized=False) for token_id in special])
    backend.add_tokens([AddedToken(tokens[token_id], special=False, normalized=False) for token_id in user_defined])
    return frozenset(special)
