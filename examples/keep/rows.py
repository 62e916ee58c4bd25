"""Prompts of a file as documents with questions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from examples.keep.arms import Case
from examples.keep.settings import FileSettings
from refine_verl.config import ConfigError, DataError, PromptSettings
from refine_verl.data.prompts_read import PromptRow, read_prompts
from refine_verl.data.prompts_tokenize import encode_continuations, encode_prompts
from refine_verl.data.sources import resolve_sources
from refine_verl.evaluate.samples import NIAH_TOKENS, QA_TOKENS
from refine_verl.prepare.longbench import TASKS
from refine_verl.scoring import main_metric

FEW_SHOT = {"trec": "\nQuestion: ", "samsum": "\n\nDialogue: ", "triviaqa": "\n\nPassage:"}
"""What the question begins with where a published prompt ends with it."""
NEEDLES = "\nWhat "
"""The same of RULER's needles."""


@dataclass(frozen=True)
class Asked:
    """A document of a file and the rows that ask about it.

    Attributes:
        text: of the document, with what stands before it in the prompts.
        rows: at least one.
        questions: text of each row's question.
    """

    text: str
    rows: list[PromptRow] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        """For messages."""
        return self.rows[0].where

    def case(self, tokenizer: PreTrainedTokenizerBase, passage: int | None) -> Case:
        """Its token ids: document and questions are tokenised on their own."""
        document = _front(tokenizer, self.text)
        return Case(
            document=document,
            passages=cut(document, passage),
            questions=[_tensor(ids) for ids in encode_continuations(tokenizer, self.questions)],
            alone=[_front(tokenizer, question.lstrip()) for question in self.questions],
            limits=[row.max_new_tokens for row in self.rows],
        )


def read_documents(settings: FileSettings) -> list[Asked]:
    """Documents in the order of the files; prompts with the same document share it.

    Raises:
        DataError: files or rows that cannot be used. ConfigError: no way to tell a question from its document.
        MetricError: a task without a metric.
    """
    sources = resolve_sources(settings.data, key="data.val_files", default_split="test")

    def rows(most: int) -> Iterator[PromptRow]:
        return read_prompts(sources, PromptSettings(task=settings.task, max_new_tokens=most))

    found: dict[str, Asked] = {}
    for task in dict.fromkeys(row.task for row in rows(QA_TOKENS)):
        main_metric(task, settings.convention)  # refuses a task without one
        for row in rows(answer_tokens(task)):
            if row.task != task:
                continue
            text, question = split(row, settings.question)
            if text not in found and len(found) == settings.limit:
                continue
            asked = found.setdefault(text, Asked(text))
            asked.rows.append(row)
            asked.questions.append(question)
    if not found:
        raise DataError(f"data: {', '.join(settings.data)} has no rows.")
    return list(found.values())


def answer_tokens(task: str) -> int:
    """Most tokens of an answer where the file does not say."""
    if task in TASKS:
        return TASKS[task].max_gen_tokens
    return NIAH_TOKENS if task.startswith("niah_") else QA_TOKENS


def split(row: PromptRow, given: str | None) -> tuple[str, str]:
    """Text of the document, and of the question behind it.

    Args:
        row: a prompt.
        given: what questions begin with; None: what the task says.

    Raises:
        ConfigError: nothing says where questions begin.
        DataError: a prompt without that text, or with nothing before it.
    """
    mark = given or beginning(row.task)
    if not mark:
        raise ConfigError("question", f"is not set, and the task {row.task!r} has no published prompt. Set it.")
    place = str(row.prompt).rfind(mark)
    if place < 1 or not str(row.prompt)[:place].strip():
        raise DataError(
            f"{row.where}: the prompt has no document followed by {mark!r}, with which its question should begin. Set "
            "question=TEXT."
        )
    return str(row.prompt)[:place], str(row.prompt)[place:]


def beginning(task: str) -> str:
    """What the question of a task's published prompt begins with; empty for an unknown task."""
    if task in FEW_SHOT:
        return FEW_SHOT[task]
    if task.startswith("niah_"):
        return NEEDLES
    known = TASKS.get("hotpotqa" if task.startswith("ruler_") else task)
    if known is None:
        return ""
    before, _, behind = known.template.partition("{context}")[2].partition("{input}")
    return before if before.strip() else behind


def cut(document: Tensor, passage: int | None) -> list[Tensor]:
    """Passages of so many tokens; what is left over belongs to the last one where it is shorter than half of that."""
    if passage is None or len(document) <= passage:
        return [document]
    parts = list(document.split(passage))
    if 2 * len(parts[-1]) < passage:
        last = parts.pop()
        parts[-1] = torch.cat([parts[-1], last])
    return parts


def _front(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    return _tensor(encode_prompts(tokenizer, [text], special_tokens=True)[0][0])


def _tensor(ids: np.ndarray) -> Tensor:
    return torch.as_tensor(ids, dtype=torch.int64)
