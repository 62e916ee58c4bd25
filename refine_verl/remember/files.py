"""A directory of documents: each has its state in safetensors, and beside it a JSON file that says what it is.

The JSON file is written last, in one step: a document without one is not there. No pickle is written or read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from re import fullmatch
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from refine_verl.config import DataError
from refine_verl.models import FastWeightState
from refine_verl.models.keeping import describe, restore
from refine_verl.record.checkpoint_files import flushed
from refine_verl.record.files import replacing, write_atomically
from refine_verl.remember.identity import Identity

FORMAT = "refine_verl.remember 1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """What is known of a document that has been read.

    Attributes:
        name: of the file and row it is from, or its number.
        parts: number of tokens and sha256 of the token ids of each text, in the order they were read: the document and
            what was appended.
    """

    name: str
    parts: tuple[tuple[int, str], ...]

    @property
    def positions(self) -> int:
        """Tokens read."""
        return sum(count for count, _ in self.parts)

    def longer(self, ids: Tensor) -> Document:
        """After more token ids, int64 [T]."""
        digest = hashlib.sha256(ids.to("cpu", torch.int64).numpy().astype("<i8").tobytes()).hexdigest()
        return dataclasses.replace(self, parts=(*self.parts, (len(ids), digest)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """A document in a directory.

    Attributes:
        path: of its JSON file.
        document: which one.
        identity: of the model that read it.
        num_bytes: of its state.
        content: the whole JSON file.
    """

    path: Path
    document: Document
    identity: Identity
    num_bytes: int
    content: dict[str, Any]

    def state(self, device: torch.device) -> FastWeightState:
        """The state itself, one row.

        Raises:
            DataError: its file is missing, or is not the one that was written.
        """
        file = self.path.with_suffix(".safetensors")
        try:
            data = file.read_bytes()
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error}). {_AGAIN}") from error
        if len(data) != self.content["file_bytes"]:
            raise DataError(f"{file}: has {len(data)} bytes of {self.content['file_bytes']}: it is cut off. {_AGAIN}")
        if hashlib.sha256(data).hexdigest() != self.content["file_sha256"]:
            raise DataError(f"{file}: its checksum is not the one it was written with: it was altered. {_AGAIN}")
        try:
            tensors = load(data)
            ordered = [tensors[str(number)].to(device) for number in range(len(tensors))]
            return restore(self.content["state"], ordered)
        except (SafetensorError, KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.path}: its state cannot be put together here ({type(error).__name__}: {error}). Import what "
                "defines the model's adapter first."
            ) from error


_AGAIN = "Remove it with its JSON file, and read the document again."


def write(directory: Path, number: int, document: Document, state: FastWeightState, identity: Identity) -> Stored:
    """Add a document to a directory; a failure leaves no part of it under its name.

    Raises:
        DataError: the state holds what cannot be saved, or there is a document of this number.
        OSError: it cannot be written.
    """
    path = directory / f"{number:05}.json"
    if path.exists():
        raise DataError(f"{path} is there already: another process fills this directory. Wait for it, then read again.")
    try:
        description, tensors = describe(state)
    except TypeError as error:
        raise DataError(f"{document.name}: {error} (refine_verl.models.state.RowLeaf says what can be).") from error
    file = path.with_suffix(".safetensors")
    with replacing(file) as temporary:
        # copies: safetensors refuses tensors that share memory
        copies = {str(i): x.detach().cpu().clone(memory_format=torch.contiguous_format) for i, x in enumerate(tensors)}
        try:
            save_file(copies, temporary)
        except SafetensorError as error:
            raise OSError(f"{file} cannot be written: {error}") from error
        record = flushed(temporary)
        content: dict[str, Any] = {
            "format": FORMAT,
            "name": document.name,
            "positions": document.positions,
            "parts": [list(part) for part in document.parts],
            "model": dataclasses.asdict(identity),
            "state_bytes": state.num_bytes,
            "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
            "file_bytes": record.bytes,
            "file_sha256": record.sha256,
            "state": description,
        }
    write_atomically(path, json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n")
    return _stored(path, content)


def find(directory: Path, key: str = "memory") -> list[Stored]:
    """The documents of a directory, in the order they were written.

    Raises:
        DataError: no such directory, none in it, other JSON files, or one that is cut off, altered or no document.
    """
    if not directory.is_dir():
        raise DataError(f"{key}: {directory} is no directory.")
    paths = sorted(path for path in directory.glob("*.json") if path.name[0] != ".")
    others = [path.name for path in paths if not is_ours(path)]
    if others:
        raise DataError(
            f"{key}: {directory} holds other files ({others[0]}). Give a directory that Memory.save or "
            "python -m refine_verl.remember read has filled."
        )
    found = [_open(path) for path in sorted(paths, key=lambda path: int(path.stem))]
    if not found:
        raise DataError(f"{key}: {directory} holds no documents (no .json file).")
    return found


def is_ours(path: Path) -> bool:
    """Whether a file's name is one of those that `write` gives."""
    return fullmatch(r"[0-9]{5,}\.(json|safetensors)", path.name) is not None


def refuse_others(stored: Sequence[Stored], identity: Identity) -> None:
    """See `Identity.refuse_other`, of every document."""
    for each in stored:
        each.identity.refuse_other(identity, each.path)


def _open(path: Path) -> Stored:
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise DataError(f"{path}: has the format {content['format']!r}, and this version reads {FORMAT!r}.")
        if content.pop("sha256") != _digest(content):
            raise DataError(f"{path}: its checksum is not the one it was written with: it was altered. {_AGAIN}")
        return _stored(path, content)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: is no document of refine_verl.remember, or is cut off ({error}). {_AGAIN}") from error


def _stored(path: Path, content: dict[str, Any]) -> Stored:
    parts = tuple((int(count), str(digest)) for count, digest in content["parts"])
    return Stored(
        path=path,
        document=Document(name=content["name"], parts=parts),
        identity=Identity(**content["model"]),
        num_bytes=content["state_bytes"],
        content=content,
    )


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
