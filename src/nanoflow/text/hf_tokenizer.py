"""A tokenizer over the `tokenizers` library, for byte-level BPE and SentencePiece-style vocabularies.

Encoding is the library's (it releases the GIL and never changes its state here, so threads may share one). Decoding is
done on bytes: each token stands for exact bytes, a text is their join read as UTF-8. This gives what the library's own
decoder gives for whole texts, and makes pieces of a text add up to the whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoflow.core.errors import ModelLoadError
from nanoflow.text.chat import ChatTemplate, render

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"


@dataclass(frozen=True)
class TokenizerExtras:
    """What a tokenizer knows besides its vocabulary. `template_tokens` are given to chat templates (`bos_token`, …)."""

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    template_tokens: Mapping[str, str] | None = None
    extra_special_ids: frozenset[int] = frozenset()


class HfTokenizer:
    """Implements `text.base.Tokenizer` over a `tokenizers.Tokenizer`, whose truncation and padding are switched off."""

    def __init__(self, backend: Any, extras: TokenizerExtras, origin: str) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.special_ids = extras.extra_special_ids | {token_id for token_id, token in added.items() if token.special}
        decoder = _decoder_types(backend, origin)
        self._strips_space = "Strip" in decoder or "Metaspace" in decoder
        self._bytes = _byte_table(
            backend, {token_id: token.content for token_id, token in added.items()}, "ByteLevel" in decoder
        )
        self._template = ChatTemplate(extras.chat_template) if extras.chat_template else None
        self._template_tokens = dict(extras.template_tokens or {})
        self.vocab_size = len(self._bytes)
        self.bos_id = extras.bos_id
        self.eos_ids = extras.eos_ids
        self.has_chat_template = self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written in the text are recognised."""
        ids: list[int] = self._backend.encode(_encodable(text), add_special_tokens=add_special_tokens).ids
        return ids

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of many texts at once, over all cores."""
        encodings = self._backend.encode_batch_fast(
            [_encodable(text) for text in texts], add_special_tokens=add_special_tokens
        )
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; bytes that are no UTF-8 become U+FFFD. Ids outside the vocabulary stand for nothing."""
        special = self.special_ids if skip_special_tokens else frozenset()
        text = b"".join(self.token_bytes(token) for token in token_ids if token not in special).decode(
            "utf-8", "replace"
        )
        return text[1:] if self._strips_space and text.startswith(" ") else text

    def token_text(self, token_id: int) -> str:
        """Text of one token on its own (special tokens included)."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that a token stands for; empty for an id outside the vocabulary."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **template_args: Any,
    ) -> str:
        """The prompt that the chat template makes of `messages`. Raises `InvalidRequestError` if it refuses them."""
        template = ChatTemplate(chat_template) if chat_template else self._template
        arguments = {**self._template_tokens, **template_args, "add_generation_prompt": add_generation_prompt}
        return render(template, messages, arguments)


def load_tokenizer_folder(path: Path, eos_ids: Sequence[int] = ()) -> HfTokenizer:
    """The tokenizer of a model folder (or of a `tokenizer.json` in it), with its chat template and special tokens.

    `eos_ids` are ids that end a text according to the model's config; the tokenizer's own is added to them.
    Raises `ModelLoadError` if `tokenizer.json` is missing or cannot be read.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    folder = file.parent
    if not file.is_file():
        raise ModelLoadError(
            f"{file} is missing; download it, or name another tokenizer with --tokenizer (`bytes` needs no file)."
        )
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ModelLoadError(f"{file} cannot be read: {error}. Download the file again.") from error
    config = {**_json_object(folder / "special_tokens_map.json"), **_json_object(folder / "tokenizer_config.json")}
    tokens = {
        key: text
        for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (text := _token_text(config.get(key)))
    }
    bos_id = backend.token_to_id(tokens["bos_token"]) if "bos_token" in tokens else None
    own_eos = backend.token_to_id(tokens["eos_token"]) if "eos_token" in tokens else None
    _follow_add_bos(backend, config.get("add_bos_token"), tokens.get("bos_token"), bos_id)
    all_eos = [*eos_ids, *([] if own_eos is None else [own_eos])]
    extras = TokenizerExtras(
        bos_id=bos_id,
        eos_ids=tuple(dict.fromkeys(all_eos)),
        chat_template=_chat_template(folder, config),
        template_tokens=tokens,
        extra_special_ids=frozenset(token for token in (bos_id, own_eos) if token is not None),
    )
    return HfTokenizer(backend, extras, str(file))


def prepend_bos(backend: Any, bos_token: str, bos_id: int) -> None:
    """Make `encode` put the beginning-of-sequence token first."""
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(
        single=f"{bos_token} $A", pair=None, special_tokens=[(bos_token, bos_id)]
    )


def _follow_add_bos(backend: Any, add_bos: object, bos_token: str | None, bos_id: int | None) -> None:
    """`add_bos_token` of the tokenizer's config outranks what `tokenizer.json` does, as in transformers."""
    if not isinstance(add_bos, bool) or bos_token is None or bos_id is None:
        return
    adds_now = backend.encode("", add_special_tokens=True).ids[:1] == [bos_id]
    if add_bos and not adds_now:
        prepend_bos(backend, bos_token, bos_id)
    elif adds_now and not add_bos:
        from tokenizers.processors import Sequence as NoProcessing

        backend.post_processor = NoProcessing([])


def _encodable(text: str) -> str:
    """`text` with lone surrogates (which no UTF-8 can hold) replaced."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode("utf-8")
    return text


def _decoder_types(backend: Any, origin: str) -> set[str]:
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    types = {part.get("type", "") for part in decoder.get("decoders", [decoder])}
    if not types & {"ByteLevel", "ByteFallback", "Metaspace"}:
        found = ", ".join(sorted(types)) or "nothing"
        raise ModelLoadError(f"{origin} decodes by {found}; supported: ByteLevel, ByteFallback, Metaspace.")
    return types


def _byte_table(backend: Any, added: Mapping[int, str], byte_level: bool) -> list[bytes]:
    """For every id, the bytes it stands for."""
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    of_char = {char: bytes([byte]) for byte, char in enumerate(byte_characters())}
    for token, token_id in vocabulary.items():
        if token_id in added:
            table[token_id] = added[token_id].encode("utf-8")
        elif byte_level:
            table[token_id] = b"".join(of_char.get(char) or char.encode("utf-8") for char in token)
        elif byte_token := _BYTE_TOKEN.fullmatch(token):
            table[token_id] = bytes([int(byte_token[1], 16)])
        else:
            table[token_id] = token.replace(_SPACE_MARK, " ").encode("utf-8")
    return table


def byte_characters() -> list[str]:
    """The printable character that byte-level BPE (GPT-2) writes for each byte value."""
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(0x100, 0x200))
    return [chr(byte) if byte in kept else chr(next(shifted)) for byte in range(256)]


def _token_text(value: object) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """`chat_template.jinja`, else the one in the tokenizer's config (the default one of several)."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template") or _json_object(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default") or next(iter(named.values()), None)
    return template if isinstance(template, str) and template else None


def _json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"{path} cannot be read: {error}. Download the file again.") from error
    return value if isinstance(value, dict) else {}
