"""What the commands share: tokenizers, paths, and a column of their tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from refine_verl.config import DataError, is_made_of_documents
from refine_verl.data.tokenizers import load_tokenizer


def spread(lengths: Sequence[int]) -> tuple[Any, Any, Any]:
    """Smallest, mean and largest, or dashes for nothing."""
    return (min(lengths), round(float(np.mean(lengths))), max(lengths)) if len(lengths) else ("-", "-", "-")


def command_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """The tokenizer `--tokenizer` names.

    Raises:
        DataError: nothing loadable there, or `bpe:SIZE`, which would have to be trained first.
    """
    if is_made_of_documents(spec):
        raise DataError(
            f"--tokenizer {spec} would be trained on a run's own documents. Give the tokenizer's directory (a run "
            "saves it with its model), a hub id, or bytes."
        )
    return load_tokenizer(spec)


def existing(path: str) -> Path | None:
    """`path` where it exists, else None (a hub id, perhaps)."""
    found = Path(path).expanduser()
    return found if found.exists() else None
