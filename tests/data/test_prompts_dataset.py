"""Prepared prompts in batches: padded by length, through verl's collate function, and never by token id."""

import json

import pytest
import torch

from refine_verl.data import DataError
from refine_verl.data.dataset import pad_batch
from refine_verl.data.prompts import PromptDataset, PromptSettings, collate, prepare_prompts
from refine_verl.data.prompts_dataset import VerlPromptDataset, collate_columns

EOS = 256


@pytest.fixture
def prepared(tmp_path, bytes_tokenizer):
    rows = [
        {"prompt": "ab ", "answer": "xyz", "task": "trec", "all_classes": ["xyz", "q"]},
        {"prompt": "<|endoftext|>c ", "answer": ["u", "v"], "max_gen_tokens": 3},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = PromptSettings(train_files=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
    return prepare_prompts(settings, "train", bytes_tokenizer)


def test_rows(prepared):
    dataset = PromptDataset(prepared.path)
    assert len(dataset) == 2
    assert dataset.lengths.tolist() == [3, 3]
    assert dataset[0]["prompt_ids"].dtype == dataset[0]["answer_ids"].dtype == torch.int64
    assert dataset[0]["classes"] == ["xyz", "q"]
    assert dataset[1]["classes"] == []
    assert dataset[1]["truncated"] is False
    assert dataset.statistics == prepared.statistics


def test_batches_are_padded_by_length(prepared):
    dataset = PromptDataset(prepared.path)
    batch = collate([dataset[0], dataset[1]])
    # An end of sequence within a prompt is a token like any other.
    assert batch["tokens"].tolist() == [[*b"ab "], [EOS, *b"c "]]
    assert batch["lengths"].tolist() == [3, 3]
    assert batch["answers"].tolist() == [[*b"xyz", EOS], [*b"u", EOS, 0, 0]]
    assert batch["answer_lengths"].tolist() == [4, 2]
    assert batch["joined"].tolist() == [[*b"ab xyz", EOS], [EOS, *b"c u", EOS, 0, 0]]
    assert batch["joined_lengths"].tolist() == [7, 5]
    assert batch["max_new_tokens"].tolist() == [32, 3]
    assert batch["weight"].tolist() == [1.0, 1.0]
    for row in range(2):
        start, end = batch["lengths"][row], batch["joined_lengths"][row]
        answer = batch["answers"][row, : batch["answer_lengths"][row]]
        assert torch.equal(batch["joined"][row, start:end], answer)
    padded = pad_batch(batch, 3)
    assert {len(value) for value in padded.values()} == {3}
    assert padded["weight"].tolist() == [1.0, 1.0, 0.0]


def test_through_verls_collate(prepared):
    from verl.utils.dataset.rl_dataset import collate_fn

    dataset = VerlPromptDataset(str(prepared.path), None, None, {})
    columns = collate_fn([dataset[0], dataset[1]])
    assert list(columns["answers"]) == [["xyz"], ["u", "v"]]
    assert list(columns["id"]) == ["rows.jsonl:0", "rows.jsonl:1"]
    batch, expected = collate_columns(columns), collate([PromptDataset(prepared.path)[index] for index in range(2)])
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[key], expected[key]) for key in batch)


def test_verl_class_takes_a_subset_or_nothing(prepared):
    assert len(VerlPromptDataset(str(prepared.path), None, None, {}, max_samples=1)) == 1
    empty = VerlPromptDataset([], None, None, {})
    assert len(empty) == 0
    with pytest.raises(IndexError):
        empty[0]


def test_other_directories_are_refused(tmp_path):
    with pytest.raises(DataError, match="no prepared prompts at .*missing"):
        PromptDataset(tmp_path / "missing")
    with pytest.raises(DataError, match="not a directory of prepared prompts"):
        PromptDataset(tmp_path)
