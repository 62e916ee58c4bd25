"""Rows out of files: each format row by row, every text checked, every complaint with file and row."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from refine_verl.config import DataError
from refine_verl.config.hub import LFS_POINTER, is_lfs_pointer

BATCH_ROWS = 128
BATCH_CHARACTERS = 16 << 20
COMPRESSIONS = {".zst": "zstd", ".gz": "gzip"}
"""What a suffix behind that of json lines means."""
TABLES = (".parquet", ".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.gz")
"""Files with columns; `.json.gz` holds json lines, as such files do."""
SUPPORTED = (*TABLES, ".txt")


class Record(NamedTuple):
    """One row.

    Attributes:
        source, row: the file (or hub dataset) and the 0-based row, or line, in it.
        where: the same for messages.
        columns: what is in it.
    """

    source: str
    row: int
    where: str
    columns: dict[str, Any]


def read_file(path: Path, name: str, text_key: str | None = None) -> Iterator[Record]:
    """The rows of one file, which messages and `Record.source` call `name`; the format is its suffix.

    Args:
        text_key: the only column that is wanted, a text; None: all of them.

    Raises:
        DataError: unknown suffix, unreadable or damaged file, missing column, plain text without `text_key`.
    """
    suffix = file_format(path)
    if is_lfs_pointer(path):
        raise DataError(f"{name} {LFS_POINTER}")
    try:
        if suffix == ".parquet":
            yield from _read_parquet(path, name, text_key)
        elif suffix in TABLES:
            yield from _read_json_lines(path, name, text_key or "prompt")
        else:
            require_plain_text(name, text_key)
            try:
                text = path.read_bytes().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{name}, row 0 is not UTF-8 text (byte {error.start}: {error.reason}). Convert it to UTF-8 first."
                ) from error
            yield Record(name, 0, f"{name}, row 0", {"text": text})
    except PermissionError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}. Check its permissions.") from error


def file_format(path: Path) -> str:
    """The supported suffix of `path`, or a `DataError` that lists the supported ones."""
    for suffix in SUPPORTED:
        if path.name.lower().endswith(suffix):
            return suffix
    raise DataError(
        f"{path} has an unsupported suffix {path.suffix or '(none)'!r}; documents are read from "
        f"{', '.join(SUPPORTED)} files, directories of these, or a hub dataset id. Convert the file first."
    )


def batched(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Rows in lists of `BATCH_ROWS`, of fewer where their texts are long."""
    batch: list[Mapping[str, Any]] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(batch) == BATCH_ROWS or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def require_text(value: Any, what: str, cure: str) -> str:
    """Refuse what is no text, is empty or only white space, or is not valid Unicode (a lone surrogate of json).

    `what` names it in messages, with its place, and `cure` ends them.
    """
    if not isinstance(value, str) or not value or value.isspace():
        raise DataError(f"{what} {wrong_text(value)}. {cure}")
    require_unicode(value, what)
    return value


def require_unicode(text: str, what: str) -> None:
    """Refuse a text that is not valid Unicode (see `require_text`)."""
    try:
        text.encode("utf-8")
    except UnicodeError as error:
        raise DataError(f"{what} is not valid Unicode text ({error}). Repair or remove the row.") from error


def wrong_text(value: Any) -> str:
    """What keeps a value from being a text, for messages."""
    if value is None:
        return "is missing (null)"
    if isinstance(value, str):
        return "is empty or only white space"
    return f"is a {type(value).__name__} ({str(value)[:60]}), not a text"


def require_column(columns: Mapping[str, Any], name: str, where: str, key: str, what: str) -> Any:
    """The value of a column of a row or a table; refuses one without it, listing those that it has.

    Messages call the row `where`, and name the setting `key` that names the column, and `what` it holds.
    """
    if name not in columns:
        raise DataError(
            f"{where} has no column {name!r}; its columns are: {', '.join(columns) or '(none)'}. "
            f"Name the column that holds {what} with {key}."
        )
    return columns[name]


def require_plain_text(name: str, text_key: str | None) -> None:
    """Refuse to look for columns in plain text: it has `text` only."""
    if text_key is None:
        raise DataError(
            f"{name} has no columns: prompts and answers are read from {', '.join(TABLES)} files, "
            "directories of these, or a hub dataset id."
        )
    require_column({"text": None}, text_key, name, "data.text_key", "the text")


def check_column(schema: pa.Schema, text_key: str, name: str) -> None:
    """Refuse a table whose `text_key` column is missing or does not hold strings."""
    kinds = dict(zip(schema.names, schema.types, strict=True))
    kind = require_column(kinds, text_key, name, "data.text_key", "the text")
    value_type = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(check(value_type) for check in is_text):
        raise DataError(
            f"{name}, row 0 and following: column {text_key!r} holds {kind}, not strings. Choose a text "
            f"column with data.text_key; the columns are: {', '.join(schema.names)}."
        )


def _read_parquet(path: Path, name: str, text_key: str | None) -> Iterator[Record]:
    with reading(name, "parquet file"), pq.ParquetFile(path, page_checksum_verification=True) as file:
        names = file.schema_arrow.names
        if twice := [column for column in names if names.count(column) > 1]:
            raise DataError(f"{name} has {len(twice)} columns of the name {twice[0]!r}. Rename them, or keep one.")
        if text_key is not None:
            check_column(file.schema_arrow, text_key, name)
        columns = None if text_key is None else [text_key]
        row = 0
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
            for index in range(len(batch)):
                where = f"{name}, {place(row, 'row')}"
                try:
                    yield Record(name, row, where, batch.slice(index, 1).to_pylist()[0])
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{where} is not valid Unicode text ({error}). Repair or remove the row."
                    ) from error
                row += 1


@contextmanager
def reading(name: str, kind: str) -> Iterator[None]:
    """Turn Arrow's complaints about a damaged file into ours."""
    try:
        yield
    except PermissionError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{name} is not a readable {kind} (damaged or cut off?): {error}. Fetch or write the file again."
        ) from error


def _read_json_lines(path: Path, name: str, example: str) -> Iterator[Record]:
    """The objects of a json lines file, compressed or not; blank lines are skipped. `example` names a column."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    # Arrow's decompressor, unlike a plain zstd reader, reports a stream that stops in the middle of a frame.
    with (
        reading(name, f"{compression}-compressed file" if compression else "file"),
        pa.input_stream(str(path), compression=compression) as stream,
        io.BufferedReader(stream, 1 << 20) as lines,
    ):
        for row, line in enumerate(lines):
            if line.strip():
                where = f"{name}, {place(row, 'line')}"
                yield Record(name, row, where, _object_of_line(line, row, where, example))


def _object_of_line(line: bytes, row: int, where: str, example: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig" if row == 0 else "utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where} is not valid json: {error}. Each line must hold one json object; repair or remove the line."
        ) from error
    if not isinstance(record, dict):
        kinds = {list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
        raise DataError(
            f"{where} holds a json {kinds.get(type(record), 'null')}, not an object. Each line must be an object such "
            f'as {{"{example}": "..."}}; write the file as json lines.'
        )
    return record


def place(row: int, unit: str) -> str:
    """The place of a row in a message: rows count from 0, lines from 1."""
    return f"line {row + 1}" if unit == "line" else f"row {row}"
