"""Finished work in files, so that a run that was cut resumes where it was."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def rounded(value: Any, digits: int = 5) -> Any:
    """Numbers with as many significant digits as any figure shows."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {name: rounded(entry, digits) for name, entry in value.items()}
    return [rounded(entry, digits) for entry in value] if isinstance(value, (list, tuple)) else value
