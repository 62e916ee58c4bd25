"""One call from file names to a directory of token sequences, made before Ray starts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Generic

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from refine_verl.config import DataError, DataSettings, FileSettings, PromptSettings, split_key
from refine_verl.data.cache import cached_directory, default_cache_dir, make_key
from refine_verl.data.prompts_read import read_prompts
from refine_verl.data.sources import DocumentSource, iterate_documents, iterate_texts, split_sources
from refine_verl.data.statistics import DataStatistics, S
from refine_verl.data.tokenize import (
    TEXT_SCHEMA,
    TOKEN_FEATURES,
    column,
    cut_sequences,
    encode_documents,
    save_dataset,
    tokenize_rows,
    tokenizer_fingerprint,
)
from refine_verl.data.windows import plan_windows

logger = logging.getLogger(__name__)

# Part of every cache key: raise it when the directories' layout or meaning changes.
_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared(Generic[S]):
    """A directory of sequences or prompts (see `dataset.DocumentDataset`) and the account of how it came about.

    Attributes:
        path: the directory; pass it to verl as `data.train_files` or `data.val_files`.
        statistics: what was read, cut and left out.
        reused: whether the directory was there already.
    """

    path: Path
    statistics: S
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
) -> Prepared[DataStatistics]:
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
    require_room("data.max_length", settings.max_length, "sequences", minimum_length, reason)
    minimum = max(settings.min_length, minimum_length)
    why = because(reason) if minimum_length >= settings.min_length else f" (data.min_length={minimum})"
    sources = split_sources(settings, split)
    fingerprints = [source.fingerprint() for source in sources]
    content = [_FORMAT, settings.text_key, settings.append_eos, tokenizer_fingerprint(tokenizer), fingerprints]
    tokens_name = f"tokens-{make_key(content)}"
    cutting = [settings.max_length, minimum, settings.long_documents]
    build_tokens = partial(_build_tokens, settings, sources, tokenizer, key)

    def build_sequences(directory: Path) -> DataStatistics:
        tokens, _ = cached_directory(cache_of(settings), tokens_name, build_tokens)
        return _build_sequences(settings, datasets.load_from_disk(str(tokens)), minimum, f"{key}: all", why, directory)

    name = f"sequences-{make_key([tokens_name, cutting])}"
    prepared = prepare_directory(settings, key, name, build_sequences, DataStatistics)
    too_short = f" ({prepared.statistics.too_short} documents were too short). Give more documents."
    require_enough(key, prepared.statistics.windows, "sequences", minimum_sequences, sequences_reason, too_short)
    return prepared


def prepare_directory(
    settings: FileSettings, key: str, name: str, build: Callable[[Path], S], kind: type[S]
) -> Prepared[S]:
    """Build a directory in the cache, or find it there; the log says what is in it.

    `name` depends on everything that the content depends on. `build` fills the directory and returns the account, which
    is kept in it.
    """
    path, reused = cached_directory(cache_of(settings), name, lambda directory: build(directory).save(directory))
    statistics = kind.load(path)
    logger.info("%s: %s%s", key, statistics.summary(), f" (reused from {path})" if reused else "")
    return Prepared(path=path, statistics=statistics, reused=reused)


def iterate_split_texts(
    settings: DataSettings | PromptSettings, split: str, limit_characters: int | None = None
) -> Iterator[str]:
    """The texts of a split in order (of prompts, the prompts), to train a tokenizer on; stops after `limit_characters`.

    Raises:
        DataError: as `prepare` and `prompts.prepare_prompts`, of the rows that are read.
    """
    sources = split_sources(settings, split)
    texts: Iterator[str] = (
        iterate_texts(sources, settings.text_key)
        if isinstance(settings, DataSettings)
        else (text for row in read_prompts(sources, settings) for text in row.texts)
    )
    seen = 0
    for text in texts:
        yield text
        seen += len(text)
        if limit_characters is not None and seen >= limit_characters:
            logger.info("%s: stopped after %d characters of text", split_key(split), seen)
            return


def cache_of(settings: FileSettings) -> Path:
    """Where prepared directories are kept."""
    return Path(settings.cache_dir).expanduser() if settings.cache_dir else default_cache_dir()


def require_room(key: str, limit: int | None, what: str, minimum: int, reason: str) -> None:
    """Refuse a limit on lengths that is below the length needed."""
    if limit is not None and limit < minimum:
        raise DataError(
            f"{key}={limit} is too short: {what} need at least {minimum} tokens{because(reason)}. Raise {key} to "
            f"{minimum} or more."
        )


def require_enough(key: str, found: int, what: str, needed: int, reason: str, cure: str) -> None:
    """Refuse a split that gives fewer sequences, or prompts, than needed."""
    if found < needed:
        raise DataError(f"{key} gives {found} {what}, but at least {needed} are needed{because(reason)}{cure}")


def because(reason: str) -> str:
    """A reason as a clause for a message, empty for none."""
    return f" because {reason}" if reason else ""


def say_reading(key: str, sources: Sequence[DocumentSource]) -> None:
    """Log the first few sources by name."""
    names = ", ".join(source.name for source in sources[:3])
    more = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
    logger.info("%s: reading and tokenising %s%s", key, names, more)


def _build_tokens(
    settings: DataSettings,
    sources: Sequence[DocumentSource],
    tokenizer: PreTrainedTokenizerBase,
    key: str,
    directory: Path,
) -> None:
    say_reading(key, sources)
    if settings.append_eos and tokenizer.eos_token_id is None:
        raise DataError("data.append_eos=true, but the tokenizer has no end-of-sequence token; set it to false.")
    tokens = tokenize_rows(
        iterate_documents(sources, settings.text_key),
        TEXT_SCHEMA,
        partial(encode_documents, tokenizer=tokenizer, eos=tokenizer.eos_token_id if settings.append_eos else None),
        TOKEN_FEATURES,
        directory,
        settings,
        nothing=f"{sources[0].name} holds no documents at all: there is nothing to tokenise.",
    )
    save_dataset(tokens, directory)


def _build_sequences(
    settings: DataSettings, tokens: datasets.Dataset, minimum: int, all_of: str, why: str, directory: Path
) -> DataStatistics:
    lengths = column(tokens, "length")
    policy = settings.long_documents
    plan = plan_windows(lengths, max_length=settings.max_length, min_length=minimum, policy=policy)
    if not plan.statistics.windows:
        row = tokens[int(np.argmax(lengths))]
        raise DataError(
            f"{all_of} {len(tokens)} documents are too short. They must have at least {minimum} tokens{why}; "
            f"the longest has {row['length']} ({row['source']}, row {row['row']}). Give longer documents, "
            "or lower what asks for the length."
        )
    cut_sequences(tokens, plan, directory)
    return plan.statistics
