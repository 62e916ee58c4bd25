"""Questions dealt into training and test sets that share neither a question nor a paragraph with an answer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from refine_verl.config import DataError
from refine_verl.prepare.questions import Question


def split_questions(
    questions: Sequence[Question], train: int, test: int, generator: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Choose `train` and `test` questions at random, as indices.

    Questions that share a gold paragraph form a group, and a group never lies in both sets. Test questions come
    from as many groups as leave enough questions for training.

    Raises:
        DataError: too few questions.
    """
    order = generator.permutation(len(questions)).tolist()
    groups = _groups(questions)
    for most in range(1, max(Counter(groups).values(), default=0) + 2):
        chosen = _take(order, groups, test, most)
        taken = {groups[index] for index in chosen}
        rest = [index for index in order if groups[index] not in taken]
        if len(chosen) == test and len(rest) >= train:
            return rest[:train], chosen
    raise DataError(
        f"the source has {len(questions)} usable questions about {len(set(groups))} groups of paragraphs: too few for "
        f"--train {train} and --test {test} questions that share no paragraph with an answer. Ask for fewer, or give "
        "a larger source."
    )


def _take(order: Sequence[int], groups: Sequence[int], count: int, most: int) -> list[int]:
    """`count` questions, at most `most` of a group, group after group as they first appear in `order`."""
    members: dict[int, list[int]] = defaultdict(list)
    for index in order:
        members[groups[index]].append(index)
    return [index for group in members.values() for index in group[:most]][:count]


def _groups(questions: Sequence[Question]) -> list[int]:
    """The group of each question: connected through gold paragraphs. Groups are numbered 0, 1, ..."""
    parent: dict[int, int] = {}

    def root(paragraph: int) -> int:
        parent.setdefault(paragraph, paragraph)
        while parent[paragraph] != paragraph:
            parent[paragraph] = parent[parent[paragraph]]
            paragraph = parent[paragraph]
        return paragraph

    for question in questions:
        first = root(question.gold[0])
        for paragraph in question.gold[1:]:
            parent[root(paragraph)] = first
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(question.gold[0]), len(numbers)) for question in questions]
