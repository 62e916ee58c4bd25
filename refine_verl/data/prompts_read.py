"""Rows of prompt/answer files: columns found, every value checked, every complaint with file and row."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from refine_verl.config import DataError, PromptSettings
from refine_verl.config.data import ANSWER_KEYS, CLASSES_KEY, MAX_NEW_TOKENS_KEY
from refine_verl.data.readers import Record, require_column, require_text, require_unicode, wrong_text
from refine_verl.data.sources import DocumentSource, FileSource


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

    @property
    def texts(self) -> list[str]:
        """What is in the prompt: one text, or those of the messages."""
        return [self.prompt] if isinstance(self.prompt, str) else [message["content"] for message in self.prompt]


def read_prompts(sources: Sequence[DocumentSource], settings: PromptSettings) -> Iterator[PromptRow]:
    """All rows of all sources in order, checked.

    Raises:
        DataError: a missing column; an empty or missing prompt or answer; a value of the wrong type; two rows
            with the same id.
    """
    names = _short_names(sources)
    seen: dict[str, str] = {}
    for source in sources:
        for record in source.records():
            checked = PromptRow(
                id=_row_id(record, f"{names[source.name]}:{record.row}", settings.id_key),
                source=record.source,
                row=record.row,
                where=record.where,
                prompt=_prompt(record, settings),
                answers=_answers(record, settings),
                task=_task(record, settings),
                classes=_classes(record),
                max_new_tokens=_max_new_tokens(record, settings),
            )
            if checked.id in seen:
                raise DataError(
                    f"{record.where} has the id {checked.id!r}, which {seen[checked.id]} has already. Make the ids in "
                    f"column {settings.id_key!r} unique, or leave data.id_key unset to name rows by file and row."
                )
            seen[checked.id] = record.where
            yield checked


def _short_names(sources: Sequence[DocumentSource]) -> dict[str, str]:
    """File names where they tell the sources apart (they do not change when a directory moves), else paths."""
    short = [Path(source.name).name if isinstance(source, FileSource) else source.name for source in sources]
    if len(set(short)) < len(short):
        short = [source.name for source in sources]
    return {source.name: name for source, name in zip(sources, short, strict=True)}


def _row_id(record: Record, default: str, key: str | None) -> str:
    if key is None:
        return default
    value = require_column(record.columns, key, record.where, "data.id_key", "the id")
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(f"{record.where}: {key!r} is {value!r}; an id is a non-empty string or an integer.")
    return str(value)


def _prompt(record: Record, settings: PromptSettings) -> str | list[dict[str, str]]:
    key, where = settings.prompt_key, record.where
    value = require_column(record.columns, key, where, "data.prompt_key", "the prompt")
    if settings.chat_template and isinstance(value, list):
        return _messages(value, where, key)
    if isinstance(value, list):
        raise DataError(
            f"{where}: {key!r} is a list; chat messages need data.chat_template=true, which turns them into text. "
            "Otherwise give a string."
        )
    cure = "Every row needs a prompt: repair or remove it, or choose another column with data.prompt_key."
    return require_text(value, f"{where}: the prompt in column {key!r}", cure)


def _messages(value: list[Any], where: str, key: str) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = []
    for message in value:
        fields = isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))
        if not fields:
            raise DataError(
                f"{where}: {key!r} holds {str(message)[:80]!r}; a chat prompt is a list of objects with the strings "
                "'role' and 'content'."
            )
        require_unicode(message["content"], f"{where}: the prompt in column {key!r}")
        messages.append({"role": message["role"], "content": message["content"]})
    if not messages or not messages[-1]["content"].strip():
        raise DataError(f"{where}: the chat prompt in column {key!r} is empty. Repair or remove the row.")
    return messages


def _answers(record: Record, settings: PromptSettings) -> list[str]:
    where, columns = record.where, record.columns
    key = settings.answer_key or _answer_key(record)
    value = require_column(columns, key, where, "data.answer_key", "the answer")
    references = [value] if isinstance(value, str) else value
    if not isinstance(references, list):
        raise DataError(f"{where}: {key!r} {wrong_text(value)}; an answer is a string or a list of strings.")
    if not references:
        raise DataError(f"{where}: {key!r} is an empty list. Every row needs an answer: repair or remove the row.")
    cure = "Every reference must be a text: repair or remove the row, or choose another column with data.answer_key."
    return [
        require_text(reference, f"{where}: answer {number} in column {key!r}", cure)
        for number, reference in enumerate(references)
    ]


def _answer_key(record: Record) -> str:
    """The one column of `ANSWER_KEYS` that is there."""
    found = [name for name in ANSWER_KEYS if name in record.columns]
    if len(found) == 1:
        return found[0]
    problem = f"several answer columns ({', '.join(found)})" if found else "no answer column"
    raise DataError(
        f"{record.where} has {problem}; without data.answer_key one of {', '.join(ANSWER_KEYS)} is read. The columns "
        f"are: {', '.join(record.columns) or '(none)'}. Name the one that holds the answer with data.answer_key."
    )


def _task(record: Record, settings: PromptSettings) -> str:
    # the usual column may be missing; one that was named may not, unless data.task stands in
    if settings.task_key != PromptSettings.task_key and not settings.task:
        require_column(record.columns, settings.task_key, record.where, "data.task_key", "the task")
    value = record.columns.get(settings.task_key)
    if value is None:
        return settings.task or ""
    if not isinstance(value, str):
        raise DataError(f"{record.where}: {settings.task_key!r} is {value!r}, not the name of a task (data.task_key).")
    return value


def _classes(record: Record) -> list[str]:
    value = record.columns.get(CLASSES_KEY)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise DataError(
            f"{record.where}: {CLASSES_KEY!r} must be a list of class names or null, not {str(value)[:80]}."
        )
    return list(value)


def _max_new_tokens(record: Record, settings: PromptSettings) -> int:
    value = record.columns.get(MAX_NEW_TOKENS_KEY)
    if value is None:
        return settings.max_new_tokens
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DataError(
            f"{record.where}: {MAX_NEW_TOKENS_KEY!r} is {value!r}; it must be an integer of at least 1, or null."
        )
    return value
