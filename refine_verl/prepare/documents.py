"""Long documents out of a corpus: read, tokenise, keep those of at least N tokens, write parquet in shards."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from refine_verl.command.show import progress_bar, show_table, spread, typed
from refine_verl.config import DataError
from refine_verl.data.readers import batched
from refine_verl.data.sources import DocumentSource, iterate_documents, resolve_sources
from refine_verl.data.tokenize import tokenizer_fingerprint
from refine_verl.data.tokenizers import load_finished_tokenizer
from refine_verl.prepare.output import COMPRESSION, Output
from refine_verl.prepare.settings import DocumentSettings

SCHEMA = pa.schema([("text", pa.large_string()), ("tokens", pa.int64()), ("source", pa.string()), ("row", pa.int64())])
_COUNTS = ("read", "sampled", "short", "long", "kept", "kept_tokens", "read_tokens")


def run(settings: DocumentSettings) -> None:
    """Write the shards, and show what was kept.

    Raises:
        DataError: bad arguments, unreadable files, or no document that is long enough.
    """
    tokenizer = load_finished_tokenizer(settings.tokenizer)
    sources = resolve_sources(settings.input, key="--input", default_split="train")
    arguments = {
        **{key: value for key, value in dataclasses.asdict(settings).items() if key not in ("out", "tokenizer")},
        "sources": [source.fingerprint() for source in sources],
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    with Output(Path(settings.out).expanduser(), "prepare documents", arguments) as output:
        totals = Collector(output, sources, tokenizer, settings).run()
        if not totals["read"]:
            raise DataError(f"--input {' '.join(settings.input)}: {sources[0].name} holds no documents at all.")
        if not totals["kept"]:
            raise DataError(
                f"none of {totals['read']} documents has {settings.min_tokens} tokens or more. Lower --min-tokens, or "
                "give longer documents."
            )
        _report(output, totals, settings)


class Collector:
    """Reads documents in order and fills shard after shard, going on behind the last one that is finished."""

    def __init__(
        self,
        output: Output,
        sources: Sequence[DocumentSource],
        tokenizer: PreTrainedTokenizerBase,
        settings: DocumentSettings,
    ) -> None:
        self.output, self.sources, self.tokenizer, self.settings = output, sources, tokenizer, settings
        self.totals: Counter[str] = Counter(dict.fromkeys(_COUNTS, 0))

    def run(self) -> Counter[str]:
        """Write what is missing (nothing, where everything is there); returns counts over all shards."""
        entries = self._resume()
        for entry in entries:
            self.totals.update({key: entry[key] for key in _COUNTS})
        if entries and entries[-1]["last"]:
            return self.totals
        documents = self._documents(skip=self.totals["read"])
        number = len(entries)
        with progress_bar("documents kept", self.settings.limit, done=self.totals["kept"]) as step:
            while not self._write_shard(number, documents, step):
                number += 1
        return self.totals

    def _resume(self) -> list[dict[str, Any]]:
        """What is recorded of the shards up to the first that is missing; forgets those behind it."""
        present = list(itertools.takewhile(self.output.finished, map(_shard_name, itertools.count())))
        for name in [name for name in self.output.done if name not in present]:
            self.output.remove(name)
        return [self.output.done[name] for name in present]

    def _documents(self, skip: int) -> Iterator[list[Mapping[str, Any]]]:
        """Batches of checked documents (see `iterate_documents`) without the first `skip`."""
        for source in self.sources:
            for batch in batched(iterate_documents([source], self.settings.text_key)):
                if skip < len(batch):
                    yield batch[skip:]
                skip = max(0, skip - len(batch))

    def _write_shard(
        self, number: int, documents: Iterator[list[Mapping[str, Any]]], step: Callable[[int], None]
    ) -> bool:
        """Fill one shard; returns whether it is the last.

        A shard ends where a batch of documents does, so that a restart knows where to go on.
        """
        before = Counter(self.totals)
        lengths: list[int] = []
        name = _shard_name(number)
        with self.output.writing(name) as path:
            with pq.ParquetWriter(path, SCHEMA, compression=COMPRESSION) as writer:
                for batch in documents:
                    rows = self._select(batch)
                    if rows:
                        writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
                    lengths += [row["tokens"] for row in rows]
                    step(len(rows))
                    last = self._enough()
                    if last or len(lengths) >= self.settings.shard_size:
                        break
                else:
                    last = True
            if not lengths:
                path.unlink()
        counts = {key: self.totals[key] - before[key] for key in _COUNTS}
        if lengths:
            self.output.finish(name, {**counts, "last": last, "spread": list(spread(lengths))})
        elif number:
            name = _shard_name(number - 1)
            previous = self.output.done[name]
            together = {key: previous[key] + counts[key] for key in _COUNTS}
            self.output.finish(name, {**previous, **together, "last": last})
        return last

    def _select(self, batch: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The rows of a batch to keep, as `SCHEMA`; adds to the counts."""
        candidates = [(place, row) for place, row in enumerate(batch) if self._sampled(row["text"])]
        rows: list[dict[str, Any]] = []
        encoded = self.tokenizer([row["text"] for _, row in candidates])["input_ids"] if candidates else []
        for (place, row), ids in zip(candidates, encoded, strict=True):
            if self._enough():
                self.totals["read"] += place
                return rows
            self.totals.update(sampled=1, read_tokens=len(ids))
            if len(ids) < self.settings.min_tokens:
                self.totals["short"] += 1
            elif self.settings.max_tokens is not None and len(ids) > self.settings.max_tokens:
                self.totals["long"] += 1
            else:
                self.totals.update(kept=1, kept_tokens=len(ids))
                rows.append({**row, "tokens": len(ids)})
        self.totals["read"] += len(batch)
        return rows

    def _sampled(self, text: str) -> bool:
        if self.settings.sample >= 1.0:
            return True
        digest = hashlib.sha256(f"{self.settings.seed}\0{text}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64 < self.settings.sample

    def _enough(self) -> bool:
        limits = (("kept", self.settings.limit), ("kept_tokens", self.settings.limit_tokens))
        return any(limit is not None and self.totals[key] >= limit for key, limit in limits)


def _shard_name(number: int) -> str:
    return f"documents-{number:05d}.parquet"


def _report(output: Output, totals: Counter[str], settings: DocumentSettings) -> None:
    columns = ["file", "documents read", "kept", "tokens", "least", "mean", "most"]
    entries = [*sorted(output.done.items()), ("all", {**totals, "spread": ("", "", "")})]
    rows = [(name, entry["read"], entry["kept"], entry["kept_tokens"], *entry["spread"]) for name, entry in entries]
    notes = [
        f"{totals['sampled']:,} of {totals['read']:,} documents were looked at ({totals['read_tokens']:,} tokens with "
        f"{settings.tokenizer}); {totals['short']:,} had fewer than {settings.min_tokens:,} tokens"
        + (f", {totals['long']:,} more than {settings.max_tokens:,}." if settings.max_tokens is not None else "."),
        f"Use: {typed('data.train_files', settings.out)}",
    ]
    show_table(f"Documents of at least {settings.min_tokens:,} tokens", columns, rows, notes)
