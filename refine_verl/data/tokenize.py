"""Texts to tokens and tokens to sequences, as memory-mapped Hugging Face datasets on disk."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from refine_verl.config import DataError
from refine_verl.data.readers import BATCH_ROWS
from refine_verl.data.sources import DocumentSource, write_texts
from refine_verl.data.windows import WindowPlan

logger = logging.getLogger(__name__)

TOKEN_FEATURES = datasets.Features(
    {
        "input_ids": datasets.Sequence(datasets.Value("int32")),
        "source": datasets.Value("string"),
        "row": datasets.Value("int64"),
        "length": datasets.Value("int64"),
    }
)
SEQUENCE_FEATURES = datasets.Features(
    {**TOKEN_FEATURES, "window": datasets.Value("int64"), "document_id": datasets.Value("int64")}
)
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


def tokenize_sources(
    sources: Sequence[DocumentSource],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    text_key: str,
    append_eos: bool,
    num_workers: int | None,
    progress: bool | None,
) -> None:
    """Read, check and tokenise all documents into a dataset of `TOKEN_FEATURES` at `directory`.

    Special tokens are those the tokenizer adds by its own defaults (a Llama tokenizer's BOS, say).

    Raises:
        DataError: a file or row is bad, or `append_eos` without an end-of-sequence token.
    """
    if append_eos and tokenizer.eos_token_id is None:
        raise DataError("data.append_eos=true, but the tokenizer has no end-of-sequence token; set it to false.")
    texts = directory / "texts.arrow"
    documents = write_texts(sources, text_key, texts)
    if not documents:
        raise DataError(f"{sources[0].name} holds no documents at all: there is nothing to tokenise.")
    processes = num_workers or suggest_processes(texts.stat().st_size)
    with progress_bars(progress), one_thread_each(processes):
        tokens = datasets.Dataset.from_file(str(texts)).map(
            _encode,
            fn_kwargs={"tokenizer": tokenizer, "eos": tokenizer.eos_token_id if append_eos else None},
            batched=True,
            batch_size=BATCH_ROWS,
            writer_batch_size=BATCH_ROWS,
            num_proc=min(processes, documents) if processes > 1 else None,
            remove_columns=["text"],
            features=TOKEN_FEATURES,
            cache_file_name=str(directory / "tokens.arrow"),
            load_from_cache_file=False,
            new_fingerprint="tokens",
            desc="tokenising",
        )
    save_dataset(tokens, directory)


def cut_sequences(tokens: datasets.Dataset, plan: WindowPlan, directory: Path) -> None:
    """Write the planned sequences as a dataset of `SEQUENCE_FEATURES` at `directory`.

    `document_id` is the sequence's place in the plan, so it depends on the documents and the cutting only.
    """
    with progress_bars(False):
        sequences = tokens.with_format("arrow").map(
            _cut,
            fn_kwargs={"plan": plan},
            with_indices=True,
            batched=True,
            batch_size=BATCH_ROWS,
            writer_batch_size=BATCH_ROWS,
            features=SEQUENCE_FEATURES,
            cache_file_name=str(directory / "cut.arrow"),
            load_from_cache_file=False,
            new_fingerprint="sequences",
        )
    save_dataset(sequences, directory)


def document_lengths(tokens: datasets.Dataset) -> np.ndarray:
    """int64 [D], tokens of each document (or sequence)."""
    return tokens.with_format("arrow").select_columns(["length"])[:].column(0).to_numpy()


def save_dataset(dataset: datasets.Dataset, directory: Path) -> None:
    """Save into `directory` and drop the intermediate files there."""
    with progress_bars(False):
        dataset.with_format(None).save_to_disk(str(directory / "saved"))
    for path in directory.glob("*.arrow"):
        path.unlink()
    for path in (directory / "saved").iterdir():
        path.rename(directory / path.name)
    (directory / "saved").rmdir()


def _encode(batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, eos: int | None) -> dict[str, list[Any]]:
    encoded = tokenizer(batch["text"], return_attention_mask=False, return_token_type_ids=False, verbose=False)
    input_ids = encoded["input_ids"]
    if eos is not None:
        input_ids = [ids if ids and ids[-1] == eos else [*ids, eos] for ids in input_ids]
    return {"input_ids": input_ids, "length": [len(ids) for ids in input_ids]}


def _cut(batch: pa.Table, indices: list[int], plan: WindowPlan) -> pa.Table:
    first, last = np.searchsorted(plan.document, [indices[0], indices[-1] + 1])
    document = plan.document[first:last] - indices[0]
    column = batch.column("input_ids").combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # an empty or multi-chunk result, by pyarrow version
        column = pa.concat_arrays(column.chunks)
    begin = column.offsets.to_numpy()[document] + plan.start[first:last]
    length = plan.length[first:last]
    values = column.values.to_numpy()
    pieces = [values[b : b + n] for b, n in zip(begin, length, strict=True)]
    offsets = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
    flat = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
    columns = {
        "input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, pa.int32())),
        "source": batch.column("source").take(pa.array(document)),
        "row": batch.column("row").take(pa.array(document)),
        "length": pa.array(length, pa.int64()),
        "window": pa.array(plan.window[first:last], pa.int64()),
        "document_id": pa.array(np.arange(first, last), pa.int64()),
    }
    return pa.table(columns)


def suggest_processes(size: int) -> int:
    """How many processes are worth starting for `size` bytes of text."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(cores, size // _BYTES_PER_PROCESS))


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


@contextmanager
def one_thread_each(processes: int) -> Iterator[None]:
    """With several processes, stop each from starting threads of its own for every core."""
    if processes == 1:
        yield
        return
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
