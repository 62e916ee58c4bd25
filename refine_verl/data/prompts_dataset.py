"""Prepared prompts and answers for training loops: a torch dataset, the class verl loads, and padded batches.

verl loads `data.custom_cls.path=pkg://refine_verl.data.prompts_dataset` and
`data.custom_cls.name=VerlPromptDataset`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from refine_verl.config import DataError
from refine_verl.data.prompts_statistics import read_prompt_statistics
from refine_verl.data.verl_dataset import VerlDocumentDataset

_TOKENS = ("prompt_ids", "answer_ids")
_COLUMNS = ("id", "source", "row", "task", "answers", "classes", "max_new_tokens", "document_id", "length")


class PromptDataset(Dataset[dict[str, Any]]):
    """The rows of a directory made by `prepare_prompts`, memory-mapped, in the order of the files.

    Args:
        path: the prepared directory.

    Raises:
        DataError: there is no such directory, or it was not made by `prepare_prompts`.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_dir():
            raise DataError(
                f"no prepared prompts at {path}. On several machines data.cache_dir must lie on a file system "
                "that all of them see."
            )
        self.statistics = read_prompt_statistics(path)
        self.table = datasets.load_from_disk(str(path))
        self._tokens = self.table.select_columns(list(_TOKENS)).with_format("numpy")
        self._rest = self.table.select_columns([*_COLUMNS, "full_length"])

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row.

        Returns:
            `prompt_ids` int64 tensor [T], what generation reads; `answer_ids` int64 tensor [A], the first
            reference with the end of sequence; `answers` and `classes` (lists of strings); `id`, `source`,
            `task` (strings); `row`, `max_new_tokens`, `document_id`, `length` (= T; integers); `truncated`.
        """
        tokens = self._tokens[int(index)]
        row = self._rest[int(index)]
        values = {name: row[name] for name in _COLUMNS}
        values["answers"], values["classes"] = list(row["answers"]), list(row["classes"] or [])
        values["truncated"] = row["full_length"] > row["length"]
        for name in _TOKENS:
            values[name] = torch.from_numpy(np.asarray(tokens[name], dtype=np.int64))
        return values

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], tokens of each prompt."""
        return self.table.with_format("arrow").select_columns(["length"])[:].column(0).to_numpy()


class VerlPromptDataset(VerlDocumentDataset):
    """`PromptDataset` behind the constructor verl calls (see `VerlDocumentDataset` for the arguments)."""

    dataset_class = PromptDataset

    def __getitem__(self, index: int) -> dict[str, Any]:
        """As `PromptDataset`, with `input_ids` for `prompt_ids` and numpy arrays for tensors."""
        if self.documents is None:
            raise IndexError("this dataset is empty")
        row = self.documents[int(self.indices[index])]
        row["answer_ids"] = row["answer_ids"].numpy()
        row["input_ids"] = row.pop("prompt_ids").numpy()
        return row


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
    prompts = [torch.as_tensor(row["prompt_ids" if "prompt_ids" in row else "input_ids"]).long() for row in rows]
    answers = [torch.as_tensor(row["answer_ids"]).long() for row in rows]
    joined = [torch.cat(pair) for pair in zip(prompts, answers, strict=True)]
    tokens, lengths = _pad(prompts)
    answer_tokens, answer_lengths = _pad(answers)
    joined_tokens, joined_lengths = _pad(joined)
    return {
        "tokens": tokens,
        "lengths": lengths,
        "answers": answer_tokens,
        "answer_lengths": answer_lengths,
        "joined": joined_tokens,
        "joined_lengths": joined_lengths,
        "document_id": torch.tensor([int(row["document_id"]) for row in rows], dtype=torch.int64),
        "max_new_tokens": torch.tensor([int(row["max_new_tokens"]) for row in rows], dtype=torch.int64),
        "weight": torch.ones(len(rows), dtype=torch.float32),
    }


def collate_columns(columns: Mapping[str, Any]) -> dict[str, Tensor]:
    """`collate` for a batch that verl's own collate function has turned into object arrays by column."""
    names = ("input_ids", "answer_ids", "document_id", "max_new_tokens")
    return collate([dict(zip(names, row, strict=True)) for row in zip(*(columns[name] for name in names), strict=True)])


def _pad(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
    return pad_sequence(sequences, batch_first=True, padding_value=0), lengths
