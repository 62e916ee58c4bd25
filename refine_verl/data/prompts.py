"""Prompts with answers for post-training and test-time training: from file names to a directory of tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from refine_verl.config import DataError, PromptSettings, split_key
from refine_verl.data.cache import make_key
from refine_verl.data.prepare import Prepared, because, prepare_directory, require_enough, require_room, say_reading
from refine_verl.data.prompts_dataset import PromptDataset, collate
from refine_verl.data.prompts_read import PromptRow, read_prompts
from refine_verl.data.prompts_tokenize import check_tokenizer, encode_rows, render
from refine_verl.data.readers import place
from refine_verl.data.sources import DocumentSource, split_sources
from refine_verl.data.statistics import PromptStatistics
from refine_verl.data.tokenize import column, save_dataset, tokenize_rows, tokenizer_fingerprint

__all__ = ["PromptDataset", "PromptSettings", "collate", "prepare_prompts"]

logger = logging.getLogger(__name__)

# Part of every cache key: raise it when the directories' layout or meaning changes.
_FORMAT = 1
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
        **datasets.Features.from_arrow_schema(pa.schema(list(_TEXT_SCHEMA)[2:])),  # all but the texts
        **{name: datasets.Sequence(datasets.Value("int32")) for name in ("prompt_ids", "answer_ids")},
        **{name: datasets.Value("int64") for name in ("length", "answer_length", "full_length", "added")},
    }
)


def prepare_prompts(
    settings: PromptSettings,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    minimum_prompt_length: int = 1,
    reason: str = "",
    minimum_sequences: int = 1,
    sequences_reason: str = "",
) -> Prepared[PromptStatistics]:
    """Find, check and tokenise the prompts and answers of one split, or find them in the cache.

    Prompts get the special tokens that the tokenizer puts in front of a text, answers end with its end-of-sequence
    token. Arguments are those of `prepare.prepare`.

    Raises:
        DataError: no files, files that cannot be read, a row that cannot be used (its file and row are named), a
            prompt or answer that is too long, a prompt that is too short, too few rows. Nothing half-written is
            left in the cache directory.
    """
    key = split_key(split)
    check_tokenizer(tokenizer, settings)
    require_room("data.max_prompt_length", settings.max_prompt_length, "prompts", minimum_prompt_length, reason)
    sources = split_sources(settings, split)
    left_out = {"train_files", "val_files", "cache_dir", "num_workers", "progress"}
    if not settings.apply_chat_template_kwargs:  # what was prepared before there was this key keeps its name
        left_out.add("apply_chat_template_kwargs")
    values = {field: value for field, value in dataclasses.asdict(settings).items() if field not in left_out}
    template = getattr(tokenizer, "chat_template", None) if settings.chat_template else None
    fingerprints = [source.fingerprint() for source in sources]
    name = f"prompts-{make_key([_FORMAT, values, template, tokenizer_fingerprint(tokenizer), fingerprints])}"
    build = partial(_build, settings, sources, tokenizer, key)
    prepared = prepare_directory(settings, key, name, build, PromptStatistics)
    statistics = prepared.statistics
    if statistics.truncated:
        logger.warning(
            "%s: %d of %d prompts are longer than data.max_prompt_length=%s and were cut (data.overlong_prompts=%s)",
            key,
            statistics.truncated,
            statistics.rows,
            settings.max_prompt_length,
            settings.overlong_prompts,
        )
    _require_length(prepared, key, minimum_prompt_length, reason)
    require_enough(key, statistics.rows, "prompts", minimum_sequences, sequences_reason, ". Give more rows.")
    return prepared


def document_id(name: str, occurrence: int = 0) -> int:
    """A number in 0 ... 2**63-1 for stateless sampling that depends on the row's name or text, not on its place."""
    digest = hashlib.sha256(f"{occurrence}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _build(
    settings: PromptSettings,
    sources: Sequence[DocumentSource],
    tokenizer: PreTrainedTokenizerBase,
    key: str,
    directory: Path,
) -> PromptStatistics:
    say_reading(key, sources)
    table = tokenize_rows(
        _rendered(read_prompts(sources, settings), tokenizer, settings),
        _TEXT_SCHEMA,
        partial(
            encode_rows,
            tokenizer=tokenizer,
            special_tokens=not settings.chat_template,
            limit=settings.max_prompt_length,
            policy=settings.overlong_prompts,
        ),
        _FEATURES,
        directory,
        settings,
        nothing=f"{key}: {sources[0].name} holds no rows at all. Give a file with prompts and answers.",
    )
    _check_rows(table, settings)
    save_dataset(table, directory)
    return _statistics(table)


def _rendered(
    rows: Iterable[PromptRow], tokenizer: PreTrainedTokenizerBase, settings: PromptSettings
) -> Iterator[dict[str, Any]]:
    """Rows of `_TEXT_SCHEMA`."""
    occurrences: Counter[str] = Counter()
    for row in rows:
        prompt, continuation = render(row.prompt, row.answers[0], row.where, tokenizer, settings)
        name = prompt if settings.id_key is None else row.id
        number = document_id(name, occurrences[name])
        occurrences[name] += 1
        yield {**vars(row), "prompt": prompt, "continuation": continuation, "document_id": number}


def place_of(table: datasets.Dataset, index: int) -> str:
    """File and row (or line) of a prepared row, as messages name them."""
    row = table.select_columns(["source", "row"])[int(index)]
    return f"{row['source']}, {place(row['row'], 'line' if '.jsonl' in row['source'].lower()[-11:] else 'row')}"


def _check_rows(table: datasets.Dataset, settings: PromptSettings) -> None:
    lengths, limit = column(table, "full_length"), settings.max_prompt_length
    if not lengths.all():
        raise DataError(f"{place_of(table, int(np.argmin(lengths)))}: the tokenizer makes no tokens of this prompt.")
    if limit is not None and limit <= (added := int(column(table, "added").max())):
        raise DataError(
            f"data.max_prompt_length={limit} leaves no room for a prompt behind the {added} special tokens that the "
            "tokenizer puts in front. Raise it."
        )
    if limit is not None and settings.overlong_prompts == "error":
        cure = "Raise the limit, remove the rows, or cut them with data.overlong_prompts=middle (or left, right)."
        _refuse_longer(table, lengths, limit, "prompt", f"tokens, more than data.max_prompt_length={limit}", cure)
    if settings.max_answer_length is not None:
        limit = settings.max_answer_length
        more = f"tokens with its end of sequence, more than data.max_answer_length={limit}"
        cure = "Raise the limit or remove the rows."
        _refuse_longer(table, column(table, "answer_length"), limit, "answer", more, cure)


def _refuse_longer(table: datasets.Dataset, lengths: np.ndarray, limit: int, what: str, more: str, cure: str) -> None:
    if not (lengths > limit).any():
        return
    first, many = int(np.argmax(lengths > limit)), int((lengths > limit).sum())
    raise DataError(
        f"{place_of(table, first)}: the {what} has {lengths[first]} {more} ({many} of {len(lengths)} {what}s are too "
        f"long, the longest has {lengths.max()}). {cure}"
    )


def _require_length(prepared: Prepared[PromptStatistics], key: str, minimum: int, reason: str) -> None:
    if prepared.statistics.shortest_prompt >= minimum:
        return
    table = datasets.load_from_disk(str(prepared.path))
    lengths = column(table, "length")
    first, many = int(np.argmax(lengths < minimum)), int((lengths < minimum).sum())
    raise DataError(
        f"{key}: {place_of(table, first)}: the prompt has {lengths[first]} tokens, but at least {minimum} are needed"
        f"{because(reason)} ({many} of {len(lengths)} prompts are too short). Remove the rows, or lower what asks "
        "for the length."
    )


def _statistics(table: datasets.Dataset) -> PromptStatistics:
    lengths, full, answers = (column(table, name) for name in ("length", "full_length", "answer_length"))
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
