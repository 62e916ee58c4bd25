"""Prepared sequences for training loops: a torch dataset, and batches with explicit lengths and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from refine_verl.config import DataError
from refine_verl.data.prepare import read_statistics
from refine_verl.data.tokenize import document_lengths


class DocumentDataset(Dataset[dict[str, Any]]):
    """The sequences of a directory made by `prepare`, memory-mapped, in document order.

    Args:
        path: the prepared directory.

    Raises:
        DataError: there is no such directory, or it was not made by `prepare`.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_dir():
            raise DataError(
                f"no prepared documents at {path}. On several machines data.cache_dir must lie on a file "
                "system that all of them see."
            )
        self.statistics = read_statistics(path)
        self.table = datasets.load_from_disk(str(path))
        self._tokens = self.table.select_columns(["input_ids", "document_id", "length"]).with_format("numpy")

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`input_ids` (int64 tensor [T]), `document_id` (int) and `length` (int, = T)."""
        row = self._tokens[int(index)]
        return {
            "input_ids": torch.from_numpy(np.asarray(row["input_ids"], dtype=np.int64)),
            "document_id": int(row["document_id"]),
            "length": int(row["length"]),
        }

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], tokens of each sequence."""
        return document_lengths(self.table)


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Right-pad sequences to the longest one of the batch.

    Args:
        rows: what `DocumentDataset` or `VerlDocumentDataset` returns (`input_ids` [T], `document_id`).

    Returns:
        `tokens` int64 [B, Tmax] (0 where padded), `lengths` int64 [B], `document_id` int64 [B], and
        `weight` float32 [B], all 1. `TensorDict(batch, batch_size=len(rows))` takes it as it is.
    """
    sequences = [torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows]
    return {
        "tokens": torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=0),
        "lengths": torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64),
        "document_id": torch.tensor([int(row["document_id"]) for row in rows], dtype=torch.int64),
        "weight": torch.ones(len(sequences), dtype=torch.float32),
    }


def collate_columns(columns: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """`collate` for a batch that verl's own collate function has turned into object arrays by column."""
    return collate(
        [
            {"input_ids": ids, "document_id": document}
            for ids, document in zip(columns["input_ids"], columns["document_id"], strict=True)
        ]
    )


def pad_batch(batch: Mapping[str, torch.Tensor], multiple: int) -> dict[str, torch.Tensor]:
    """Fill a batch up to a multiple of `multiple` rows with dummies of weight 0.

    A dummy repeats the batch's shortest row: every rank then runs the same passes on valid data, at the least
    cost, and sums weighted with `weight` count each document once.

    Args:
        batch: what `collate` returns, B rows; any further tensors must have B rows as well.
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
