"""One call from file names to a directory of token sequences, made before Ray starts."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from refine_verl.config import DataError, DataSettings
from refine_verl.config.data import split_key
from refine_verl.data.cache import cached_directory, default_cache_dir, make_key
from refine_verl.data.sources import DocumentSource, iterate_texts, resolve_sources
from refine_verl.data.tokenize import cut_sequences, document_lengths, tokenize_sources, tokenizer_fingerprint
from refine_verl.data.windows import DataStatistics, WindowPlan, plan_windows

logger = logging.getLogger(__name__)

STATISTICS_FILE = "statistics.json"
# Part of every cache key: raise it when the directories' layout or meaning changes.
_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedData:
    """A directory of sequences (see `dataset.DocumentDataset`) and the account of how it came about.

    Attributes:
        path: the directory; pass it to verl as `data.train_files` or `data.val_files`.
        statistics: what was kept and left out.
        reused: whether the directory was there already.
    """

    path: Path
    statistics: DataStatistics
    reused: bool


def prepare(
    settings: DataSettings,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    minimum_length: int = 1,
    reason: str = "",
    *,
    minimum_sequences: int = 1,
    sequences_reason: str = "",
) -> PreparedData:
    """Find, check, tokenise and cut the documents of one split, or find them in the cache.

    Args:
        settings: files, column, lengths and cache directory.
        split: `train` or `validation`.
        tokenizer: turns text into tokens, with its own defaults for special tokens.
        minimum_length: fewest tokens the caller can use; the larger of this and `settings.min_length` counts.
        reason: why, as a clause for the messages ("refine.nsp.chunks=8 and refine.nsp.rollout_length=5 ...").
        minimum_sequences: fewest sequences the caller can use (a batch, say).
        sequences_reason: why.

    Raises:
        DataError: no files, files that cannot be read, rows without text, no document that is long enough,
            or too few sequences. Nothing half-written is left in the cache directory; documents that were
            tokenised before they turned out to be too few or too short stay there for the next attempt.
    """
    key = split_key(split)
    _check_lengths(settings, minimum_length, reason)
    minimum = max(settings.min_length, minimum_length)
    sources = resolve_sources(settings.files(split), key=key, default_split=split)
    cache = Path(settings.cache_dir).expanduser() if settings.cache_dir else default_cache_dir()
    fingerprints = [source.fingerprint() for source in sources]
    content = [
        _FORMAT,
        settings.text_key,
        settings.append_eos,
        tokenizer_fingerprint(tokenizer),
        fingerprints,
    ]
    tokens_name = f"tokens-{make_key(content)}"
    cutting = [settings.max_length, minimum, settings.long_documents]

    def build_tokens(directory: Path) -> None:
        logger.info("%s: reading and tokenising %s", key, describe(sources))
        tokenize_sources(
            sources,
            tokenizer,
            directory,
            text_key=settings.text_key,
            append_eos=settings.append_eos,
            num_workers=settings.num_workers,
            progress=settings.progress,
        )

    def build_sequences(directory: Path) -> None:
        tokens = datasets.load_from_disk(str(cached_directory(cache, tokens_name, build_tokens)[0]))
        plan = plan_windows(
            document_lengths(tokens),
            max_length=settings.max_length,
            min_length=minimum,
            policy=settings.long_documents,
        )
        _require_sequences(plan, tokens, key, minimum, settings, minimum_length, reason)
        cut_sequences(tokens, plan, directory)
        (directory / STATISTICS_FILE).write_text(json.dumps(dataclasses.asdict(plan.statistics), indent=2) + "\n")

    name = f"sequences-{make_key([tokens_name, cutting])}"
    path, reused = cached_directory(cache, name, build_sequences)
    statistics = read_statistics(path)
    logger.info("%s: %s%s", key, statistics.summary(), f" (reused from {path})" if reused else "")
    _require_enough(statistics, key, minimum_sequences, sequences_reason)
    return PreparedData(path=path, statistics=statistics, reused=reused)


def read_statistics(path: Path) -> DataStatistics:
    """The account kept in a prepared directory.

    Raises:
        DataError: `path` is not a directory made by `prepare`.
    """
    try:
        values: dict[str, Any] = json.loads((path / STATISTICS_FILE).read_text())
        return DataStatistics(**values)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is not a directory of prepared documents ({error}); delete it and retry.") from error


def iterate_split_texts(settings: DataSettings, split: str, limit_characters: int | None = None) -> Iterator[str]:
    """The texts of a split in document order, to train a tokenizer on; stops after `limit_characters`."""
    sources = resolve_sources(settings.files(split), key=split_key(split), default_split=split)
    seen = 0
    for text in iterate_texts(sources, settings.text_key):
        yield text
        seen += len(text)
        if limit_characters is not None and seen >= limit_characters:
            logger.info("%s: stopped after %d characters of text", split_key(split), seen)
            return


def _check_lengths(settings: DataSettings, minimum_length: int, reason: str) -> None:
    if settings.max_length is not None and settings.max_length < minimum_length:
        raise DataError(
            f"data.max_length={settings.max_length} is too short: sequences need at least {minimum_length} "
            f"tokens{because(reason)}. Raise data.max_length to {minimum_length} or more."
        )


def _require_sequences(
    plan: WindowPlan,
    tokens: datasets.Dataset,
    key: str,
    minimum: int,
    settings: DataSettings,
    minimum_length: int,
    reason: str,
) -> None:
    if plan.statistics.windows:
        return
    longest = int(np.argmax(document_lengths(tokens)))
    row = tokens[longest]
    why = because(reason) if minimum_length >= settings.min_length else f" (data.min_length={minimum})"
    raise DataError(
        f"{key}: all {len(tokens)} documents are too short. They must have at least {minimum} tokens{why}; "
        f"the longest has {row['length']} ({row['source']}, row {row['row']}). Give longer documents, "
        "or lower what asks for the length."
    )


def _require_enough(statistics: DataStatistics, key: str, needed: int, reason: str) -> None:
    if statistics.windows < needed:
        raise DataError(
            f"{key} gives {statistics.windows} sequences, but at least {needed} are needed{because(reason)} "
            f"({statistics.too_short} documents were too short). Give more documents."
        )


def because(reason: str) -> str:
    """A reason as a clause for a message, empty for none."""
    return f" because {reason}" if reason else ""


def describe(sources: list[DocumentSource]) -> str:
    """The first few sources by name."""
    names = ", ".join(source.name for source in sources[:3])
    return names if len(sources) <= 3 else f"{names} and {len(sources) - 3} more"
