"""LongBench's English tasks (Bai et al. 2024) as prompts: official files in, one parquet file per task out."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from refine_verl.command.show import progress_bar, show_table, spread, typed
from refine_verl.config import DataError, require_choice
from refine_verl.data.cache import make_key
from refine_verl.data.prompts_tokenize import encode_continuations, encode_prompts
from refine_verl.data.sources import DocumentSource, FileSource, resolve_sources
from refine_verl.data.tokenize import tokenizer_fingerprint
from refine_verl.data.tokenizers import load_finished_tokenizer
from refine_verl.prepare.output import Output, write_table
from refine_verl.prepare.settings import LongBenchSettings


@dataclasses.dataclass(frozen=True)
class Task:
    """A task's published prompt, with `{context}` and `{input}`, and the most tokens of an answer.

    No prompt ends with a line end, as in lm-evaluation-harness and in the files of REFINE's authors (LongBench's own
    code prompts do).
    """

    template: str
    max_gen_tokens: int

    def prompt(self, context: str, question: str) -> str:
        """The prompt with both filled in. Not by str.format: code and articles are full of braces."""
        texts = {"{context}": context, "{input}": question}
        return "".join(texts.get(part, part) for part in re.split(r"(\{context\}|\{input\})", self.template))


TASKS: dict[str, Task] = {
    name: Task(entry["prompt"], entry["max_gen_tokens"])
    for name, entry in json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8")).items()
}
"""The published prompts, in `longbench.json` as they are spelt there: misprints are part of the benchmark."""
DEFAULT_TASKS = tuple(name for name in TASKS if name not in ("musique", "gov_report"))
"""The twelve of the paper, which leaves out two that have few samples below 16,384 tokens."""

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("prompt_length", pa.int64()),
        ("max_answer_length", pa.int64()),
        ("total_length", pa.int64()),
        ("max_gen_tokens", pa.int64()),
        ("task", pa.string()),
        ("all_classes", pa.list_(pa.string())),
    ]
)
_BATCH_ROWS = 16


def run(settings: LongBenchSettings) -> None:
    """Write one file per task, and show how many samples it kept.

    Raises:
        DataError: bad arguments, a task whose file is missing, or a record without the official columns.
    """
    tasks = dict.fromkeys(settings.tasks or DEFAULT_TASKS)
    for task in tasks:
        require_choice("tasks", task, TASKS, kind="task")
    tokenizer = load_finished_tokenizer(settings.tokenizer) if settings.tokenizer else None
    sources = {task: _find(settings.input, task) for task in tasks}
    arguments = {
        "length": settings.length,
        "templates": make_key([dataclasses.astuple(task) for task in TASKS.values()]),
        "tokenizer": tokenizer_fingerprint(tokenizer) if tokenizer else None,
    }
    rows = []
    with Output(Path(settings.out).expanduser(), "prepare longbench", arguments) as output:
        for task, source in sources.items():
            name = f"{task}.parquet"
            entry = output.finished(name)
            if entry is not None and entry["source"] != make_key(source.fingerprint()):
                raise DataError(
                    f"--out {settings.out} holds {name} made from another input than {source.name}. Give another "
                    f"directory, or delete this one."
                )
            if entry is None:
                entry = _write_task(output, name, task, source, tokenizer, settings)
            rows.append((task, entry["rows"], len(entry["lengths"]), *spread(list(filter(None, entry["lengths"])))))
    notes = [
        "Tokens are those of prompt and longest reference, with " + settings.tokenizer + "."
        if settings.tokenizer
        else "No tokenizer given: lengths are not counted, nothing is left out.",
        f"Use: {typed('data.val_files', settings.out)} data.id_key=id",
    ]
    show_table("LongBench", ["task", "samples", "kept", "tokens: least", "mean", "most"], rows, notes)


def make_row(task: str, record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """An official record as a row of `SCHEMA`, lengths not filled in.

    Raises:
        DataError: a column is missing or of the wrong type, or there is no answer.
    """
    for column, kind in (("context", str), ("input", str), ("answers", list)):
        if not isinstance(record.get(column), kind):
            found = f"a {type(record[column]).__name__}" if column in record else "missing"
            raise DataError(
                f"{where}: column {column!r} is {found}, not a {kind.__name__}. LongBench's records "
                f"have context, input, answers, all_classes and _id; found: {', '.join(record)}."
            )
    answers = record["answers"]
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise DataError(f"{where}: 'answers' holds {str(answers)[:80]}; it must be a list of at least one text.")
    fixed = TASKS[task]
    return {
        "id": f"{task}:{record.get('_id') or where.rpartition(' ')[2]}",
        "prompt": fixed.prompt(record["context"], record["input"]),
        "answers": list(answers),
        "max_gen_tokens": fixed.max_gen_tokens,
        "task": task,
        "all_classes": list(record.get("all_classes") or []) or None,
    }


def _find(name: str, task: str) -> DocumentSource:
    path = Path(name).expanduser()
    if not path.exists():  # a hub id, perhaps
        return resolve_sources([f"{name}:{task}:test"], key="--input", default_split="test")[0]
    if path.is_file():
        raise DataError(f"--input {path} is a file; give the directory that holds {task}.jsonl and the others.")
    for suffix in (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet"):
        found = path / f"{task}{suffix}"
        if found.is_file():
            return FileSource(found)
    there = sorted(item.name for item in path.iterdir())
    raise DataError(
        f"--input {path} holds no {task}.jsonl (or .jsonl.zst, .jsonl.gz, .parquet); it holds: "
        f"{', '.join(there[:8]) or 'nothing'}"
        f"{' ...' * (len(there) > 8)}. Name the tasks you have with --tasks."
    )


def _write_task(
    output: Output,
    name: str,
    task: str,
    source: DocumentSource,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: LongBenchSettings,
) -> dict[str, Any]:
    rows = [make_row(task, record.columns, record.where) for record in source.records()]
    if not rows:
        raise DataError(f"{source.name} holds no records.")
    kept = []
    with progress_bar(task, len(rows)) as step:
        for start in range(0, len(rows), _BATCH_ROWS):
            batch = rows[start : start + _BATCH_ROWS]
            if tokenizer is not None:
                _count(tokenizer, batch)
            kept += [row for row in batch if settings.length is None or row["total_length"] <= settings.length]
            step(len(batch))
    entry = {
        "rows": len(rows),
        "lengths": [row.get("total_length") for row in kept],
        "source": make_key(source.fingerprint()),
    }
    write_table(output, name, pa.Table.from_pylist(kept, SCHEMA), entry)
    return entry


def _count(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> None:
    """Fill in the lengths, counted the way `prepare_prompts` makes tokens."""
    prompts, _ = encode_prompts(tokenizer, [row["prompt"] for row in rows], special_tokens=True)
    for row, ids in zip(rows, prompts, strict=True):
        space = "" if row["prompt"][-1].isspace() else " "
        texts = [answer if answer[0].isspace() else space + answer for answer in row["answers"]]
        longest = max(map(len, encode_continuations(tokenizer, texts)))
        row.update(prompt_length=len(ids), max_answer_length=longest, total_length=len(ids) + longest)
