"""What is drawn for tokens: characters cut in pieces, bytes that are none, and what has no ink."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from refine_verl.data.tokenizers import load_tokenizer
from refine_verl.inspect.glyphs import Kind, glyphs, plain, token_bytes


def drawn(tokens: list[bytes], before: bytes = b"") -> list[str]:
    return [plain(parts) for parts in glyphs(tokens, before)]


def single_bytes(text: str) -> list[bytes]:
    return [bytes([byte]) for byte in text.encode()]


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        (single_bytes("aé中😀b"), ["a", "é", "▏", "中", "▏", "▏", "😀", "▏", "▏", "▏", "b"]),
        ([b"a\xe4", b"\xb8\xadb"], ["a中", "b"]),
        ([b"\xff\xfe"], ["⟨FF⟩⟨FE⟩"]),
        ([b"\xe4\xb8", b"x"], ["⟨E4⟩⟨B8⟩", "x"]),  # unfinished, then something else
        ([b"\xa9"], ["⟨A9⟩"]),  # the end of a character that never began
        ([b"\xed\xa0\x80"], ["⟨ED⟩⟨A0⟩⟨80⟩"]),  # a surrogate is no character
        ([b"a\tb\r\n"], ["a⇥b␍↵"]),
        ([b"\x00\x1b"], ["␀␛"]),
        (["\u202e\u200b\ufeff\u00a0".encode()], ["⟨U+202E⟩⟨U+200B⟩⟨U+FEFF⟩⟨U+00A0⟩"]),
        ([b"", b"x"], ["▏", "x"]),
    ],
)
def test_tokens(tokens: list[bytes], wanted: list[str]) -> None:
    assert drawn(tokens) == wanted


def test_a_character_begun_before_is_finished() -> None:
    assert drawn([b"\xad", b"!"], before=b"x\xe4\xb8") == ["中", "!"]
    assert drawn([b"z"], before=b"x\xe4\xb8") == ["z"]  # the model wrote something else: nothing of before is shown
    assert drawn([b"z"], before="中".encode()) == ["z"]


def test_spaces_stay_spaces_of_their_own_kind() -> None:
    (parts,) = glyphs([b"  a b"])
    assert [(part.kind, part.text) for part in parts] == [
        (Kind.SPACE, "  "),
        (Kind.TEXT, "a"),
        (Kind.SPACE, " "),
        (Kind.TEXT, "b"),
    ]


@pytest.fixture(params=["bytes", "bpe:300"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return load_tokenizer(request.param, ["the cat sat on the mat, the cat, naïve 中文"] * 20)


def test_byte_level_tokens_give_back_every_byte(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "the naïve 中文 cat 😀\n\t sat\x00"
    ids = tokenizer(text)["input_ids"]
    convert = token_bytes(tokenizer)
    assert b"".join(map(convert, ids)) == text.encode()
    assert convert(tokenizer.eos_token_id) == b"<|endoftext|>"
    assert convert(10_000) == b"<10000>"


def test_byte_fallback_and_meta_spaces() -> None:
    """The conventions of sentencepiece vocabularies."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"\u2581the": 0, "<0xE4>": 1, "<0xB8>": 2, "<0xAD>": 3, "cat": 4, "<unk>": 5}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    convert = token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert b"".join(map(convert, range(5))).decode() == " the中cat"
