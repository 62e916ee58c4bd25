"""The text: the Python sources of this interpreter's standard library, as tokens in windows of equal length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from refine_verl.data import DataSettings
from refine_verl.data.dataset import DocumentDataset
from refine_verl.data.prepare import iterate_split_texts, prepare
from refine_verl.data.sources import STDLIB_NAME
from refine_verl.data.tokenizers import load_tokenizer
from refine_verl.models import Documents

# Every 20th source file is for validation; the sources that the package keeps for validation are the test text here.
VALIDATION_EVERY = 20
TRAIN_FILES = (f"{STDLIB_NAME}:train",)
TEST_FILES = (f"{STDLIB_NAME}:validation",)


@dataclass(frozen=True)
class Corpus:
    """Windows of T tokens, int64 [N, T], of three sets of source files; ``fingerprint`` names all of them."""

    train: Tensor
    validation: Tensor
    test: Tensor
    fingerprint: str

    @property
    def length(self) -> int:
        """T."""
        return self.train.shape[1]

    def epochs(self, seed: int) -> Iterator[int]:
        """Rows of ``train`` in an order of this seed's, again and again."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from torch.randperm(len(self.train), generator=generator).tolist()


def load_corpus(directory: Path, vocabulary: int, length: int, held_out: int) -> Corpus:
    """Read, tokenise and cut the sources; a second call takes the prepared files from ``directory``.

    Args:
        directory: for the tokenizer and the tokens.
        vocabulary: pieces of the byte-level BPE, which is trained on the training sources.
        length: T; shorter ends of files are left out.
        held_out: windows kept of the validation and of the test text, spread evenly over the files.

    Raises:
        DataError: the interpreter comes without sources.
    """
    settings = DataSettings(
        train_files=TRAIN_FILES,
        val_files=TEST_FILES,
        max_length=length,
        min_length=length,
        cache_dir=str(directory / "tokens"),
        progress=False,
    )
    saved = directory / f"bpe{vocabulary}"
    if saved.is_dir():
        tokenizer = load_tokenizer(str(saved))
    else:
        tokenizer = load_tokenizer(f"bpe:{vocabulary}", iterate_split_texts(settings, "train"), saved)
    known = DocumentDataset(prepare(settings, "train", tokenizer).path)
    sources = list(known.table["source"])
    validation_files = set(sorted(set(sources))[::VALIDATION_EVERY])
    inside = torch.tensor([source in validation_files for source in sources])
    windows = _windows(known)
    test = _windows(DocumentDataset(prepare(settings, "validation", tokenizer).path))
    parts = (windows[~inside], _spread(windows[inside], held_out), _spread(test, held_out))
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:16]
    return Corpus(*parts, digest)


def documents(windows: Tensor) -> Documents:
    """Windows [N, T] as a batch."""
    return Documents.from_tensors(windows, (windows.shape[1],) * len(windows))


def _windows(dataset: DocumentDataset) -> Tensor:
    rows = dataset.table.select_columns(["input_ids"]).with_format("numpy")
    return torch.cat([torch.from_numpy(part["input_ids"]).long() for part in rows.iter(batch_size=256)])


def _spread(windows: Tensor, count: int) -> Tensor:
    if count >= len(windows):
        return windows
    return windows[torch.linspace(0, len(windows) - 1, count).round().long()]
