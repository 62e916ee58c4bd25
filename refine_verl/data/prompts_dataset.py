"""Prepared prompts and answers for training loops: a torch dataset, the class verl loads, and padded batches.

verl loads `data.custom_cls.path=pkg://refine_verl.data.prompts_dataset` and
`data.custom_cls.name=VerlPromptDataset`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from refine_verl.data.dataset import PreparedDataset, integers, pad
from refine_verl.data.statistics import PromptStatistics
from refine_verl.data.verl_dataset import VerlDocumentDataset

_COLUMNS = ("id", "source", "row", "task", "answers", "classes", "max_new_tokens", "document_id", "length")


class PromptDataset(PreparedDataset):
    """The rows of a directory made by `prepare_prompts`.

    A row has `prompt_ids` (int64 tensor [T]), what generation reads; `answer_ids` (int64 tensor [A]), the first
    reference with the end of sequence; `answers` and `classes` (lists of strings); `id`, `source`, `task` (strings);
    `row`, `max_new_tokens`, `document_id`, `length` (= T; integers); `truncated`.
    """

    kind = PromptStatistics
    tokens = ("prompt_ids", "answer_ids")
    others = (*_COLUMNS, "full_length")

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row."""
        row = super().__getitem__(index)
        row["truncated"] = row.pop("full_length") > row["length"]
        row["answers"], row["classes"] = list(row["answers"]), list(row["classes"] or [])
        return row


class VerlPromptDataset(VerlDocumentDataset):
    """`PromptDataset` behind the constructor verl calls (see `VerlDocumentDataset` for the arguments)."""

    dataset_class = PromptDataset


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Right-padded tensors of a batch of B rows; what is padding is told by the lengths, never by a token id.

    Args:
        rows: what `PromptDataset` or `VerlPromptDataset` returns.

    Returns:
        `tokens` int64 [B, Tmax] and `lengths` int64 [B], the prompts; `answers` int64 [B, Amax] and
        `answer_lengths` int64 [B]; `joined` int64 [B, Jmax] and `joined_lengths` int64 [B], each prompt with its
        answer right behind it (the answer begins at `lengths[b]`); `document_id` int64 [B]; `max_new_tokens`
        int64 [B]; `weight` float32 [B], all 1. `dataset.pad_batch` and `TensorDict` take it as it is.
    """
    prompts = [torch.as_tensor(row["prompt_ids"]).long() for row in rows]
    answers = [torch.as_tensor(row["answer_ids"]).long() for row in rows]
    tokens, lengths = pad(prompts)
    answer_tokens, answer_lengths = pad(answers)
    joined_tokens, joined_lengths = pad(map(torch.cat, zip(prompts, answers, strict=True)))
    return {
        "tokens": tokens,
        "lengths": lengths,
        "answers": answer_tokens,
        "answer_lengths": answer_lengths,
        "joined": joined_tokens,
        "joined_lengths": joined_lengths,
        "document_id": integers(row["document_id"] for row in rows),
        "max_new_tokens": integers(row["max_new_tokens"] for row in rows),
        "weight": torch.ones(len(rows)),
    }


def collate_columns(columns: Mapping[str, Any]) -> dict[str, Tensor]:
    """`collate` for a batch that verl's own collate function has turned into object arrays by column."""
    names = ("prompt_ids", "answer_ids", "document_id", "max_new_tokens")
    values = zip(*(columns[name] for name in names), strict=True)
    return collate([dict(zip(names, row, strict=True)) for row in values])
