"""Tokenizers by name: round trips, reloading, repeatability, errors."""

import pytest
from transformers import AutoTokenizer

from refine_verl.data import DataError
from refine_verl.data.tokenize import tokenizer_fingerprint
from refine_verl.data.tokenizers import EOS_TOKEN, load_tokenizer

TEXTS = [
    "def f(x):\n    return x + 1  # größer: 大\n\n\n",
    "  leading, trailing  \t",
    "don't - it's \U0001f600 \x00\x7f.",
]
CORPUS = [f"def function_{i}(argument):\n    return argument + {i}\n" for i in range(50)]


def test_bytes_are_bytes():
    tokenizer = load_tokenizer("bytes")
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 257
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 256


def test_bpe_round_trip_size_and_compression():
    tokenizer = load_tokenizer("bpe:300", CORPUS)
    assert len(tokenizer) == 300
    for text in TEXTS + CORPUS[:2]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(CORPUS[0])["input_ids"]) < len(CORPUS[0]) / 2
    assert tokenizer.eos_token == EOS_TOKEN


@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_saved_tokenizer_reloads_equal(tmp_path, spec):
    made = load_tokenizer(spec, CORPUS, tmp_path)
    fresh = load_tokenizer(spec, CORPUS)
    for reloaded in (AutoTokenizer.from_pretrained(str(tmp_path)), load_tokenizer(str(tmp_path))):
        assert reloaded.eos_token_id == made.eos_token_id == fresh.eos_token_id
        for text in TEXTS:
            ids = reloaded(text)["input_ids"]
            assert ids == made(text)["input_ids"] == fresh(text)["input_ids"]
            assert reloaded.decode(ids) == text


def test_bpe_is_repeatable_and_follows_the_corpus():
    first, second = (load_tokenizer("bpe:400", iter(CORPUS)) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second)
    other = load_tokenizer("bpe:400", TEXTS * 5)
    assert tokenizer_fingerprint(first) != tokenizer_fingerprint(other)


def test_fingerprint_ignores_sticky_call_settings():
    tokenizer = load_tokenizer("bytes")
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "bc"], padding=True, truncation=True, max_length=1)
    assert tokenizer_fingerprint(tokenizer) == before


def test_corpus_too_small_for_the_size_is_said(caplog):
    tokenizer = load_tokenizer("bpe:4096", ["abab"])
    assert len(tokenizer) < 4096
    assert "bpe:4096 has only" in caplog.text


@pytest.mark.parametrize("spec", ["bpe", "bpe:", "bpe:abc", "bpe:256", "bpe:-5"])
def test_bad_size(spec):
    with pytest.raises(DataError, match="SIZE at least 257"):
        load_tokenizer(spec, CORPUS)


@pytest.mark.parametrize("corpus", [None, []])
def test_bpe_without_text(corpus):
    with pytest.raises(DataError, match=r"there are none: set data\.train_files"):
        load_tokenizer("bpe:300", corpus)


def test_directory_without_a_tokenizer(tmp_path):
    (tmp_path / "weights.bin").write_text("x")
    with pytest.raises(DataError, match=r"(?s)no tokenizer can be loaded from .*The directory holds: weights\.bin"):
        load_tokenizer(str(tmp_path))


def test_neither_directory_nor_reachable_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-tokenizer").mkdir()
    with pytest.raises(DataError, match=r"(?s)neither a directory nor a hub id.*Nearest existing: .*my-tokenizer"):
        load_tokenizer("my-tokeniser")
