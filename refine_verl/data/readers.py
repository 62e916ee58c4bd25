"""Text out of files: each format in batches, every row checked, every complaint with file and row."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from refine_verl.config import DataError

TEXT_SCHEMA = pa.schema([("text", pa.large_string()), ("source", pa.string()), ("row", pa.int64())])
"""Rows that leave this module: the text, the file it came from, its 0-based row (line, for json lines)."""

BATCH_ROWS = 128
BATCH_CHARACTERS = 16 << 20
SUPPORTED = (".parquet", ".jsonl", ".jsonl.zst", ".txt")


def read_file(path: Path, name: str, text_key: str) -> Iterator[pa.RecordBatch]:
    """Batches of `TEXT_SCHEMA` from one file; the format is its suffix.

    Raises:
        DataError: unknown suffix, unreadable or damaged file, missing column, or a row without text.
    """
    suffix = file_format(path)
    try:
        if suffix == ".parquet":
            yield from _read_parquet(path, name, text_key)
        elif suffix in (".jsonl", ".jsonl.zst"):
            yield from _read_json_lines(path, name, text_key)
        else:
            yield from _read_text(path, name, text_key)
    except PermissionError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}. Check its permissions.") from error


def file_format(path: Path) -> str:
    """The supported suffix of `path`, or a `DataError` that lists the supported ones."""
    lowered = path.name.lower()
    for suffix in sorted(SUPPORTED, key=len, reverse=True):
        if lowered.endswith(suffix):
            return suffix
    raise DataError(
        f"{path} has an unsupported suffix {path.suffix or '(none)'!r}; documents are read from "
        f"{', '.join(SUPPORTED)} files, directories of these, or a hub dataset id. Convert the file first."
    )


def make_batch(values: Sequence[str] | pa.Array, rows: np.ndarray, name: str, unit: str = "row") -> pa.RecordBatch:
    """Check texts and put them into a `TEXT_SCHEMA` batch.

    Args:
        values: texts, as Python strings or an Arrow string array.
        rows: int64 [N], the 0-based row of each text in its source.
        name: what messages and the `source` column call the source.
        unit: `row` (messages count from 0) or `line` (messages count from 1).

    Raises:
        DataError: a text is null, empty, only white space, or not valid Unicode.
    """
    try:
        texts = pa.array(values, pa.large_string()) if not isinstance(values, pa.Array) else values
        texts = texts.cast(pa.large_string())
        texts.validate(full=True)
        bad = pc.fill_null(pc.or_(pc.utf8_is_space(texts), pc.equal(pc.utf8_length(texts), 0)), True)
    except (pa.ArrowInvalid, UnicodeError) as error:
        raise _invalid_unicode(values, rows, name, unit) from error
    if pc.any(bad).as_py():
        positions = np.flatnonzero(bad.to_numpy(zero_copy_only=False))
        first = int(positions[0])
        more = f" (and {len(positions) - 1} more close behind)" if len(positions) > 1 else ""
        what = "no text (null)" if not texts[first].is_valid else "empty text or only white space"
        raise DataError(
            f"{name}, {place(rows[first], unit)} has {what}{more}. Every document needs text: "
            "remove such rows, or choose another column with data.text_key."
        )
    return pa.RecordBatch.from_arrays(
        [texts, pa.repeat(pa.scalar(name), len(texts)), pa.array(rows, pa.int64())], schema=TEXT_SCHEMA
    )


def check_column(schema: pa.Schema, text_key: str, name: str) -> None:
    """Refuse a table whose `text_key` column is missing or does not hold strings."""
    if text_key not in schema.names:
        raise DataError(missing_column(name, text_key, schema.names))
    kind = schema.field(text_key).type
    value_type = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(check(value_type) for check in is_text):
        raise DataError(
            f"{name}, row 0 and following: column {text_key!r} holds {kind}, not strings. Choose a text "
            f"column with data.text_key; the columns are: {', '.join(schema.names)}."
        )


def missing_column(name: str, text_key: str, columns: Sequence[str]) -> str:
    """Message for a column that is not there; lists those that are."""
    return (
        f"{name} has no column {text_key!r}; its columns are: {', '.join(map(str, columns)) or '(none)'}. "
        "Name the column that holds the text with data.text_key."
    )


def _read_parquet(path: Path, name: str, text_key: str) -> Iterator[pa.RecordBatch]:
    with reading(name, "parquet file"), pq.ParquetFile(path, page_checksum_verification=True) as file:
        check_column(file.schema_arrow, text_key, name)
        start = 0
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[text_key]):
            rows = np.arange(start, start + len(batch), dtype=np.int64)
            start += len(batch)
            yield make_batch(batch.column(0), rows, name)


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


def json_records(path: Path, name: str, example: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """The objects of a json lines file, zstd-compressed or not; blank lines are skipped.

    Args:
        path: the file.
        name: what messages call it.
        example: the name of a column, for messages.

    Returns:
        0-based line, where it is for messages, and the object.

    Raises:
        DataError: a damaged file, or a line that is not a json object.
    """
    compressed = path.name.lower().endswith(".zst")
    # Arrow's decompressor, unlike a plain zstd reader, reports a stream that stops in the middle of a frame.
    with (
        reading(name, "zstd-compressed file" if compressed else "file"),
        pa.input_stream(str(path), compression="zstd" if compressed else None) as stream,
        io.BufferedReader(stream, 1 << 20) as lines,
    ):
        for row, line in enumerate(lines):
            if line.strip():
                where = f"{name}, {place(row, 'line')}"
                yield row, where, _object_of_line(line, row, where, example)


def _object_of_line(line: bytes, row: int, where: str, example: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig" if row == 0 else "utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where} is not valid json: {error}. Each line must hold one json object; repair or remove the line."
        ) from error
    if not isinstance(record, dict):
        raise DataError(
            f"{where} holds a json {json_type(record)}, not an object. Each line must be an object such as "
            f'{{"{example}": "..."}}; write the file as json lines.'
        )
    return record


def _read_json_lines(path: Path, name: str, text_key: str) -> Iterator[pa.RecordBatch]:
    texts: list[str] = []
    rows: list[int] = []
    characters = 0
    for row, where, record in json_records(path, name, text_key):
        text = _text_of_record(record, where, text_key)
        texts.append(text)
        rows.append(row)
        characters += len(text)
        if len(texts) == BATCH_ROWS or characters > BATCH_CHARACTERS:
            yield make_batch(texts, np.array(rows, np.int64), name, "line")
            texts, rows, characters = [], [], 0
    if texts:
        yield make_batch(texts, np.array(rows, np.int64), name, "line")


def _text_of_record(record: dict[str, Any], where: str, text_key: str) -> str:
    if text_key not in record:
        raise DataError(missing_column(where, text_key, list(record)))
    text = record[text_key]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: {text_key!r} is a json {json_type(text)}, not a string. Repair or remove the line, "
            "or choose another column with data.text_key."
        )
    return text


def _read_text(path: Path, name: str, text_key: str) -> Iterator[pa.RecordBatch]:
    yield make_batch([read_text(path, name, text_key)], np.zeros(1, np.int64), name)


def read_text(path: Path, name: str, text_key: str) -> str:
    """The text of a plain file, line ends as they are; a `DataError` where it is not UTF-8."""
    if text_key != "text":
        raise DataError(missing_column(name, text_key, ["text"]))
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}, row 0 is not UTF-8 text (byte {error.start}: {error.reason}). Convert it to UTF-8 first."
        ) from error


def _invalid_unicode(values: Sequence[str] | pa.Array, rows: np.ndarray, name: str, unit: str) -> DataError:
    for row, value in zip(rows, values, strict=True):
        try:
            text = value.as_py() if isinstance(value, pa.Scalar) else value
            (text or "").encode("utf-8")
        except UnicodeError as error:
            return DataError(
                f"{name}, {place(row, unit)} is not valid Unicode text ({error}). Repair or remove the row."
            )
    return DataError(f"{name}: rows {rows[0]} to {rows[-1]} hold a text that is not valid. Write the file again.")


def place(row: int, unit: str) -> str:
    """The place of a row in a message: rows count from 0, lines from 1."""
    return f"line {row + 1}" if unit == "line" else f"row {row}"


def json_type(value: Any) -> str:
    """What json calls the type of a decoded value."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names[type(value)]
