"""Prepared sequences for training loops: a torch dataset, and batches with explicit lengths and weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from refine_verl.data.statistics import DataStatistics, Statistics
from refine_verl.data.tokenize import column


class PreparedDataset(Dataset[dict[str, Any]]):
    """The rows of a prepared directory, memory-mapped, in the order of the files.

    Attributes:
        kind: the account that such a directory keeps.
        tokens: columns that are handed out as int64 tensors.
        others: columns that are handed out as they are.

    Raises:
        DataError: there is no such directory, or it holds something else.
    """

    kind: ClassVar[type[Statistics]]
    tokens: ClassVar[tuple[str, ...]]
    others: ClassVar[tuple[str, ...]]

    def __init__(self, path: str | Path) -> None:
        self.statistics = self.kind.load(Path(path))
        self.table = datasets.load_from_disk(str(path))
        self._tokens = self.table.select_columns(list(self.tokens)).with_format("numpy")
        self._others = self.table.select_columns(list(self.others))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The columns of one row; see the class for those it has."""
        tokens = self._tokens[int(index)]
        arrays = {name: torch.from_numpy(np.asarray(tokens[name], dtype=np.int64)) for name in self.tokens}
        return {**self._others[int(index)], **arrays}

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], tokens of each sequence, or of each prompt."""
        return column(self.table, "length")


class DocumentDataset(PreparedDataset):
    """The sequences of a directory made by `prepare`.

    A row has `input_ids` (int64 tensor [T]), `document_id` (int) and `length` (int, = T).
    """

    kind = DataStatistics
    tokens = ("input_ids",)
    others = ("document_id", "length")


def collate_columns(columns: Mapping[str, Any]) -> dict[str, Tensor]:
    """Right-pad sequences to the longest one of the batch.

    Args:
        columns: `input_ids` [T] and `document_id` of B rows, which verl's own collate function has turned into
            object arrays.

    Returns:
        `tokens` int64 [B, Tmax] (0 where padded), `lengths` int64 [B], `document_id` int64 [B], and
        `weight` float32 [B], all 1. `TensorDict(batch, batch_size=B)` takes it as it is.
    """
    tokens, lengths = pad(columns["input_ids"])
    return {
        "tokens": tokens,
        "lengths": lengths,
        "document_id": integers(columns["document_id"]),
        "weight": torch.ones(len(tokens)),
    }


def pad(sequences: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """B sequences [T] as int64 [B, Tmax], 0 where padded on the right, and their lengths, int64 [B]."""
    rows = [torch.as_tensor(sequence, dtype=torch.int64) for sequence in sequences]
    return pad_sequence(rows, batch_first=True), integers(map(len, rows))


def integers(values: Iterable[Any]) -> Tensor:
    """A value of every row, int64 [B]."""
    return torch.tensor([int(value) for value in values], dtype=torch.int64)


def pad_batch(batch: Mapping[str, Tensor], multiple: int) -> dict[str, Tensor]:
    """Fill a batch up to a multiple of `multiple` rows with dummies of weight 0.

    A dummy repeats the batch's shortest row: every rank then runs the same passes on valid data, at the least
    cost, and sums weighted with `weight` count each document once.

    Args:
        batch: what `collate_columns` returns, B rows; any further tensors must have B rows as well.
        multiple: e.g. the number of ranks, or ranks times micro-batch size.

    Returns:
        The same keys with B' >= B rows, B' % multiple == 0.
    """
    rows = len(batch["lengths"])
    missing = -rows % multiple
    if not missing:
        return dict(batch)
    shortest = int(torch.argmin(batch["lengths"]))
    index = torch.cat([torch.arange(rows), torch.full((missing,), shortest)])
    padded = {key: value[index] for key, value in batch.items()}
    padded["weight"][rows:] = 0.0
    return padded
