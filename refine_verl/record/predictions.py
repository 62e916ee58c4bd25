"""`predictions.jsonl`: every generated answer with its references and scores, one JSON object per line.

A kill loses at most the line being written; the next start drops it and continues after the last complete one.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from refine_verl.config import ConfigError
from refine_verl.record.lines import keep_lines

PREDICTIONS_FILE = "predictions.jsonl"


class PredictionsFile:
    """Appends rows to a predictions file.

    Args:
        path: the file; made where needed.
        keep: which of the rows that are there stay; the file is replaced atomically where one does not.

    Attributes:
        rows: the rows that stayed and those written since.

    Raises:
        ConfigError: a line, other than a torn last one, is no row.
    """

    def __init__(self, path: Path, keep: Callable[[Mapping[str, Any]], bool] = lambda row: True) -> None:
        self.rows, _ = keep_lines(path, lambda row: "id" in row, _refusal, keep) if path.exists() else ([], 0)
        self._file = path.open("a")

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows; they are on disk when this returns."""
        lines = (json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) for row in rows)
        self._file.write("".join(f"{line}\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows += rows

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._file.close()


def mean_scores(rows: Iterable[Mapping[str, Any]], key: str = "scores", within: str = "") -> dict[str, float]:
    """``val/<task>/<metric>``: mean over the rows of each task.

    Args:
        rows: predictions; those without ``key`` are left out.
        key: which scores of a row.
        within: put between task and metric.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for metric, value in (row.get(key) or {}).items():
            values[f"val/{row['task']}/{within}{metric}"].append(value)
    return {name: sum(scores) / len(scores) for name, scores in values.items()}


def _refusal(place: str, line: bytes) -> ConfigError:
    return ConfigError(
        "trainer.default_local_dir",
        f"{place}: not a prediction. Remove the file, or name another run directory.",
    )


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null, as in metrics.jsonl."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
