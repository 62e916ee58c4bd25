"""What is kept of an arm's answers, and its means over documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from examples.keep.arms import Outcome
from examples.miniature.pieces import Record


def record_of(outcome: Outcome, questions: int, score: float) -> Record:
    """What tables are made of: costs of what is kept for each document, costs of asking for each question."""
    return {
        "score": score,
        "kept_bytes": outcome.kept_bytes,
        "seconds_per_question": outcome.asking_seconds / questions,
        "passes_per_question": outcome.asking_passes / questions,
        "making_seconds": outcome.making_seconds,
        "making_passes": outcome.making_passes,
    }


def means(records: Sequence[Mapping[str, Record]]) -> dict[str, Record]:
    """By arm, over records of documents of which each counts the same."""
    return {
        arm: {name: sum(record[arm][name] for record in records) / len(records) for name in records[0][arm]}
        for arm in records[0]
    }
