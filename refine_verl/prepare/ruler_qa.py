"""RULER's question answering at a given length: gold paragraphs hidden among distractors (Hsieh et al. 2024).

The prompt and the columns are those of the files that the authors of REFINE published. Documents are added as
long as the prompt and the answer fit into the length; which, and in which order, depends on the seed, the question
and the tokenizer only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from refine_verl.command.show import progress_bar, show_table, spread, typed
from refine_verl.config import DataError
from refine_verl.data.cache import make_key
from refine_verl.data.prompts_tokenize import encode_continuations, encode_prompts
from refine_verl.data.tokenize import tokenizer_fingerprint
from refine_verl.data.tokenizers import load_finished_tokenizer
from refine_verl.prepare.longbench import TASKS as PUBLISHED
from refine_verl.prepare.output import Output, join_parts, write_table
from refine_verl.prepare.questions import Question, Questions, read_questions, split_questions
from refine_verl.prepare.settings import RulerSettings

TASKS = {"squad": "ruler_squadqa", "hotpotqa": "ruler_hotpotqa"}
SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("prompt", pa.string()),
        ("answer", pa.list_(pa.string())),
        ("prompt_length", pa.int64()),
        ("max_answer_length", pa.int64()),
        ("total_length", pa.int64()),
        ("max_seq_length", pa.int64()),
        ("task", pa.string()),
    ]
)
_FORMAT = 1
_PART_ROWS = 100
_KEYS = {"train": "data.train_files", "test": "data.val_files"}
_ATTEMPTS = 6


def run(settings: RulerSettings) -> None:
    """Generate both sets into `settings.out`, and show what they are like.

    Raises:
        DataError: bad arguments, an unreadable source, or one with too few questions or paragraphs.
    """
    tokenizer = load_finished_tokenizer(settings.tokenizer)
    questions = read_questions(settings.source, settings.input)
    builder = PromptBuilder(questions, tokenizer, settings)
    plan = builder.plan()
    arguments = {
        **{key: value for key, value in dataclasses.asdict(settings).items() if key not in ("out", "tokenizer")},
        "format": _FORMAT,
        "input": make_key([questions.documents, *map(dataclasses.astuple, questions.items)]),
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    with Output(Path(settings.out).expanduser(), "prepare ruler_qa", arguments) as output:
        entries = {
            name: _write_split(output, builder, name, indices, settings) for name, indices in plan.items() if indices
        }
    _report(entries, builder, questions, settings)


class PromptBuilder:
    """Prompts of one source at one length, which is counted as `prepare_prompts` will count it."""

    def __init__(self, questions: Questions, tokenizer: PreTrainedTokenizerBase, settings: RulerSettings) -> None:
        self.questions, self.tokenizer, self.settings = questions, tokenizer, settings
        self.sizes = self._document_sizes()
        self.frame = self._measure(make_prompt([], Question("", (), (), ())))
        self.too_long = 0
        self.kept_for_test = np.zeros(len(questions.documents), bool)

    def plan(self) -> dict[str, list[int]]:
        """The questions of each split, as indices.

        Raises:
            DataError: too few questions, or too few paragraphs to fill a prompt.
        """
        items = self.questions.items
        usable = [index for index, question in enumerate(items) if self._fits(question)]
        self.too_long = len(items) - len(usable)
        if items and not usable:
            raise DataError(
                f"--length {self.settings.length} leaves no room for any question with its paragraphs and an answer "
                f"of {self.settings.answer_tokens} tokens. Raise --length."
            )
        generator = np.random.default_rng([self.settings.seed, 0])
        chosen = split_questions([items[index] for index in usable], self.settings.train, self.settings.test, generator)
        train, test = ([usable[index] for index in part] for part in chosen)
        for index in test:
            self.kept_for_test[list(items[index].gold)] = True
        available = int(self.sizes[~self.kept_for_test].sum()) if train else int(self.sizes.sum())
        if available < self.settings.length:
            raise DataError(
                f"the source has too few paragraphs: {len(self.sizes)} with about {available} tokens in all, outside "
                f"those kept for the test set. Prompts of --length {self.settings.length} cannot be filled with "
                "distractors: give a larger source, or a smaller --length."
            )
        return {"train": train, "test": test}

    def row(self, split: str, number: int, index: int) -> tuple[dict[str, Any], int]:
        """One row of `SCHEMA` and how many documents its prompt has."""
        question = self.questions.items[index]
        generator = np.random.default_rng([self.settings.seed, 1 + (split == "test"), number])
        longest, limit = self._room(question)
        order = self._candidates(question, split, generator)
        shuffle = generator.permutation(len(question.gold) + len(order))
        prompt, length, documents = self._fill(question, order, shuffle, limit)
        row = {
            "index": number,
            "prompt": prompt,
            "answer": list(question.answers),
            "prompt_length": length,
            "max_answer_length": longest,
            "total_length": length + longest,
            "max_seq_length": self.settings.length,
            "task": TASKS[self.settings.source],
        }
        return row, documents

    def _document_sizes(self) -> np.ndarray:
        """int64 [D], tokens that each paragraph adds to a prompt, roughly."""
        sizes: list[int] = []
        with progress_bar("counting tokens", len(self.questions.documents)) as step:
            for start in range(0, len(self.questions.documents), 256):
                block = self.questions.documents[start : start + 256]
                sizes += map(len, encode_continuations(self.tokenizer, [f"\n\nDocument 10:\n{text}" for text in block]))
                step(len(block))
        return np.array(sizes, np.int64)

    def _fits(self, question: Question) -> bool:
        """Whether the gold paragraphs alone leave room for the answer; measured only where it is close."""
        texts = len(question.text) + max(map(len, question.answers)) + self.settings.answer_tokens
        if self.frame + int(self.sizes[list(question.gold)].sum()) + 2 * texts < self.settings.length:
            return True
        gold = [self.questions.documents[index] for index in question.gold]
        return self._measure(make_prompt(gold, question)) <= self._room(question)[1]

    def _room(self, question: Question) -> tuple[int, int]:
        """Tokens of the longest answer, and the most that the prompt may have."""
        answers = encode_continuations(self.tokenizer, [f" {answer}" for answer in question.answers])
        longest = max(map(len, answers))
        return longest, self.settings.length - max(self.settings.answer_tokens, longest + 1)

    def _measure(self, prompt: str) -> int:
        return len(encode_prompts(self.tokenizer, [prompt], special_tokens=True)[0][0])

    def _candidates(self, question: Question, split: str, generator: np.random.Generator) -> np.ndarray:
        """Distractors in the order they are tried: those near the question first. Training never sees test's gold."""
        allowed = np.ones(len(self.sizes), bool) if split == "test" else ~self.kept_for_test
        allowed[list(question.gold)] = False
        near = np.array(question.near, np.int64)
        near = generator.permutation(near[allowed[near]])
        allowed[near] = False
        return np.concatenate([near, generator.permutation(np.flatnonzero(allowed))])

    def _fill(self, question: Question, order: np.ndarray, shuffle: np.ndarray, limit: int) -> tuple[str, int, int]:
        """The longest prompt found that keeps to `limit` tokens, its length, and its number of documents.

        Sizes of single documents are estimates (the number in front, merges across their ends), so a choice is
        measured and made again with the error taken into account.
        """
        base = self._measure(make_prompt([], question))
        gold = list(question.gold)
        room = limit - base - int(self.sizes[gold].sum())
        best = self._build(question, gold, shuffle)
        seen: set[int] = set()
        for _ in range(_ATTEMPTS):
            chosen = fit(order, self.sizes, room)
            attempt = self._build(question, [*gold, *chosen.tolist()], shuffle)
            if best[1] < attempt[1] <= limit:
                best = attempt
            used = int(self.sizes[chosen].sum())
            # What the chosen documents really take against what was estimated tells the room there is.
            room = used + limit - attempt[1]
            if room in seen or not len(order):
                break
            seen.add(room)
        return best

    def _build(self, question: Question, documents: list[int], shuffle: np.ndarray) -> tuple[str, int, int]:
        order = np.argsort(shuffle[: len(documents)], kind="stable")
        prompt = make_prompt([self.questions.documents[documents[place]] for place in order], question)
        return prompt, self._measure(prompt), len(documents)


def make_prompt(documents: Sequence[str], question: Question) -> str:
    """The prompt as the published files have it: that of LongBench's hotpotqa."""
    passages = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(documents, 1))
    return PUBLISHED["hotpotqa"].prompt(passages, question.text)


def fit(order: np.ndarray, sizes: np.ndarray, room: int) -> np.ndarray:
    """Take documents in `order` as long as they fit, passing over those that do not.

    Args:
        order: int64 [N], document indices.
        sizes: int64 [D], tokens of each document.
        room: tokens to fill.

    Returns:
        int64 [M], the documents taken, in order. None of the others fits into what is left.
    """
    taken = []
    while len(order):
        order = order[sizes[order] <= room]
        ends = np.cumsum(sizes[order])
        count = int(np.searchsorted(ends, room, side="right"))
        if not count:
            break
        taken.append(order[:count])
        room -= int(ends[count - 1])
        order = order[count:]
    return np.concatenate(taken) if taken else np.zeros(0, np.int64)


def _write_split(
    output: Output, builder: PromptBuilder, split: str, indices: list[int], settings: RulerSettings
) -> dict[str, Any]:
    name = f"{TASKS[settings.source]}_{settings.length}_{len(indices)}_{split}.parquet"
    if (entry := output.finished(name)) is not None:
        for left in [done for done in output.done if done.startswith(f".{split}-")]:
            output.remove(left)
        return {"file": name, **entry}
    parts = {f".{split}-{start:06d}.parquet": start for start in range(0, len(indices), _PART_ROWS)}
    with progress_bar(f"{split}: writing prompts", len(indices)) as step:
        for part, start in parts.items():
            chosen = indices[start : start + _PART_ROWS]
            if output.finished(part) is not None:
                step(len(chosen))
                continue
            made = []
            for number, index in enumerate(chosen, start):
                made.append(builder.row(split, number, index))
                step()
            table = pa.Table.from_pylist([row for row, _ in made], SCHEMA)
            lengths = {"lengths": [row["total_length"] for row, _ in made], "documents": [n for _, n in made]}
            write_table(output, part, table, lengths)
    entries = [output.done[part] for part in parts]
    joined = {key: [value for entry in entries for value in entry[key]] for key in ("lengths", "documents")}
    join_parts(output, name, list(parts), joined)
    return {"file": name, **joined}


def _report(
    entries: dict[str, dict[str, Any]], builder: PromptBuilder, questions: Questions, settings: RulerSettings
) -> None:
    columns = ["file", "questions", "tokens: least", "mean", "most", "documents: least", "mean", "most"]
    rows = [
        (entry["file"], len(entry["lengths"]), *spread(entry["lengths"]), *spread(entry["documents"]))
        for entry in entries.values()
    ]
    notes = [
        f"{len(questions.items)} questions about {len(questions.documents)} paragraphs; left out: "
        f"{questions.unanswerable} without an answer, {questions.repeated} repeated, {builder.too_long} too long for "
        f"--length {settings.length}.",
        f"Tokens are those of prompt and longest reference, with {settings.tokenizer}; prompts leave at least "
        f"{settings.answer_tokens} tokens for the answer.",
        "Use: " + " ".join(typed(_KEYS[split], f"{settings.out}/{entry['file']}") for split, entry in entries.items()),
    ]
    show_table(f"RULER {settings.source} at {settings.length} tokens", columns, rows, notes)
