"""What somebody read from the figures of one run, which is not shown with those of another."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def runs_digest(runs: Any) -> str:
    """12 hex digits of the numbers of runs, by which a reading names them."""
    return hashlib.sha256(json.dumps(runs, sort_keys=True).encode()).hexdigest()[:12]


def reading_of(path: Path, runs: Any) -> str:
    """The text below the line ``<!-- runs DIGEST -->``; empty if there is none, or of other runs."""
    head, _, text = path.read_text().partition("\n\n") if path.is_file() else ("", "", "")
    return text.strip() if head == f"<!-- runs {runs_digest(runs)} -->" else ""
