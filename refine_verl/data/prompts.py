"""Prompts with answers for post-training and test-time training: from file names to a directory of tokens.

The usual way::

    settings = PromptSettings.from_mapping(config.data)
    prepared = prepare_prompts(settings, "train", tokenizer)
    dataset = PromptDataset(prepared.path)
    batch = collate([dataset[0], dataset[1]])
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from refine_verl.config import DataError, PromptSettings
from refine_verl.config.data import split_key
from refine_verl.data.cache import cached_directory, default_cache_dir, make_key
from refine_verl.data.prepare import because, describe
from refine_verl.data.prompts_dataset import PromptDataset, VerlPromptDataset, collate, collate_columns
from refine_verl.data.prompts_read import PromptRow, read_prompts
from refine_verl.data.prompts_statistics import (
    PROMPT_STATISTICS_FILE,
    PromptStatistics,
    read_prompt_statistics,
)
from refine_verl.data.prompts_tokenize import check_tokenizer, encode_rows, render
from refine_verl.data.readers import place
from refine_verl.data.sources import DocumentSource, resolve_sources
from refine_verl.data.tokenize import (
    one_thread_each,
    progress_bars,
    save_dataset,
    suggest_processes,
    tokenizer_fingerprint,
)

__all__ = [
    "PreparedPrompts",
    "PromptDataset",
    "PromptSettings",
    "PromptStatistics",
    "VerlPromptDataset",
    "collate",
    "collate_columns",
    "prepare_prompts",
    "read_prompt_statistics",
]

logger = logging.getLogger(__name__)

# Part of every cache key: raise it when the directories' layout or meaning changes.
_FORMAT = 1
_BATCH_ROWS = 64
_TEXT_SCHEMA = pa.schema(
    [
        ("prompt", pa.large_string()),
        ("continuation", pa.large_string()),
        ("id", pa.string()),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("task", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("classes", pa.list_(pa.string())),
        ("max_new_tokens", pa.int64()),
        ("document_id", pa.int64()),
    ]
)
_FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "source": datasets.Value("string"),
        "row": datasets.Value("int64"),
        "task": datasets.Value("string"),
        "answers": datasets.Sequence(datasets.Value("string")),
        "classes": datasets.Sequence(datasets.Value("string")),
        "max_new_tokens": datasets.Value("int64"),
        "document_id": datasets.Value("int64"),
        "prompt_ids": datasets.Sequence(datasets.Value("int32")),
        "answer_ids": datasets.Sequence(datasets.Value("int32")),
        "length": datasets.Value("int64"),
        "answer_length": datasets.Value("int64"),
        "full_length": datasets.Value("int64"),
        "added": datasets.Value("int64"),
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedPrompts:
    """A directory of prompts and answers (see `prompts_dataset.PromptDataset`) and the account of it.

    Attributes:
        path: the directory; pass it to verl as `data.train_files` or `data.val_files`.
        statistics: what was read and cut.
        reused: whether the directory was there already.
    """

    path: Path
    statistics: PromptStatistics
    reused: bool


def prepare_prompts(
    settings: PromptSettings,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    minimum_prompt_length: int = 1,
    reason: str = "",
    minimum_sequences: int = 1,
    sequences_reason: str = "",
) -> PreparedPrompts:
    """Find, check and tokenise the prompts and answers of one split, or find them in the cache.

    Args:
        settings: files, columns, lengths and cache directory.
        split: `train` or `validation`.
        tokenizer: turns text into tokens. Prompts get the special tokens it puts in front of a text, answers
            end with its end-of-sequence token.
        minimum_prompt_length: fewest tokens of a prompt the caller can use.
        reason: why, as a clause for the messages ("refine.nsp.chunks=8 and refine.nsp.rollout_length=5 ...").
        minimum_sequences: fewest rows the caller can use (a batch, say).
        sequences_reason: why.

    Raises:
        DataError: no files, files that cannot be read, a row that cannot be used (its file and row are named), a
            prompt or answer that is too long, a prompt that is too short, too few rows. Nothing half-written is
            left in the cache directory.
    """
    key = split_key(split)
    check_tokenizer(tokenizer, settings)
    _check_limits(settings, minimum_prompt_length, reason)
    sources = resolve_sources(settings.files(split), key=key, default_split=split)
    cache = Path(settings.cache_dir).expanduser() if settings.cache_dir else default_cache_dir()

    def build(directory: Path) -> None:
        logger.info("%s: reading and tokenising %s", key, describe(sources))
        table = _tokenize(sources, tokenizer, settings, directory, key)
        _check_rows(table, settings)
        save_dataset(table, directory)
        statistics = dataclasses.asdict(_statistics(table))
        (directory / PROMPT_STATISTICS_FILE).write_text(json.dumps(statistics, indent=2) + "\n")

    path, reused = cached_directory(cache, f"prompts-{_cache_key(settings, sources, tokenizer)}", build)
    statistics = read_prompt_statistics(path)
    logger.info("%s: %s%s", key, statistics.summary(), f" (reused from {path})" if reused else "")
    if statistics.truncated:
        logger.warning(
            "%s: %d of %d prompts are longer than data.max_prompt_length=%s and were cut (data.overlong_prompts=%s)",
            key,
            statistics.truncated,
            statistics.rows,
            settings.max_prompt_length,
            settings.overlong_prompts,
        )
    _require_length(path, statistics, key, minimum_prompt_length, reason)
    if statistics.rows < minimum_sequences:
        raise DataError(
            f"{key} gives {statistics.rows} prompts, but at least {minimum_sequences} are needed"
            f"{because(sequences_reason)}. Give more rows."
        )
    return PreparedPrompts(path=path, statistics=statistics, reused=reused)


def document_id(name: str, occurrence: int = 0) -> int:
    """A number in 0 ... 2**63-1 for stateless sampling that depends on the row's name or text, not on its place."""
    digest = hashlib.sha256(f"{occurrence}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _cache_key(settings: PromptSettings, sources: Sequence[DocumentSource], tokenizer: PreTrainedTokenizerBase) -> str:
    left_out = {"train_files", "val_files", "cache_dir", "num_workers", "progress"}
    values = {key: value for key, value in dataclasses.asdict(settings).items() if key not in left_out}
    template = getattr(tokenizer, "chat_template", None) if settings.chat_template else None
    fingerprints = [source.fingerprint() for source in sources]
    return make_key([_FORMAT, values, template, tokenizer_fingerprint(tokenizer), fingerprints])


def _tokenize(
    sources: Sequence[DocumentSource],
    tokenizer: PreTrainedTokenizerBase,
    settings: PromptSettings,
    directory: Path,
    key: str,
) -> datasets.Dataset:
    texts = directory / "texts.arrow"
    rows = _write_texts(read_prompts(sources, settings), tokenizer, settings, texts)
    if not rows:
        raise DataError(f"{key}: {sources[0].name} holds no rows at all. Give a file with prompts and answers.")
    processes = settings.num_workers or suggest_processes(texts.stat().st_size)
    with progress_bars(settings.progress), one_thread_each(processes):
        return datasets.Dataset.from_file(str(texts)).map(
            encode_rows,
            fn_kwargs={
                "tokenizer": tokenizer,
                "special_tokens": not settings.chat_template,
                "limit": settings.max_prompt_length,
                "policy": settings.overlong_prompts,
            },
            batched=True,
            batch_size=_BATCH_ROWS,
            writer_batch_size=_BATCH_ROWS,
            num_proc=min(processes, rows) if processes > 1 else None,
            remove_columns=["prompt", "continuation"],
            features=_FEATURES,
            cache_file_name=str(directory / "tokens.arrow"),
            load_from_cache_file=False,
            new_fingerprint="prompts",
            desc="tokenising",
        )


def _write_texts(
    rows: Iterable[PromptRow], tokenizer: PreTrainedTokenizerBase, settings: PromptSettings, path: Path
) -> int:
    """Write the rendered rows to an Arrow stream of `_TEXT_SCHEMA`; returns how many there were."""
    count = 0
    pending: list[dict[str, Any]] = []
    occurrences: Counter[str] = Counter()
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _TEXT_SCHEMA) as writer:
        for row in rows:
            prompt, continuation = render(row.prompt, row.answers[0], row.where, tokenizer, settings)
            name = prompt if settings.id_key is None else row.id
            values = {field: getattr(row, field) for field in _TEXT_SCHEMA.names if hasattr(row, field)}
            values.update(prompt=prompt, continuation=continuation, document_id=document_id(name, occurrences[name]))
            occurrences[name] += 1
            pending.append(values)
            count += 1
            if len(pending) == _BATCH_ROWS:
                writer.write_batch(pa.RecordBatch.from_pylist(pending, _TEXT_SCHEMA))
                pending = []
        if pending:
            writer.write_batch(pa.RecordBatch.from_pylist(pending, _TEXT_SCHEMA))
    return count


def _check_limits(settings: PromptSettings, minimum: int, reason: str) -> None:
    if settings.max_prompt_length is not None and settings.max_prompt_length < minimum:
        raise DataError(
            f"data.max_prompt_length={settings.max_prompt_length} is too short: prompts need at least {minimum} "
            f"tokens{because(reason)}. Raise data.max_prompt_length to {minimum} or more."
        )


def _column(table: datasets.Dataset, name: str) -> np.ndarray:
    return table.with_format("arrow").select_columns([name])[:].column(0).to_numpy()


def place_of(table: datasets.Dataset, index: int) -> str:
    """File and row (or line) of a prepared row, as messages name them."""
    row = table.select_columns(["source", "row"])[int(index)]
    return f"{row['source']}, {place(row['row'], 'line' if '.jsonl' in row['source'].lower()[-11:] else 'row')}"


def _check_rows(table: datasets.Dataset, settings: PromptSettings) -> None:
    lengths, limit = _column(table, "full_length"), settings.max_prompt_length
    if not lengths.all():
        raise DataError(f"{place_of(table, int(np.argmin(lengths)))}: the tokenizer makes no tokens of this prompt.")
    if limit is not None and limit <= (added := int(_column(table, "added").max())):
        raise DataError(
            f"data.max_prompt_length={limit} leaves no room for a prompt behind the {added} special tokens that the "
            "tokenizer puts in front. Raise it."
        )
    if limit is not None and settings.overlong_prompts == "error" and (lengths > limit).any():
        first, many = int(np.argmax(lengths > limit)), int((lengths > limit).sum())
        raise DataError(
            f"{place_of(table, first)}: the prompt has {lengths[first]} tokens, more than "
            f"data.max_prompt_length={limit} ({many} of {len(lengths)} prompts are too long, the longest has "
            f"{lengths.max()}). Raise the limit, remove the rows, or cut them with "
            "data.overlong_prompts=middle (or left, right)."
        )
    answers, limit = _column(table, "answer_length"), settings.max_answer_length
    if limit is not None and (answers > limit).any():
        first, many = int(np.argmax(answers > limit)), int((answers > limit).sum())
        raise DataError(
            f"{place_of(table, first)}: the answer has {answers[first]} tokens with its end of sequence, more than "
            f"data.max_answer_length={limit} ({many} of {len(answers)} answers are too long, the longest has "
            f"{answers.max()}). Raise the limit or remove the rows."
        )


def _require_length(path: Path, statistics: PromptStatistics, key: str, minimum: int, reason: str) -> None:
    if statistics.shortest_prompt >= minimum:
        return
    table = datasets.load_from_disk(str(path))
    lengths = _column(table, "length")
    first, many = int(np.argmax(lengths < minimum)), int((lengths < minimum).sum())
    raise DataError(
        f"{key}: {place_of(table, first)}: the prompt has {lengths[first]} tokens, but at least {minimum} are needed"
        f"{because(reason)} ({many} of {len(lengths)} prompts are too short). Remove the rows, or lower what asks "
        "for the length."
    )


def _statistics(table: datasets.Dataset) -> PromptStatistics:
    lengths, full, answers = (_column(table, name) for name in ("length", "full_length", "answer_length"))
    tasks = Counter(table.with_format("arrow").select_columns(["task"])[:].column(0).to_pylist())
    return PromptStatistics(
        rows=len(table),
        truncated=int((full > lengths).sum()),
        tokens_dropped=int((full - lengths).sum()),
        prompt_tokens=int(lengths.sum()),
        answer_tokens=int(answers.sum()),
        shortest_prompt=int(lengths.min()),
        longest_prompt=int(lengths.max()),
        longest_answer=int(answers.max()),
        tasks=dict(sorted(tasks.items())),
    )
