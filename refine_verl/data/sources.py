"""From what the user typed under `data.train_files` to sources of documents, in a fixed order."""

from __future__ import annotations

import filecmp
import glob
import hashlib
import logging
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from refine_verl.config import DataError, FileSettings, nearest, split_key
from refine_verl.config.hub import OFFLINE_VARIABLE, hub_is_reachable
from refine_verl.data.readers import (
    SUPPORTED,
    Record,
    check_column,
    file_format,
    read_file,
    require_column,
    require_plain_text,
    require_text,
)

logger = logging.getLogger(__name__)

STDLIB_NAME = "python_stdlib"
STDLIB_SPLITS = ("train", "validation")
STDLIB_VALIDATION_PERCENT = 5
_STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_EVERY_DOCUMENT = "Every document needs text: remove such rows, or choose another column with data.text_key."
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.+-]+){0,2}")


class DocumentSource(Protocol):
    """Something that yields rows in a fixed order."""

    name: str

    def fingerprint(self) -> list[Any]:
        """Changes whenever the rows may have changed; json-serialisable."""

    def records(self, text_key: str | None = None) -> Iterator[Record]:
        """All rows, with their column `text_key` alone if it is given.

        Raises:
            DataError: a file that cannot be read, a column that is missing or no text, plain text without `text_key`.
        """


Identity = tuple[int, int]
"""Device and inode."""


def identity_of(path: Path) -> Identity:
    """What all names of a file or directory have in common.

    Raises:
        DataError: a symbolic link to nothing.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Is it a symbolic link to nothing?") from error
    return stat.st_dev, stat.st_ino


class FileSource:
    """One local file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        file_format(path)

    def fingerprint(self) -> list[Any]:
        """Absolute path, size and time of the last change."""
        stat = self.path.stat()
        return [str(self.path.absolute()), stat.st_size, stat.st_mtime_ns]

    def records(self, text_key: str | None = None) -> Iterator[Record]:
        """The file's rows."""
        return read_file(self.path, self.name, text_key)


class StandardLibrarySource:
    """The Python sources of the running interpreter's standard library: real text on every machine.

    A file belongs to `validation` when the hash of its relative name says so (5 %), else to `train`. Empty
    and undecodable files, tests and installed packages are left out.
    """

    def __init__(self, split: str) -> None:
        if split not in STDLIB_SPLITS:
            raise DataError(
                f"{STDLIB_NAME} has no split {split!r}; write "
                f"{' or '.join(f'{STDLIB_NAME}:{known}' for known in STDLIB_SPLITS)}."
            )
        self.name = f"{STDLIB_NAME}:{split}"
        self.root = Path(sysconfig.get_path("stdlib"))
        self.files = [name for name in _standard_library_files(self.root) if _stdlib_split(name) == split]
        if not self.files:
            raise DataError(
                f"{self.name}: no Python sources under {self.root} (the interpreter may ship them compiled "
                "or zipped). Give files of your own in data.train_files and data.val_files."
            )

    def fingerprint(self) -> list[Any]:
        """Name, size and time of the last change of every file."""
        stats = [(name, (self.root / name).stat()) for name in self.files]
        return [self.name, str(self.root), *([name, s.st_size, s.st_mtime_ns] for name, s in stats)]

    def records(self, text_key: str | None = None) -> Iterator[Record]:
        """One document per source file, called `python_stdlib/<relative path>`."""
        require_plain_text(self.name, text_key)
        for name in self.files:
            try:
                text = (self.root / name).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                logger.debug("%s: left out %s: %s", self.name, name, error)
                continue
            if text.strip():
                called = f"{STDLIB_NAME}/{name}"
                yield Record(called, 0, f"{called}, row 0", {"text": text})


class HubSource:
    """A dataset of the Hugging Face hub: `org/name`, `org/name:split` or `org/name:config:split`."""

    def __init__(self, spec: str, default_split: str, key: str) -> None:
        self.name = spec
        repo, *rest = spec.split(":")
        split = rest[-1] if rest else default_split
        self.dataset = _load_hub_dataset(repo, rest[0] if len(rest) == 2 else None, split, spec, key)

    def fingerprint(self) -> list[Any]:
        """The cached Arrow files, whose paths carry the dataset's revision."""
        files = [Path(entry["filename"]) for entry in self.dataset.cache_files]
        return [self.name, len(self.dataset), *([str(f), f.stat().st_size] for f in files)]

    def records(self, text_key: str | None = None) -> Iterator[Record]:
        """The dataset's rows."""
        table = self.dataset
        if text_key is not None:
            check_column(table.features.arrow_schema, text_key, self.name)
            table = table.select_columns([text_key])
        for row, columns in enumerate(table):
            yield Record(self.name, row, f"{self.name}, row {row}", dict(columns))


def split_sources(settings: FileSettings, split: str) -> list[DocumentSource]:
    """The sources of a split ("train" or "validation"); see `resolve_sources`."""
    return resolve_sources(settings.files(split), key=split_key(split), default_split=split)


def resolve_sources(names: Iterable[str], *, key: str, default_split: str) -> list[DocumentSource]:
    """Find everything `names` stands for, in the order given; inside directories and globs sorted by path.

    Args:
        names: files, directories (searched recursively), globs, hub dataset ids, `python_stdlib[:split]`.
        key: dotted key the names came from, for messages.
        default_split: split of `python_stdlib` and of hub datasets named without one.

    Raises:
        DataError: nothing is there, a directory or glob is empty, or a format is not supported.
    """
    sources: list[DocumentSource] = []
    for name in names:
        sources.extend(_resolve(name, key, default_split))
    if not sources:
        raise DataError(f"{key} is empty: give files, a directory, a hub dataset id, or {STDLIB_NAME}.")
    seen: dict[object, DocumentSource] = {}
    for source in sources:
        first = seen.setdefault(_identity(source), source)
        if first is not source:
            also = "" if first.name == source.name else f" (as {source.name} as well)"
            raise DataError(f"{key} names {first.name} more than once{also}; its documents would count several times.")
    return sources


def _identity(source: DocumentSource) -> object:
    """The same for all names of one source."""
    return identity_of(source.path) if isinstance(source, FileSource) else source.name


def say_if_counted_twice(settings: FileSettings) -> None:
    """Warn where files of training have the same content, and where validation reads what training reads."""
    train, validation = (
        split_sources(settings, split) if names else []
        for split, names in (("train", settings.train_files), ("validation", settings.val_files))
    )
    if copies := _copies(train):
        copy, first = copies[0]
        logger.warning(
            "data.train_files: %d of %d files have the content of others (%s that of %s): their documents count "
            "several times",
            len(copies),
            len(train),
            copy.name,
            first.name,
        )
    identities = {_identity(source) for source in train}
    copied = [copy for copy, first in _copies([*train, *validation]) if copy in validation and first in train]
    shared = [source for source in validation if _identity(source) in identities or source in copied]
    if shared:
        logger.warning(
            "data.val_files: %d of %d files are in data.train_files as well (%s): the validation loss is one of "
            "documents that are trained on",
            len(shared),
            len(validation),
            shared[0].name,
        )


def _copies(sources: list[DocumentSource]) -> list[tuple[DocumentSource, DocumentSource]]:
    """Files with the content of an earlier one, and that one; read no further than they are alike."""
    sizes: dict[int, list[FileSource]] = {}
    found: list[tuple[DocumentSource, DocumentSource]] = []
    for source in sources:
        if not isinstance(source, FileSource):
            continue
        alike = sizes.setdefault(source.path.stat().st_size, [])
        first = next((other for other in alike if _same_content(other, source)), None)
        if first is None:
            alike.append(source)
        else:
            found.append((source, first))
    return found


def _same_content(one: FileSource, other: FileSource) -> bool:
    return _identity(one) == _identity(other) or filecmp.cmp(one.path, other.path, shallow=False)


def iterate_documents(sources: Iterable[DocumentSource], text_key: str) -> Iterator[dict[str, Any]]:
    """Checked documents in order: `text`, `source` (the file) and `row` (0-based).

    Raises:
        DataError: see `DocumentSource.records` and `readers.require_text`.
    """
    for source in sources:
        for record in source.records(text_key):
            value = require_column(record.columns, text_key, record.where, "data.text_key", "the text")
            text = require_text(value, f"{record.where}: the text in column {text_key!r}", _EVERY_DOCUMENT)
            yield {"text": text, "source": record.source, "row": record.row}


def iterate_texts(sources: Iterable[DocumentSource], text_key: str) -> Iterator[str]:
    """All texts, one by one, in document order."""
    return (document["text"] for document in iterate_documents(sources, text_key))


def _resolve(name: str, key: str, default_split: str) -> list[DocumentSource]:
    if name == STDLIB_NAME or name.startswith(f"{STDLIB_NAME}:"):
        return [StandardLibrarySource(name.partition(":")[2] or default_split)]
    path = Path(name).expanduser()
    if path.is_dir():
        return [FileSource(file) for file in _each_once(_directory_files(path, key), key)]
    if path.exists():
        return [FileSource(path)]
    if glob.has_magic(name) and not _HUB_ID.fullmatch(name):
        files = sorted(match for match in map(Path, glob.glob(str(path), recursive=True)) if match.is_file())
        if not files:
            raise DataError(f"{key}: no file matches {path}. Check the pattern and the working directory.")
        return [FileSource(file) for file in _each_once(files, key)]
    if _HUB_ID.fullmatch(name) and not name.lower().endswith(SUPPORTED):
        # Said before, not after: without a network the hub client tries for half a minute.
        logger.warning("%s: %s is no local path.%s Asking the Hugging Face hub for it.", key, name, nearest_paths(path))
        return [HubSource(name, default_split, key)]
    raise DataError(f"{key}: {name} does not exist.{nearest_paths(path)}")


def _directory_files(directory: Path, key: str) -> list[Path]:
    found, others = [], Counter[str]()
    walked = {identity_of(directory)}
    for parent, folders, files in os.walk(directory, followlinks=True):
        names = sorted((os.path.islink(os.path.join(parent, name)), name) for name in folders if name[0] != ".")
        folders[:] = [name for _, name in names if _first_time(Path(parent) / name, walked, key)]
        for file in files:
            if file.startswith("."):
                continue
            if file.lower().endswith(SUPPORTED):
                found.append(Path(parent) / file)
            else:
                others[Path(file).suffix or file] += 1
    skipped = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
    if not found:
        raise DataError(
            f"{key}: directory {directory} holds no document files ({', '.join(SUPPORTED)}), also not "
            f"further down; it holds {skipped or 'nothing'}."
        )
    if skipped:
        logger.warning("%s: left out files of other kinds in %s: %s", key, directory, skipped)
    return sorted(found)


def _first_time(folder: Path, walked: set[Identity], key: str) -> bool:
    """Whether a folder was not walked by another name; a link to a folder that it lies in would never end."""
    identity = identity_of(folder)
    if identity in walked:
        logger.warning("%s: left out %s, a symbolic link to %s, which is read already", key, folder, folder.resolve())
        return False
    walked.add(identity)
    return True


def _each_once(files: list[Path], key: str) -> list[Path]:
    """Without the files that are there by another name before."""
    seen: dict[Identity, Path] = {}
    again = [file for file in files if seen.setdefault(identity_of(file), file) is not file]
    if again:
        first = seen[identity_of(again[0])]
        logger.warning(
            "%s: left out %d files that are others by another name: %s is %s", key, len(again), again[0], first
        )
    return list(seen.values())


def nearest_paths(path: Path) -> str:
    """A sentence on what exists close to a path that does not."""
    parent = path.absolute().parent
    missing = path.name
    while not parent.is_dir():
        missing, parent = parent.name, parent.parent
    try:
        existing = sorted(os.listdir(parent))
    except OSError:
        return ""
    near = nearest(missing, existing, most=3)
    if near:
        return " Nearest existing: " + ", ".join(str(parent / name) for name in near) + "."
    return f" {parent} exists, but holds nothing with a name like {missing!r}."


def _load_hub_dataset(repo: str, config: str | None, split: str, spec: str, key: str) -> Any:
    import datasets
    from huggingface_hub import constants

    if not constants.is_offline_mode() and not hub_is_reachable():
        raise DataError(
            f"{key}: {spec} is no local path, and {constants.ENDPOINT} cannot be reached to look for a hub dataset of "
            f"that name.{nearest_paths(Path(repo))} If the dataset was downloaded before, set {OFFLINE_VARIABLE}=1 to "
            f"take it from the cache; else copy it here as parquet, jsonl or txt files and give their path in {key}."
        )
    try:
        return datasets.load_dataset(repo, config, split=split)
    except Exception as error:  # the hub client raises many unrelated types; all mean "could not get it"
        raise DataError(
            f"{key}: {spec} is no local path, and the hub dataset {repo!r} (split {split!r}) could not be "
            f"loaded: {type(error).__name__}: {error}.{nearest_paths(Path(repo))} Hub names are org/name, "
            "org/name:split or org/name:config:split. Without network access, copy the data here as parquet, "
            f"jsonl or txt files and give their path in {key}."
        ) from error


def _standard_library_files(root: Path) -> list[str]:
    names = []
    for parent, folders, files in os.walk(root):
        folders[:] = [folder for folder in folders if folder not in _STDLIB_SKIPPED]
        names += [(Path(parent) / file).relative_to(root).as_posix() for file in files if file.endswith(".py")]
    return sorted(names)


def _stdlib_split(name: str) -> str:
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    return "validation" if draw < STDLIB_VALIDATION_PERCENT else "train"
