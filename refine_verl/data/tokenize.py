"""Rows to tokens and tokens to sequences, as memory-mapped Hugging Face datasets on disk."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from refine_verl.config import DataError
from refine_verl.config.data import FileSettings
from refine_verl.data.readers import BATCH_ROWS, batched
from refine_verl.data.windows import WindowPlan

TEXT_SCHEMA = pa.schema([("text", pa.large_string()), ("source", pa.string()), ("row", pa.int64())])
"""Documents before they are tokens: the text, the file it came from, its 0-based row (line, for json lines)."""
_NUMBER = datasets.Value("int64")
TOKEN_FEATURES = datasets.Features(
    input_ids=datasets.Sequence(datasets.Value("int32")), source=datasets.Value("string"), row=_NUMBER, length=_NUMBER
)
SEQUENCE_FEATURES = datasets.Features(**TOKEN_FEATURES, window=_NUMBER, document_id=_NUMBER)
_IN_BATCHES: dict[str, Any] = {
    "batched": True,
    "batch_size": BATCH_ROWS,
    "writer_batch_size": BATCH_ROWS,
    "load_from_cache_file": False,
}
# Below this much text per process, starting another one costs more than it saves.
_BYTES_PER_PROCESS = 16 << 20


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Changes whenever the tokenizer would turn some text into other tokens; json-serialisable."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        settings = {key: repr(value) for key, value in sorted(tokenizer.init_kwargs.items())}
        return [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), settings]
    rules = json.loads(backend.to_str())
    # Truncation and padding are call settings that stick to the object; they do not change the tokens.
    for key in ("truncation", "padding"):
        rules.pop(key, None)
    return [type(tokenizer).__name__, tokenizer.eos_token_id, rules]


def tokenize_rows(
    rows: Iterable[Mapping[str, Any]],
    schema: pa.Schema,
    encode: Callable[[dict[str, list[Any]]], dict[str, list[Any]]],
    features: datasets.Features,
    directory: Path,
    settings: FileSettings,
    nothing: str,
) -> datasets.Dataset:
    """Write rows to an Arrow file and make tokens of them, by several processes where there is much text.

    Args:
        rows, schema: the rows as they are written, and their fields.
        encode: makes the columns of `features` that rows do not have, for a batch; runs in the processes.
        features: of the result; fields of `schema` that are not among them are left out.
        directory: holds intermediate files, until `save_dataset` removes them.
        settings: number of processes, progress bars.
        nothing: what is said where there are no rows.

    Raises:
        DataError: there are no rows, or reading them says so.
    """
    texts = directory / "texts.arrow"
    count = write_rows(rows, schema, texts)
    if not count:
        raise DataError(nothing)
    worth_starting = max(1, min(len(os.sched_getaffinity(0)), texts.stat().st_size // _BYTES_PER_PROCESS))
    processes = settings.num_workers or worth_starting
    # several processes are not to start threads of their own for every core
    alone = {"TOKENIZERS_PARALLELISM": "false"} if processes > 1 else {}
    with progress_bars(settings.progress), mock.patch.dict(os.environ, alone):
        return datasets.Dataset.from_file(str(texts)).map(
            encode,
            num_proc=min(processes, count) if processes > 1 else None,
            remove_columns=[name for name in schema.names if name not in features],
            features=features,
            cache_file_name=str(directory / "tokens.arrow"),
            new_fingerprint="tokens",
            desc="tokenising",
            **_IN_BATCHES,
        )


def write_rows(rows: Iterable[Mapping[str, Any]], schema: pa.Schema, path: Path) -> int:
    """Write rows to an Arrow stream file; returns how many there were."""
    count = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in batched(rows):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
            count += len(batch)
    return count


def encode_documents(
    batch: dict[str, list[Any]], *, tokenizer: PreTrainedTokenizerBase, eos: int | None
) -> dict[str, list[Any]]:
    """Tokens of a batch of documents (column `text`), for `tokenize_rows`.

    Special tokens are those the tokenizer adds by its own defaults (a Llama tokenizer's BOS, say), and `eos` behind
    each document that does not end with it (None: nowhere).
    """
    encoded = tokenizer(batch["text"], return_attention_mask=False, return_token_type_ids=False, verbose=False)
    input_ids = encoded["input_ids"]
    if eos is not None:
        input_ids = [ids if ids and ids[-1] == eos else [*ids, eos] for ids in input_ids]
    return {"input_ids": input_ids, "length": [len(ids) for ids in input_ids]}


def cut_sequences(tokens: datasets.Dataset, plan: WindowPlan, directory: Path) -> None:
    """Write the planned sequences as a dataset of `SEQUENCE_FEATURES` at `directory`.

    `document_id` is the sequence's place in the plan, so it depends on the documents and the cutting only.
    """
    with progress_bars(False):
        sequences = tokens.with_format("numpy").map(
            _cut,
            fn_kwargs={"plan": plan},
            with_indices=True,
            features=SEQUENCE_FEATURES,
            cache_file_name=str(directory / "cut.arrow"),
            new_fingerprint="sequences",
            **_IN_BATCHES,
        )
    save_dataset(sequences, directory)


def column(table: datasets.Dataset, name: str) -> np.ndarray:
    """A column of numbers, [N]."""
    return table.with_format("arrow").select_columns([name])[:].column(0).to_numpy()


def save_dataset(dataset: datasets.Dataset, directory: Path) -> None:
    """Save into `directory` and drop the intermediate files there."""
    with progress_bars(False):
        dataset.with_format(None).save_to_disk(str(directory / "saved"))
    for path in directory.glob("*.arrow"):
        path.unlink()
    for path in (directory / "saved").iterdir():
        path.rename(directory / path.name)
    (directory / "saved").rmdir()


def _cut(batch: dict[str, Any], indices: list[int], plan: WindowPlan) -> dict[str, Any]:
    first, last = np.searchsorted(plan.document, [indices[0], indices[-1] + 1])
    documents = plan.document[first:last] - indices[0]
    pieces = zip(documents, plan.start[first:last], plan.length[first:last], strict=True)
    return {
        "input_ids": [batch["input_ids"][document][start : start + length] for document, start, length in pieces],
        "source": [batch["source"][document] for document in documents],
        "row": batch["row"][documents],
        "length": plan.length[first:last],
        "window": plan.window[first:last],
        "document_id": np.arange(first, last),
    }


@contextmanager
def progress_bars(progress: bool | None) -> Iterator[None]:
    """Progress bars of `datasets` on or off (None: on a terminal only), as they were before on leaving."""
    shown = sys.stderr.isatty() if progress is None else progress
    before = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()
