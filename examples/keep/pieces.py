"""Finished work in files, so that a run that was cut resumes where it was."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.keep.arms import Outcome
from examples.recall.runner import rounded
from refine_verl.record.files import write_atomically

Record = dict[str, Any]


class Pieces:
    """Records by name below a folder, each with a digest of what it was made with; ``tell``: print what is made."""

    def __init__(self, folder: Path, *, tell: bool = True) -> None:
        self.folder, self.tell, self._started = folder, tell, time.monotonic()

    def get(self, name: str, settings: Any, compute: Callable[[], Record], *, anew: bool = False) -> Record:
        """The record of that name, if it was made with the same settings; else, or ``anew``, it is made."""
        path, key = self.folder / f"{name}.json", digest(settings)
        if path.is_file() and not anew:
            known = json.loads(path.read_text())
            if known["key"] == key:
                return dict(known["record"])
        record: Record = rounded(compute())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, "record": record})
        if self.tell:
            print(f"[{(time.monotonic() - self._started) / 60:5.1f} min] {name}", flush=True)
        return record


def digest(settings: Any) -> str:
    """12 hex digits of what decides about a record."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:12]


def write_json(path: Path, content: Any) -> None:
    """All of it or nothing."""
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


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
