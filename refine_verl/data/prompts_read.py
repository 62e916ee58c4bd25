"""Rows of prompt/answer files: columns found, every value checked, every complaint with file and row."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from refine_verl.config import DataError
from refine_verl.config.prompts import ANSWER_KEYS, CLASSES_KEY, MAX_NEW_TOKENS_KEY, PromptSettings
from refine_verl.data.readers import file_format, json_records, reading
from refine_verl.data.sources import DocumentSource, FileSource, HubSource

RECORD_ROWS = 64
_FORMATS = (".parquet", ".jsonl", ".jsonl.zst")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptRow:
    """One checked row.

    Attributes:
        id: unique name of the row within the split.
        source, row: the file (or hub dataset) and the 0-based row, or line, in it.
        where: the same for messages.
        prompt: the text, or a list of chat messages.
        answers: references, at least one; none of them empty.
        task: name of the task, "" where none was given.
        classes: what a classification task chooses from; empty for others.
        max_new_tokens: most tokens to generate.
    """

    id: str
    source: str
    row: int
    where: str
    prompt: str | list[dict[str, str]]
    answers: list[str]
    task: str
    classes: list[str]
    max_new_tokens: int


def read_records(source: DocumentSource) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """All rows of a source: 0-based row, what to call it in messages, and its columns.

    Raises:
        DataError: a source without columns (plain text), an unreadable file, or a line that is no json object.
    """
    if isinstance(source, HubSource):
        for row, record in enumerate(source.dataset):
            yield row, f"{source.name}, row {row}", dict(record)
        return
    if not isinstance(source, FileSource) or file_format(source.path) not in _FORMATS:
        raise DataError(
            f"{source.name} has no columns: prompts and answers are read from {', '.join(_FORMATS)} files, "
            "directories of these, or a hub dataset id."
        )
    try:
        if file_format(source.path) == ".parquet":
            yield from _parquet_records(source.path, source.name)
        else:
            yield from json_records(source.path, source.name, "prompt")
    except PermissionError as error:
        raise DataError(f"{source.name} cannot be read: {error.strerror}. Check its permissions.") from error


def read_prompts(sources: Sequence[DocumentSource], settings: PromptSettings) -> Iterator[PromptRow]:
    """All rows of all sources in order, checked.

    Raises:
        DataError: a missing column; an empty or missing prompt or answer; a value of the wrong type; two rows
            with the same id.
    """
    names = _short_names(sources)
    seen: dict[str, str] = {}
    for source in sources:
        for row, where, record in read_records(source):
            checked = _check_row(record, where, source.name, f"{names[source.name]}:{row}", row, settings)
            if checked.id in seen:
                raise DataError(
                    f"{where} has the id {checked.id!r}, which {seen[checked.id]} has already. Make the ids in "
                    f"column {settings.id_key!r} unique, or leave data.id_key unset to name rows by file and row."
                )
            seen[checked.id] = where
            yield checked


def _parquet_records(path: Path, name: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    with reading(name, "parquet file"), pq.ParquetFile(path, page_checksum_verification=True) as file:
        row = 0
        for batch in file.iter_batches(batch_size=RECORD_ROWS):
            try:
                records = batch.to_pylist()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{name}, rows {row} to {row + len(batch) - 1}: a text is not valid Unicode ({error}). "
                    "Repair or remove the row."
                ) from error
            for record in records:
                yield row, f"{name}, row {row}", record
                row += 1


def _short_names(sources: Sequence[DocumentSource]) -> dict[str, str]:
    """File names where they tell the sources apart (they do not change when a directory moves), else paths."""
    short = [Path(source.name).name if isinstance(source, FileSource) else source.name for source in sources]
    if len(set(short)) < len(short):
        short = [source.name for source in sources]
    return {source.name: name for source, name in zip(sources, short, strict=True)}


def _check_row(
    record: Mapping[str, Any], where: str, source: str, default_id: str, row: int, settings: PromptSettings
) -> PromptRow:
    return PromptRow(
        id=_row_id(record, where, default_id, settings.id_key),
        source=source,
        row=row,
        where=where,
        prompt=_prompt(record, where, settings),
        answers=_answers(record, where, settings),
        task=_task(record, where, settings),
        classes=_classes(record, where),
        max_new_tokens=_max_new_tokens(record, where, settings),
    )


def _require(record: Mapping[str, Any], column: str, where: str, key: str, what: str) -> Any:
    if column not in record:
        raise DataError(
            f"{where} has no column {column!r}; its columns are: {', '.join(record) or '(none)'}. "
            f"Name the column that holds {what} with {key}."
        )
    return record[column]


def _row_id(record: Mapping[str, Any], where: str, default: str, key: str | None) -> str:
    if key is None:
        return default
    value = _require(record, key, where, "data.id_key", "the id")
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(f"{where}: {key!r} is {value!r}; an id is a non-empty string or an integer.")
    return str(value)


def _prompt(record: Mapping[str, Any], where: str, settings: PromptSettings) -> str | list[dict[str, str]]:
    value = _require(record, settings.prompt_key, where, "data.prompt_key", "the prompt")
    if settings.chat_template and isinstance(value, list):
        return _messages(value, where, settings.prompt_key)
    if isinstance(value, list):
        raise DataError(
            f"{where}: {settings.prompt_key!r} is a list; chat messages need data.chat_template=true, which turns "
            "them into text. Otherwise give a string."
        )
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{where}: the prompt in column {settings.prompt_key!r} {_wrong_text(value)}. Every row needs a prompt: "
            "repair or remove it, or choose another column with data.prompt_key."
        )
    _require_unicode(value, where, settings.prompt_key)
    return value


def _messages(value: list[Any], where: str, key: str) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = []
    for message in value:
        fields = isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))
        if not fields:
            raise DataError(
                f"{where}: {key!r} holds {str(message)[:80]!r}; a chat prompt is a list of objects with the strings "
                "'role' and 'content'."
            )
        messages.append({"role": message["role"], "content": message["content"]})
        _require_unicode(message["content"], where, key)
    if not messages or not messages[-1]["content"].strip():
        raise DataError(f"{where}: the chat prompt in column {key!r} is empty. Repair or remove the row.")
    return messages


def _answers(record: Mapping[str, Any], where: str, settings: PromptSettings) -> list[str]:
    key = settings.answer_key
    if key is None:
        found = [name for name in ANSWER_KEYS if name in record]
        if len(found) != 1:
            problem = f"several answer columns ({', '.join(found)})" if found else "no answer column"
            raise DataError(
                f"{where} has {problem}; without data.answer_key one of {', '.join(ANSWER_KEYS)} is read. The columns "
                f"are: {', '.join(record) or '(none)'}. Name the one that holds the answer with data.answer_key."
            )
        key = found[0]
    value = _require(record, key, where, "data.answer_key", "the answer")
    references = [value] if isinstance(value, str) else value
    if not isinstance(references, list):
        raise DataError(f"{where}: {key!r} {_wrong_text(value)}; an answer is a string or a list of strings.")
    if not references:
        raise DataError(f"{where}: {key!r} is an empty list. Every row needs an answer: repair or remove the row.")
    for number, reference in enumerate(references):
        if not isinstance(reference, str) or not reference.strip():
            raise DataError(
                f"{where}: answer {number} in column {key!r} {_wrong_text(reference)}. Every reference must be a text: "
                "repair or remove the row, or choose another column with data.answer_key."
            )
        _require_unicode(reference, where, key)
    return list(references)


def _task(record: Mapping[str, Any], where: str, settings: PromptSettings) -> str:
    value = record.get(settings.task_key)
    if value is None:
        return settings.task or ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {settings.task_key!r} is {value!r}, not the name of a task (data.task_key).")
    return value


def _classes(record: Mapping[str, Any], where: str) -> list[str]:
    value = record.get(CLASSES_KEY)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise DataError(f"{where}: {CLASSES_KEY!r} must be a list of class names or null, not {str(value)[:80]}.")
    return list(value)


def _max_new_tokens(record: Mapping[str, Any], where: str, settings: PromptSettings) -> int:
    value = record.get(MAX_NEW_TOKENS_KEY)
    if value is None:
        return settings.max_new_tokens
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DataError(f"{where}: {MAX_NEW_TOKENS_KEY!r} is {value!r}; it must be an integer of at least 1, or null.")
    return value


def _wrong_text(value: Any) -> str:
    if value is None:
        return "is missing (null)"
    if isinstance(value, str):
        return "is empty or only white space"
    return f"is a {type(value).__name__} ({str(value)[:60]}), not a text"


def _require_unicode(text: str, where: str, key: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeError as error:
        raise DataError(f"{where}: {key!r} is not valid Unicode text ({error}). Repair or remove the row.") from error
