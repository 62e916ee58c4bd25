"""What a run will read."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from refine_verl.config import ConfigError
from refine_verl.data import DataSettings
from refine_verl.data.settings import split_key
from refine_verl.data.sources import DocumentSource, HubSource, StandardLibrarySource, resolve_sources
from refine_verl.data.windows import plan_windows

_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """The account of one split.

    Attributes:
        documents: documents or prompts.
        too_short: documents left out.
        tokens: in the sequences that are kept.
        sequences: what batches are made of.
        mean_length, longest: of the sequences, in tokens.
        estimated: from a sample, not counted.
        note: how the estimate was made.
    """

    documents: int
    too_short: int
    tokens: int
    sequences: int
    mean_length: float
    longest: int
    estimated: bool = False
    note: str = ""

    @classmethod
    def of_statistics(cls, statistics: Any) -> Reading:
        """From what `refine_verl.data` counted: `DataStatistics` or `PromptStatistics`."""
        if hasattr(statistics, "windows"):
            return cls(
                documents=statistics.documents,
                too_short=statistics.too_short,
                tokens=statistics.tokens_kept,
                sequences=statistics.windows,
                mean_length=statistics.mean_length,
                longest=statistics.max_length,
            )
        return cls(
            documents=statistics.rows,
            too_short=0,
            tokens=statistics.prompt_tokens + statistics.answer_tokens,
            sequences=statistics.rows,
            mean_length=(statistics.prompt_tokens + statistics.answer_tokens) / max(1, statistics.rows),
            longest=statistics.longest_prompt + statistics.longest_answer,
        )

    def at_most(self, sequences: int) -> Reading:
        """The account of so many sequences, of the same mean length; of all for a number below 1."""
        if not 0 < sequences < self.sequences:
            return self
        return dataclasses.replace(self, sequences=sequences, tokens=round(sequences * self.mean_length))


def sample_split(data: DataSettings, split: str, tokenizer: Any, minimum: int, count: int) -> Reading | None:
    """Tokenise the first ``count`` documents of each file and reckon the rest from the files' sizes.

    Args:
        data: what to read and how to cut it.
        split: `train` or `validation`.
        tokenizer: of the model.
        minimum: fewest tokens of a sequence.
        count: documents per file.

    Raises:
        DataError: files that cannot be read.
        ConfigError: the sample has no sequence.
    """
    if not data.files(split):
        return None
    sources = resolve_sources(data.files(split), key=split_key(split), default_split=split)
    totals = np.zeros(4)
    longest, compressed = 0, False
    for source in sources:
        texts = _first_texts(source, data.text_key, count)
        lengths = np.array([len(ids) + data.append_eos for ids in tokenizer(texts)["input_ids"]])
        plan = plan_windows(lengths, max_length=data.max_length, min_length=minimum, policy=data.long_documents)
        seen = plan.statistics
        factor = _times_more(source, texts, count)
        compressed |= source.name.endswith(_COMPRESSED) and factor > 1
        totals += factor * np.array([seen.documents, seen.too_short, seen.tokens_kept, seen.windows])
        longest = max(longest, seen.max_length)
    documents, too_short, tokens, sequences = (round(float(total)) for total in totals)
    if not sequences:
        raise ConfigError("sample", f"none of the sampled documents has {minimum} tokens. Sample more, or read all.")
    note = f"the first {count} documents of each of {len(sources)} files, the rest by size"
    if compressed:
        note += "; compressed text is taken for three times as large as its file"
    return Reading(
        documents=documents,
        too_short=too_short,
        tokens=tokens,
        sequences=sequences,
        mean_length=tokens / sequences,
        longest=longest,
        estimated=True,
        note=note,
    )


def _first_texts(source: DocumentSource, text_key: str, count: int) -> list[str]:
    texts = (text for batch in source.batches(text_key) for text in batch.column("text").to_pylist())
    return list(itertools.islice(texts, count))


def _times_more(source: DocumentSource, texts: Sequence[str], count: int) -> float:
    """How many times the sample the whole source is: by rows where they are known, else by bytes."""
    if len(texts) < count:
        return 1.0
    if isinstance(source, HubSource):
        return len(source.dataset) / len(texts)
    if isinstance(source, StandardLibrarySource):
        return len(source.files) / len(texts)
    if source.name.endswith(".parquet"):
        return float(pq.ParquetFile(Path(source.name)).metadata.num_rows / len(texts))
    size = source.size() * (3 if source.name.endswith(_COMPRESSED) else 1)
    return max(1.0, size / max(1, sum(len(text.encode()) for text in texts)))
