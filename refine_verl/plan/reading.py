"""What a run will read."""

from __future__ import annotations

import dataclasses
import io
import itertools
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from refine_verl.config import ConfigError, DataSettings
from refine_verl.data.readers import COMPRESSIONS, file_format, reading
from refine_verl.data.sources import (
    DocumentSource,
    FileSource,
    HubSource,
    StandardLibrarySource,
    iterate_texts,
    split_sources,
)
from refine_verl.data.windows import plan_windows

_CHUNK = 1 << 16
_RATIO_FROM = 8 << 20
"""Compressed bytes that show how far a file is compressed; a smaller file is decompressed whole. Arrow reads ahead of
what it hands out by one chunk, so that fewer would show less."""


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
    """Tokenise the first ``count`` documents of each file and reckon up the rest by rows, or by bytes of lines.

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
    sources = split_sources(data, split)
    totals = np.zeros(4)
    longest = 0
    for source in sources:
        texts = list(itertools.islice(iterate_texts([source], data.text_key), count))
        lengths = np.array([len(ids) + data.append_eos for ids in tokenizer(texts)["input_ids"]])
        plan = plan_windows(lengths, max_length=data.max_length, min_length=minimum, policy=data.long_documents)
        seen = plan.statistics
        factor = _times_more(source, len(texts), count)
        totals += factor * np.array([seen.documents, seen.too_short, seen.tokens_kept, seen.windows])
        longest = max(longest, seen.max_length)
    documents, too_short, tokens, sequences = (round(float(total)) for total in totals)
    if not sequences:
        raise ConfigError("sample", f"none of the sampled documents has {minimum} tokens. Sample more, or read all.")
    note = f"the first {count} documents of each of {len(sources)} files, the rest by rows, or by bytes of lines"
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


def _times_more(source: DocumentSource, sampled: int, count: int) -> float:
    """How many times the ``sampled`` documents the whole source is: by rows where they are known, else by bytes."""
    if sampled < count:
        return 1.0
    if isinstance(source, HubSource):
        return len(source.dataset) / sampled
    if isinstance(source, StandardLibrarySource):
        return len(source.files) / sampled
    assert isinstance(source, FileSource)
    suffix = file_format(source.path)
    if suffix == ".parquet":
        return float(pq.ParquetFile(source.path).metadata.num_rows / sampled)
    if suffix == ".txt":
        return 1.0  # one document
    return _lines_more(source.path, sampled, COMPRESSIONS.get(source.path.suffix.lower()))


def _lines_more(path: Path, sampled: int, compression: str | None) -> float:
    """A json lines file in bytes by the bytes of its first ``sampled`` lines: with all columns and escapes."""
    size = path.stat().st_size
    with ExitStack() as stack:
        stack.enter_context(reading(str(path), f"{compression}-compressed file" if compression else "file"))
        file = stack.enter_context(pa.OSFile(str(path)))
        stream = stack.enter_context(pa.CompressedInputStream(file, compression)) if compression else file
        lines = stack.enter_context(io.BufferedReader(stream, _CHUNK))
        documents = (line for line in lines if line.strip())
        sampled_bytes = sum(map(len, itertools.islice(documents, sampled)))
        return (_text_bytes(lines, sampled_bytes, file, size) if compression else size) / sampled_bytes


def _text_bytes(lines: io.BufferedReader, seen: int, file: pa.OSFile, size: int) -> float:
    """Bytes of text in a compressed ``file`` of ``size``, of which ``seen`` were read from ``lines``."""
    while file.tell() < _RATIO_FROM:
        piece = lines.read(_CHUNK)
        if not piece:
            return seen
        seen += len(piece)
    return seen * size / file.tell()
