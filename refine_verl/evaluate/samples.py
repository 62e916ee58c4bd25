"""What is asked: rows of files as samples, checked and tokenised before the model is asked anything."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from refine_verl.config import DataError, PromptSettings
from refine_verl.data.prompts_read import read_prompts
from refine_verl.data.prompts_tokenize import encode_continuations, encode_prompts
from refine_verl.data.sources import FileSource, iterate_documents, resolve_sources
from refine_verl.evaluate.results import Row, aggregate, standard_error
from refine_verl.evaluate.settings import EvaluateSettings
from refine_verl.prepare.longbench import TASKS as LONGBENCH_TASKS
from refine_verl.scoring import main_metric

QA_TOKENS, NIAH_TOKENS = 32, 128


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One question, or one document.

    Attributes:
        id: unique within its task and length.
        ids: int32 [T], tokens of the prompt, or of the document.
        references: right answers; none for a document.
        classes: what a classification task chooses from.
        limit: most tokens to write; 0 for a document.
    """

    id: str
    ids: np.ndarray
    references: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    limit: int = 0

    @property
    def digest(self) -> str:
        """16 hex digits of all that is asked."""
        text = json.dumps([self.id, self.references, self.classes, self.limit])
        return hashlib.sha256(text.encode() + np.ascontiguousarray(self.ids, "<i4").tobytes()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Unit:
    """One task at one length.

    Attributes:
        group, task: as in `settings.GROUPS`.
        length: context length in tokens; None where the task has none.
        samples: what is asked; empty for what lm-evaluation-harness asks itself.
        left_out: rows that are longer (LongBench) or shorter (ntp) than the lengths asked for.
        source: the file or files.
        asked: sha256 of what lm-evaluation-harness is asked.
    """

    group: str
    task: str
    length: int | None
    samples: tuple[Sample, ...] = ()
    left_out: int = 0
    source: str = ""
    asked: str = ""

    @property
    def name(self) -> str:
        """Names its files."""
        return self.task if self.length is None else f"{self.task}_{self.length}"

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that is asked, in order."""
        return self.asked or hashlib.sha256("".join(sample.digest for sample in self.samples).encode()).hexdigest()

    def row(self, metric: str, kind: str, records: list[dict[str, Any]], settings: EvaluateSettings) -> Row:
        """The scores in the samples' records as a row of results; ``kind`` as in `results.aggregate`."""
        values = np.array([record[metric] for record in records])
        return Row(
            group=self.group,
            task=self.task,
            length=self.length,
            metric=metric,
            value=aggregate(kind, values),
            stderr=standard_error(kind, values),
            samples=len(values),
            left_out=self.left_out,
            fingerprint=self.fingerprint,
            aggregate=kind,
            source=self.source,
            prompt_tokens=sum(record.get("prompt_tokens", 0) for record in records),
            read_tokens=sum(record.get("read_tokens", record.get("prompt_tokens", 0)) for record in records),
            settings=settings.selection(self.group),
        )


def read_answers(path: Path, unit: Unit, settings: EvaluateSettings, tokenizer: PreTrainedTokenizerBase) -> Unit:
    """The rows of a file as samples of a unit; prompts get the special tokens that go in front of a text.

    Rows of LongBench are left out where prompt and longest reference have more tokens than the last of `lengths`.

    Raises:
        DataError: a row that cannot be used, or no rows.
    """
    known = LONGBENCH_TASKS[unit.task].max_gen_tokens if unit.group == "longbench" else QA_TOKENS
    reading = PromptSettings(task=unit.task, max_new_tokens=NIAH_TOKENS if unit.group == "ruler_niah" else known)
    most = settings.selection(unit.group).get("max_tokens")
    samples: list[Sample] = []
    left_out = 0
    for row in read_prompts(resolve_sources((str(path),), key="data_dir", default_split="test"), reading):
        if row.task != unit.task:
            raise DataError(f"{row.where} is of task {row.task!r}, but this file was taken for {unit.task!r}.")
        main_metric(row.task, settings.convention)  # refuses a task without one
        if settings.limit is not None and len(samples) == settings.limit:
            break
        ids = _encode(tokenizer, str(row.prompt))
        if most is not None and len(ids) + max(map(len, encode_continuations(tokenizer, row.answers))) > most:
            left_out += 1
            continue
        samples.append(Sample(row.id, ids, tuple(row.answers), tuple(row.classes), row.max_new_tokens))
    if not samples:
        raise DataError(
            f"{path} has no rows for {unit.name}" + (f" of at most {most} tokens ({left_out} are longer)." * bool(most))
        )
    return dataclasses.replace(unit, samples=tuple(samples), left_out=left_out, source=str(path))


def read_documents(
    sources: Sequence[FileSource], settings: EvaluateSettings, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Unit]:
    """A unit per length: documents of at least that many tokens, their first `length` tokens each.

    Raises:
        DataError: a file that cannot be read, or no document that is long enough.
    """
    kept: dict[int, list[Sample]] = {length: [] for length in settings.lengths}
    shorter = dict.fromkeys(settings.lengths, 0)
    most = settings.limit or float("inf")
    longest = 0
    for document in iterate_documents(sources, "text"):
        if all(len(samples) >= most for samples in kept.values()):
            break
        ids = _encode(tokenizer, document["text"])
        longest = max(longest, len(ids))
        for length, samples in kept.items():
            if len(samples) >= most:
                continue  # this length has read its documents; another still looks
            if len(ids) < length:
                shorter[length] += 1
            else:
                samples.append(Sample(f"{Path(document['source']).name}:{document['row']}", ids[:length]))
    for length, samples in kept.items():
        if not samples:
            raise DataError(
                f"ntp: no document of {sources[0].path.parent} has {length} tokens; the longest has {longest}. Give "
                "longer documents, or leave this length out of lengths."
            )
        yield Unit("ntp", "ntp", length, tuple(samples), shorter[length], str(sources[0].path.parent))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    return encode_prompts(tokenizer, [text], special_tokens=True)[0][0]
