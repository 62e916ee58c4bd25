"""Tokens as something a person can look at, whatever bytes they hold.

A token of a byte-level vocabulary may hold a part of a character only. A character is shown by the first token that
has a byte of it; the tokens with its other bytes show a thin mark. Bytes that belong to no character are shown in
hexadecimal, and what has no ink of its own (spaces, newlines, control and direction characters) gets a sign.
"""

from __future__ import annotations

import json
import re
import unicodedata
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

TokenBytes = Callable[[int], bytes]
"""Token id -> the bytes it stands for."""

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_META_SPACE = "\u2581"


class Kind(Enum):
    """How a piece is drawn; its class on the page."""

    TEXT = "text"
    SPACE = "space"
    TAB = "tab"
    NEWLINE = "nl"
    SIGN = "sign"  # a sign that stands for a character without ink
    BYTE = "byte"  # a byte that belongs to no character
    REST = "rest"  # holds only later bytes of a character that an earlier token shows


_BLANKS = {" ": Kind.SPACE, "\n": Kind.NEWLINE, "\t": Kind.TAB}


@dataclass(frozen=True)
class Glyph:
    """A run of characters of one kind; `text` is what it stands for or, for signs and bytes, how it is written."""

    kind: Kind
    text: str


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    """How to get from a token's id to its bytes: byte-level vocabularies, byte fallback, or plain strings."""
    special = set(tokenizer.all_special_ids)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    as_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    byte_level = backend is not None and "ByteLevel" in _types(json.loads(backend.to_str()).get("decoder"))

    def convert(token_id: int) -> bytes:
        token = tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # an entry of the model's vocabulary that the tokenizer does not have
            return f"<{token_id}>".encode()
        if token_id in special or token_id in added:
            return str(token).encode()
        if byte_level and all(character in as_byte for character in token):
            return bytes(as_byte[character] for character in token)
        if found := _BYTE_FALLBACK.fullmatch(token):
            return bytes([int(found[1], 16)])
        return str(token).replace(_META_SPACE, " ").encode("utf-8", "replace")

    return convert


def _types(decoder: Any) -> Iterator[str]:
    if isinstance(decoder, dict):
        yield str(decoder.get("type"))
        for part in decoder.get("decoders", ()):
            yield from _types(part)


def glyphs(tokens: Sequence[bytes], before: bytes = b"") -> list[list[Glyph]]:
    """What to draw for each token.

    Args:
        tokens: the bytes of each token, in order.
        before: what precedes them. A character that begins there and ends in the first token is shown by it.

    Returns:
        One list per token, never an empty one: a token without bytes shows an empty sign.
    """
    decoder = getincrementaldecoder("utf-8")("surrogateescape")
    decoder.decode(before)
    pending = decoder.getstate()[0]  # the first bytes of a character whose last ones are missing
    owners = [0] * len(pending) + [index for index, token in enumerate(tokens) for _ in token]
    shown: list[list[Glyph]] = [[] for _ in tokens]
    place = 0
    for character in (pending + b"".join(tokens)).decode("utf-8", "surrogateescape"):
        if not 0xDC80 <= ord(character) <= 0xDCFF:
            shown[owners[place]].append(_glyph(character))
            place += len(character.encode())
            continue
        if place >= len(pending):  # what came before is not shown again
            shown[owners[place]].append(Glyph(Kind.BYTE, f"{ord(character) - 0xDC00:02X}"))
        place += 1
    return [_merged(parts) if parts else [Glyph(Kind.REST, "")] for parts in shown]


def _glyph(character: str) -> Glyph:
    if character in _BLANKS:
        return Glyph(_BLANKS[character], character)
    code = ord(character)
    if code < 32:
        return Glyph(Kind.SIGN, chr(0x2400 + code))  # U+2400 and what follows are pictures of control characters
    # Cc, Cf, Co, Cn: controls, invisible and direction characters, unassigned; Zl, Zp, Zs: breaks and odd spaces
    if unicodedata.category(character) in {"Cc", "Cf", "Co", "Cn", "Zl", "Zp", "Zs"}:
        return Glyph(Kind.SIGN, f"U+{code:04X}")
    return Glyph(Kind.TEXT, character)


def _merged(parts: Sequence[Glyph]) -> list[Glyph]:
    merged: list[Glyph] = []
    for part in parts:
        if merged and part.kind is merged[-1].kind and part.kind in (Kind.TEXT, Kind.SPACE, Kind.BYTE):
            merged[-1] = Glyph(part.kind, merged[-1].text + (" " if part.kind is Kind.BYTE else "") + part.text)
        else:
            merged.append(part)
    return merged


def plain(parts: Sequence[Glyph]) -> str:
    """One line of text without a break, a direction change or a hidden character in it."""
    signs = {Kind.NEWLINE: "↵", Kind.TAB: "⇥", Kind.REST: "▏"}
    texts = []
    for part in parts:
        if part.kind is Kind.BYTE:
            texts.append("".join(f"⟨{byte}⟩" for byte in part.text.split()))
        elif part.kind is Kind.SIGN:
            texts.append(part.text if len(part.text) == 1 else f"⟨{part.text}⟩")
        else:
            texts.append(signs.get(part.kind, part.text))
    return "".join(texts)
