"""The dataset class verl loads, through `data.custom_cls.path=pkg://refine_verl.data.verl_dataset` and
`data.custom_cls.name=VerlDocumentDataset`.

verl builds the datasets inside its driver process and batches them with its own collate function, which
stacks tensors and puts everything else into object arrays. Sequences differ in length, so this class hands
them out as numpy arrays; `dataset.collate_columns` makes padded tensors of a batch. Order is verl's:
`data.shuffle` and `data.seed` decide it for training, and `data.validation_shuffle=false` keeps document
order for validation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from refine_verl.config import DataError
from refine_verl.data.dataset import DocumentDataset, PreparedDataset


class VerlDocumentDataset(Dataset[dict[str, Any]]):
    """`DocumentDataset` behind the constructor verl calls. Reads a prepared directory; tokenises nothing.

    Args:
        data_files: the directory made by `prepare` (or a list with that one entry); None or an empty list
            give an empty dataset (no validation).
        tokenizer: not used, the documents are tokens already.
        processor: not used.
        config: verl's `data` section; `shuffle` and `seed` choose the subset when `max_samples` is set.
        max_samples: keep at most this many sequences: the first ones, or with `shuffle` a random choice that
            depends on `seed` only. -1 keeps all.

    Raises:
        DataError: several directories, or one that `prepare` did not make.
    """

    dataset_class: type[PreparedDataset] = DocumentDataset

    def __init__(
        self,
        data_files: str | Iterable[str] | None,
        tokenizer: Any,
        processor: Any,
        config: Mapping[str, Any],
        max_samples: int = -1,
    ) -> None:
        del tokenizer, processor
        paths = [data_files] if isinstance(data_files, str) else [str(path) for path in data_files or ()]
        if len(paths) > 1:
            raise DataError(f"verl's data files must be one prepared directory, not {len(paths)}: {paths}.")
        self.documents = self.dataset_class(paths[0]) if paths else None
        total = len(self.documents) if self.documents is not None else 0
        self.indices = np.arange(total)
        if 0 < max_samples < total:
            self.indices = self.indices[:max_samples]
            if config.get("shuffle"):
                generator = np.random.default_rng(config.get("seed") or 0)
                self.indices = np.sort(generator.choice(total, size=max_samples, replace=False))

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row of `dataset_class`, with numpy arrays for tensors."""
        place = int(self.indices[index])  # an IndexError where there are no documents
        assert self.documents is not None
        row = self.documents[place]
        return {name: value.numpy() if isinstance(value, Tensor) else value for name, value in row.items()}
