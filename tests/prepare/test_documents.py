"""Long documents out of a corpus: which, in what order, and where an interrupted run goes on."""

import hashlib
import json

import pyarrow.parquet as pq
import pytest

from refine_verl.data import DataSettings
from refine_verl.data.prepare import prepare
from refine_verl.prepare import documents
from refine_verl.prepare.__main__ import main

LENGTHS = [5, 30, 12, 50, 9, 10, 40, 3, 25, 11] * 30  # 300 documents: three batches of the reader


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    texts = [f"{number:04d}".ljust(length, "x")[:length] for number, length in enumerate(LENGTHS)]
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    return path


def collect(path, out, *more, minimum=10):
    key = [] if "--text-key" in more else ["--text-key", "body"]
    fixed = ["--tokenizer", "bytes", *key, "--min-tokens", str(minimum), "--out", str(out)]
    return main(["documents", "--input", str(path), *fixed, *more])


def rows(out):
    return [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def digests(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.parquet")}


def test_documents_of_at_least_n_tokens(corpus, tmp_path, capsys):
    assert collect(corpus, tmp_path / "out", "--shard-size", "80") == 0
    found = rows(tmp_path / "out")
    assert [row["tokens"] for row in found] == [length for length in LENGTHS if length >= 10]
    assert [row["row"] for row in found] == [row for row, length in enumerate(LENGTHS) if length >= 10]
    assert all(len(row["text"]) == row["tokens"] and row["source"] == str(corpus) for row in found)
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 3
    shown = capsys.readouterr().out
    assert "300 of 300 documents were looked at" in shown and "90 had fewer than 10 tokens" in shown
    # What is written is what the trainer reads.
    settings = DataSettings(train_files=str(tmp_path / "out"), min_length=10, cache_dir=str(tmp_path / "cache"))
    from refine_verl.data.tokenizers import load_tokenizer

    statistics = prepare(settings, "train", load_tokenizer("bytes")).statistics
    assert (statistics.windows, statistics.too_short) == (210, 0)


def test_limits(corpus, tmp_path, capsys):
    collect(corpus, tmp_path / "a", "--limit", "100", "--shard-size", "30")
    assert len(rows(tmp_path / "a")) == 100
    # Of ten documents seven are long enough: the hundredth is the 143rd.
    assert "143 of 143 documents were looked at" in capsys.readouterr().out
    collect(corpus, tmp_path / "b", "--limit-tokens", "500")
    lengths = [row["tokens"] for row in rows(tmp_path / "b")]
    assert sum(lengths[:-1]) < 500 <= sum(lengths)
    capsys.readouterr()
    collect(corpus, tmp_path / "c", "--max-tokens", "30")
    shown = capsys.readouterr().out
    assert "300 of 300 documents" in shown and "90 had fewer than 10 tokens, 60 more than 30." in shown
    assert {row["tokens"] for row in rows(tmp_path / "c")} == {10, 11, 12, 25, 30}


def test_a_sample_depends_on_seed_and_text_only(corpus, tmp_path):
    half = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        path = corpus
        if name == "b":  # the other way round
            path = tmp_path / "reversed.jsonl"
            path.write_text("\n".join(corpus.read_text().splitlines()[::-1]))
        collect(path, tmp_path / name, "--sample", "0.5", "--seed", str(seed))
        half[name] = {row["text"] for row in rows(tmp_path / name)}
    assert half["a"] == half["b"] != half["c"]
    assert 60 < len(half["a"]) < 150


def test_an_interrupted_run_goes_on_behind_the_last_shard(corpus, tmp_path, monkeypatch):
    arguments = (corpus, tmp_path / "out", "--shard-size", "80", "--limit", "200")
    collect(corpus, tmp_path / "whole", *arguments[2:])
    select, calls = documents.Collector._select, []

    def stop(self, batch, *rest):
        calls.append(len(batch))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return select(self, batch, *rest)

    monkeypatch.setattr(documents.Collector, "_select", stop)
    assert collect(*arguments) == 130
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [".prepare.json", "documents-00000.parquet"]
    assert collect(*arguments) == 0
    assert calls == [128, 128, 128, 44]  # the second batch again, the first one not
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert len(rows(tmp_path / "out")) == 200
    done = len(calls)
    assert collect(*arguments) == 0 and len(calls) == done  # all there
    (tmp_path / "out" / "documents-00001.parquet").unlink()
    assert collect(*arguments) == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_no_empty_shard_at_the_end(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"body": "x" * (20 if number < 128 else 2)}) + "\n" for number in range(140)))
    assert collect(path, tmp_path / "out", "--shard-size", "100") == 0
    assert [path.name for path in (tmp_path / "out").glob("*.parquet")] == ["documents-00000.parquet"]
    assert collect(path, tmp_path / "out", "--shard-size", "100") == 0
    assert len(rows(tmp_path / "out")) == 128


def test_refusals(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    cases = [
        ((corpus, out, "--sample", "0"), "sample: must be greater than 0, got 0.0"),
        ((corpus, out, "--sample", "1.5"), "sample: must be at most 1, got 1.5"),
        ((corpus, out, "--max-tokens", "5"), "max_tokens: must be at least min_tokens=10, got 5"),
        ((corpus, out, "--limit", "0"), "limit: must be at least 1, got 0"),
        ((corpus, out, "--shard-size", "0"), "shard_size: must be at least 1, got 0"),
        ((corpus, out, "--shard-sise", "0"), "unknown option --shard-sise. Did you mean '--shard-size'?"),
        ((tmp_path / "none.jsonl", out), "none.jsonl does not exist"),
        ((corpus, out, "--text-key", "text"), "has no column 'text'; its columns are: body"),
        ((corpus, out, "--text-key", "text"), "Name the column that holds the text with text_key."),
    ]
    for arguments, message in cases:
        assert collect(*arguments) == 2
        assert message in capsys.readouterr().err
    assert collect(corpus, out, minimum=51) == 2
    assert "none of 300 documents has 51 tokens or more" in capsys.readouterr().err
    assert not out.exists()
    assert main(["documents", "--help"]) == 0
    assert "examples:" in capsys.readouterr().out
