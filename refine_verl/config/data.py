"""Settings of the document pipeline (the part of the `data:` section that decides what the model reads)."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from refine_verl.config.refusals import DataError

LONG_DOCUMENT_POLICIES = ("window", "head")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What to read and how to cut it. Field names are the keys under `data.`.

    Attributes:
        train_files: files, directories, globs, hub dataset ids or `python_stdlib` (one or several).
        val_files: the same, for validation; may be empty.
        text_key: column that holds the text. Plain text files and `python_stdlib` only have `text`.
        max_length: most tokens a sequence may have; None leaves documents whole.
        min_length: fewest tokens a sequence must have; shorter ones are left out and counted.
        long_documents: `window` cuts longer documents into consecutive pieces, `head` keeps the first piece.
        append_eos: put the tokenizer's end-of-sequence token after each document, unless it is there.
        cache_dir: where tokenised documents are kept; default `$XDG_CACHE_HOME/refine_verl/data`.
        num_workers: processes that tokenise; None chooses by the amount of text and the cores.
        progress: progress bars on or off; None shows them on a terminal only.

    Raises:
        DataError: a value that is not allowed.
    """

    train_files: tuple[str, ...] = ()
    val_files: tuple[str, ...] = ()
    text_key: str = "text"
    max_length: int | None = None
    min_length: int = 1
    long_documents: str = "window"
    append_eos: bool = False
    cache_dir: str | None = None
    num_workers: int | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        for field in ("train_files", "val_files"):
            object.__setattr__(self, field, as_names(getattr(self, field), f"data.{field}"))
        require_integer("data.min_length", self.min_length, at_least=1)
        if self.max_length is not None:
            require_integer("data.max_length", self.max_length, at_least=1)
            if self.max_length < self.min_length:
                raise DataError(
                    f"data.max_length={self.max_length} is smaller than data.min_length={self.min_length}: "
                    "no sequence could be kept. Raise data.max_length or lower data.min_length."
                )
        if self.num_workers is not None:
            require_integer("data.num_workers", self.num_workers, at_least=1)
        if not isinstance(self.text_key, str) or not self.text_key:
            raise DataError(f"data.text_key={self.text_key!r} must be the name of a column.")
        if self.long_documents not in LONG_DOCUMENT_POLICIES:
            near = difflib.get_close_matches(str(self.long_documents), LONG_DOCUMENT_POLICIES, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(
                f"data.long_documents={self.long_documents!r} is not one of: {', '.join(LONG_DOCUMENT_POLICIES)}.{hint}"
            )

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> DataSettings:
        """Take this class's keys out of a `data:` section (plain or OmegaConf mapping); leave the others."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: data[key] for key in data if key in names})

    def files(self, split: str) -> tuple[str, ...]:
        """The names given for `split` ("train" or "validation")."""
        return self.train_files if split_key(split) == "data.train_files" else self.val_files


def split_key(split: str) -> str:
    """The dotted key of a split, for messages: "train" -> "data.train_files"."""
    keys = {"train": "data.train_files", "validation": "data.val_files"}
    if split not in keys:
        raise DataError(f"unknown split {split!r}; splits are: {', '.join(keys)}.")
    return keys[split]


def as_names(value: Any, key: str) -> tuple[str, ...]:
    """One name or several as a tuple; a `DataError` that names `key` for anything else."""
    if value is None:
        return ()
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{key} holds {name!r}; it takes a path or a list of paths.")
    return names


def require_integer(key: str, value: Any, *, at_least: int) -> None:
    """Refuse what is not an integer of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise DataError(f"{key}={value!r} must be an integer of at least {at_least}.")
