"""A small corpus, a byte tokenizer and a cache directory of its own for each test."""

import os

import pytest

# Before the hub client is imported anywhere: no test may wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def bytes_tokenizer():
    from refine_verl.data.tokenizers import load_tokenizer

    return load_tokenizer("bytes")


@pytest.fixture
def make_settings(tmp_path):
    """`make_settings({"a.txt": "text", ...}, max_length=...)`: files in corpus/, cache in cache/."""
    from refine_verl.data import DataSettings

    def make(files, **settings):
        corpus = tmp_path / "corpus"
        corpus.mkdir(exist_ok=True)
        for name, text in files.items():
            (corpus / name).write_text(text)
        settings = {"train_files": str(corpus), "cache_dir": str(tmp_path / "cache"), **settings}
        return DataSettings(**settings)

    return make
