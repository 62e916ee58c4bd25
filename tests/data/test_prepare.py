"""From names to a directory of sequences: contents, order, cache, and nothing left behind on errors."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest

from refine_verl.config import ConfigError
from refine_verl.data import DataError, DataSettings
from refine_verl.data.cache import cached_directory
from refine_verl.data.dataset import DocumentDataset
from refine_verl.data.prepare import iterate_split_texts, prepare

FILES = {"a.txt": "abcdefghijklm", "b.txt": "xy", "c.txt": "0123456789"}


def sequences(path):
    return datasets.load_from_disk(str(path)).with_format(None)[:]


def text(ids):
    return bytes(ids).decode()


def test_contents_and_trace(make_settings, bytes_tokenizer, tmp_path):
    settings = make_settings(FILES, max_length=5, min_length=3)
    prepared = prepare(settings, "train", bytes_tokenizer)
    rows = sequences(prepared.path)
    assert [text(ids) for ids in rows["input_ids"]] == ["abcde", "fghij", "klm", "01234", "56789"]
    assert rows["document_id"] == [0, 1, 2, 3, 4]
    assert rows["length"] == [5, 5, 3, 5, 5]
    assert rows["window"] == [0, 1, 2, 0, 1]
    assert [Path(source).name for source in rows["source"]] == ["a.txt"] * 3 + ["c.txt"] * 2
    assert rows["row"] == [0] * 5
    assert (prepared.statistics.too_short, prepared.statistics.tokens_dropped) == (1, 2)
    features = datasets.load_from_disk(str(prepared.path)).features
    assert features["input_ids"].feature.dtype == "int32"
    assert features["document_id"].dtype == "int64"


def test_head_policy(make_settings, bytes_tokenizer):
    prepared = prepare(make_settings(FILES, max_length=5, long_documents="head"), "train", bytes_tokenizer)
    assert [text(ids) for ids in sequences(prepared.path)["input_ids"]] == ["abcde", "xy", "01234"]
    assert prepared.statistics.tokens_dropped == 8 + 5


def test_special_tokens_are_the_tokenizers_own_unless_asked(make_settings, bytes_tokenizer):
    plain = prepare(make_settings(FILES), "train", bytes_tokenizer)
    ended = prepare(make_settings(FILES, append_eos=True), "train", bytes_tokenizer)
    assert [ids[-1] for ids in sequences(plain.path)["input_ids"]] == [ord("m"), ord("y"), ord("9")]
    assert [ids[-1] for ids in sequences(ended.path)["input_ids"]] == [256] * 3
    assert ended.statistics.tokens_kept == plain.statistics.tokens_kept + 3


def test_ids_do_not_depend_on_the_number_of_processes(make_settings, bytes_tokenizer, tmp_path):
    lines = "".join(json.dumps({"text": f"{i} " * (i % 7 + 1)}) + "\n" for i in range(700))
    one, two = (
        prepare(
            make_settings({"a.jsonl": lines}, num_workers=n, cache_dir=str(tmp_path / f"cache{n}"), max_length=8),
            "train",
            bytes_tokenizer,
        )
        for n in (1, 2)
    )
    assert sequences(one.path) == sequences(two.path)
    assert one.statistics == two.statistics
    assert sequences(one.path)["document_id"] == list(range(one.statistics.windows))
    assert sequences(one.path)["row"] == sorted(sequences(one.path)["row"])


def test_minimum_of_the_caller_counts(make_settings, bytes_tokenizer):
    prepared = prepare(make_settings(FILES, max_length=11), "train", bytes_tokenizer, 10)
    assert [text(ids) for ids in sequences(prepared.path)["input_ids"]] == ["abcdefghijk", "0123456789"]


def test_all_too_short_says_how_long_and_why(make_settings, bytes_tokenizer, tmp_path):
    reason = "refine.nsp.chunks=8 and refine.nsp.rollout_length=5 need that many"
    needed = rf"all 3 documents are too short.*at least 14 tokens because {reason}"
    with pytest.raises(DataError, match=needed + r".*longest has 13 \(.*a\.txt, row 0\)"):
        prepare(make_settings(FILES), "train", bytes_tokenizer, 14, reason)
    with pytest.raises(DataError, match=r"at least 40 tokens \(data\.min_length=40\)"):
        prepare(make_settings(FILES, min_length=40), "train", bytes_tokenizer, 14, reason)
    with pytest.raises(DataError, match=rf"data\.max_length=8 is too short: .*at least 14 tokens because {reason}"):
        prepare(make_settings(FILES, max_length=8), "train", bytes_tokenizer, 14, reason)


def test_too_few_sequences(make_settings, bytes_tokenizer):
    with pytest.raises(DataError, match=r"data\.train_files gives 3 sequences, but at least 4 .* because one batch"):
        prepare(make_settings(FILES), "train", bytes_tokenizer, minimum_sequences=4, sequences_reason="one batch")


def test_validation_is_separate_and_may_be_missing(make_settings, bytes_tokenizer, tmp_path):
    (tmp_path / "v.txt").write_text("held out")
    settings = make_settings(FILES, val_files=str(tmp_path / "v.txt"))
    validation = prepare(settings, "validation", bytes_tokenizer)
    assert [text(ids) for ids in sequences(validation.path)["input_ids"]] == ["held out"]
    with pytest.raises(DataError, match=r"data\.val_files is empty"):
        prepare(make_settings(FILES), "validation", bytes_tokenizer)


def test_json_lines_file_without_documents(make_settings, bytes_tokenizer):
    with pytest.raises(DataError, match=r"a\.jsonl holds no documents at all"):
        prepare(make_settings({"a.jsonl": "\n"}), "train", bytes_tokenizer)


def test_errors_leave_nothing_behind(make_settings, bytes_tokenizer, tmp_path):
    settings = make_settings({**FILES, "d.jsonl": '{"text": "good"}\n{"text": 3}\n'})
    with pytest.raises(DataError, match=r"d\.jsonl, line 2"):
        prepare(settings, "train", bytes_tokenizer)
    assert not (tmp_path / "cache").exists()


def test_unusable_cache_directory(make_settings, bytes_tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir=.*file.* cannot be used"):
        prepare(make_settings(FILES, cache_dir=str(tmp_path / "file" / "cache")), "train", bytes_tokenizer)


def test_iterate_split_texts_stops_at_the_limit(make_settings):
    settings = make_settings(FILES)
    assert list(iterate_split_texts(settings, "train")) == list(FILES.values())
    assert list(iterate_split_texts(settings, "train", limit_characters=14)) == ["abcdefghijklm", "xy"]


def test_summary_is_logged(make_settings, bytes_tokenizer, caplog):
    caplog.set_level(logging.INFO, logger="refine_verl.data")
    prepare(make_settings(FILES, min_length=3), "train", bytes_tokenizer)
    assert "data.train_files: 3 documents, 2 kept as 2 sequences of 10 to 13 tokens" in caplog.text
    assert "1 too short, 0 cut; 23 tokens kept, 2 dropped" in caplog.text


class TestCache:
    def test_second_call_reads_no_document(self, make_settings, bytes_tokenizer, monkeypatch, caplog):
        settings = make_settings(FILES)
        first = prepare(settings, "train", bytes_tokenizer)
        monkeypatch.setattr("refine_verl.data.prepare.tokenize_rows", forbidden)
        caplog.set_level(logging.INFO, logger="refine_verl.data")
        second = prepare(settings, "train", bytes_tokenizer)
        assert (first.reused, second.reused) == (False, True)
        assert (first.path, first.statistics) == (second.path, second.statistics)
        assert "reused from" in caplog.text

    def test_other_lengths_cut_again_without_tokenising_again(self, make_settings, bytes_tokenizer, monkeypatch):
        settings = make_settings(FILES)
        first = prepare(settings, "train", bytes_tokenizer)
        monkeypatch.setattr("refine_verl.data.prepare.tokenize_rows", forbidden)
        second = prepare(dataclasses.replace(settings, max_length=4), "train", bytes_tokenizer)
        assert first.path != second.path
        assert not second.reused
        assert second.statistics.max_length == 4

    @pytest.mark.parametrize("change", ["content", "added", "tokenizer", "eos"])
    def test_changes_invalidate(self, make_settings, bytes_tokenizer, tmp_path, change):
        from refine_verl.data.tokenizers import load_tokenizer

        settings, tokenizer = make_settings(FILES), bytes_tokenizer
        first = prepare(settings, "train", bytes_tokenizer)
        if change == "content":
            (tmp_path / "corpus" / "b.txt").write_text("yx")  # the same size
        elif change == "added":
            (tmp_path / "corpus" / "d.txt").write_text("more")
        elif change == "tokenizer":
            tokenizer = load_tokenizer("bpe:260", ["abcabcabc"] * 9)
        else:
            settings = dataclasses.replace(settings, append_eos=True)
        second = prepare(settings, "train", tokenizer)
        assert not second.reused
        assert sequences(first.path)["input_ids"] != sequences(second.path)["input_ids"]

    def test_unfinished_directory_is_ignored(self, make_settings, bytes_tokenizer, tmp_path):
        settings = make_settings(FILES)
        names = [path.name for path in prepare(settings, "train", bytes_tokenizer).path.parent.iterdir()]
        other = tmp_path / "other"
        for name in names:
            half = other / f".building-{name}-abc"
            half.mkdir(parents=True)
            (half / "data-00000-of-00001.arrow").write_bytes(b"half")
        prepared = prepare(dataclasses.replace(settings, cache_dir=str(other)), "train", bytes_tokenizer)
        assert not prepared.reused
        assert len(DocumentDataset(prepared.path)) == 3

    def test_abandoned_directories_are_removed_after_a_day(self, tmp_path):
        for name, age in (("old", 3 * 86400), ("new", 60)):
            half = tmp_path / f".building-{name}"
            half.mkdir()
            (half / "x").write_text("x")
            for path in (half / "x", half):
                os.utime(path, (time.time() - age,) * 2)
        cached_directory(tmp_path, "entry", lambda directory: None)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".building-new", "entry"]

    def test_killed_while_building_then_built(self, tmp_path):
        code = (
            "import sys, os, signal, pathlib\n"
            "from refine_verl.data.cache import cached_directory\n"
            "def build(d):\n    (d / 'x').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
            f"cached_directory(pathlib.Path({str(tmp_path)!r}), 'entry', build)\n"
        )
        root = Path(__file__).parents[2]
        killed = subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60, check=False)
        assert killed.returncode == -signal.SIGKILL
        assert not (tmp_path / "entry").exists()
        path, reused = cached_directory(tmp_path, "entry", lambda d: (d / "x").write_text("whole") and None)
        assert (reused, (path / "x").read_text()) == (False, "whole")

    def test_the_first_of_two_builders_wins(self, tmp_path):
        def build(directory):
            (directory / "x").write_text("second")
            cached_directory(tmp_path, "entry", lambda d: (d / "x").write_text("first") and None)

        path, reused = cached_directory(tmp_path, "entry", build)
        assert (path / "x").read_text() == "first"
        assert [item.name for item in tmp_path.iterdir()] == ["entry"]


def forbidden(*args, **kwargs):
    raise AssertionError("tokenised again")


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"min_length": 0}, r"data\.min_length: must be at least 1, got 0"),
            ({"max_length": 2.5}, r"data\.max_length: must be an integer or null, got 2\.5"),
            ({"max_length": 4, "min_length": 5}, r"data\.max_length: 4 is smaller than data\.min_length=5"),
            ({"num_workers": True}, r"data\.num_workers: must be an integer or null, got True"),
            (
                {"long_documents": "windows"},
                r"data\.long_documents: unknown value 'windows'. Allowed: window, head\. Did you mean 'window'",
            ),
            ({"text_key": ""}, r"data\.text_key: is empty"),
            ({"train_files": [3]}, r"data\.train_files: holds 3"),
        ],
    )
    def test_bad_values(self, settings, match):
        with pytest.raises(ConfigError, match=match):
            DataSettings(**settings)

    def test_from_an_omegaconf_section_with_other_keys(self):
        from omegaconf import OmegaConf

        data = OmegaConf.create({"train_files": ["a", "b"], "val_files": None, "max_length": 7, "shuffle": True})
        settings = DataSettings.from_mapping(data)
        assert (settings.train_files, settings.val_files, settings.max_length) == (("a", "b"), (), 7)


def test_importing_the_data_path_loads_neither_verl_nor_ray():
    code = (
        "import sys, refine_verl.data\n"
        "light = {'torch', 'datasets', 'transformers'} & set(sys.modules); assert not light, light\n"
        "import refine_verl.data.prepare, refine_verl.data.tokenizers, refine_verl.data.verl_dataset\n"
        "heavy = {'verl', 'ray'} & set(sys.modules); assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=120, check=True)


def test_lengths_match_the_tokens(make_settings, bytes_tokenizer):
    dataset = DocumentDataset(prepare(make_settings(FILES, max_length=5), "train", bytes_tokenizer).path)
    assert np.array_equal(dataset.lengths, [len(dataset[i]["input_ids"]) for i in range(len(dataset))])
