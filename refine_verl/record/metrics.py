"""`metrics.jsonl`: the record of a run, one JSON object per line, appended across resumes.

A line is `{"step": 12, "actor/ntp_loss": 3.2, ...}`. Step 0 holds what was measured before training. One step
may have several lines (training and validation written apart): `merge_steps` joins them.

Values are written with every digit of a float64, so a resumed run can be compared bit for bit. JSON has no
NaN and no infinity: both are written as `null` and read back as `None`: "measured, but not finite". A metric
that was not measured at a step is absent from its line.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from refine_verl.config import Refusal
from refine_verl.record.lines import keep_lines, read_lines

METRICS_FILE = "metrics.jsonl"

logger = logging.getLogger(__name__)


class MetricsError(Refusal):
    """A metrics file that cannot be read: the message names the file, the line and the cure."""


class MetricsWriter:
    """Append the metrics of a run to a jsonl file; a kill loses at most the line being written.

    Args:
        path: the file; its directory is created where needed.
        resume_step: the step of the checkpoint that the run resumes from. Lines of later steps, written before
            the interruption, are dropped, so that no step is there twice. `-1` drops all lines (a fresh run in a
            used directory). `None` keeps all of them.

    A last line torn by a kill is dropped in every case; see `refine_verl.record.lines.keep_lines`.

    Raises:
        MetricsError: an existing file has a line, other than a torn last one, that is not a metrics line.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _, dropped = keep_lines(
                self.path, _has_step, _refusal, lambda line: resume_step is None or line["step"] <= resume_step
            )
            if dropped:
                starts_again = resume_step is not None and resume_step < 0
                which = "of a run that starts again" if starts_again else f"after step {resume_step}"
                logger.info("%s: dropped %d line%s %s", path, dropped, "s" * (dropped != 1), which)
        self._file = self.path.open("ab")

    def log(self, data: Mapping[str, Any], step: int) -> None:
        """Write one line; same call as that of verl's loggers.

        Args:
            data: metric name -> anything `float()` takes (Python, numpy and torch scalars); text and None
                stay as they are; NaN and infinity become `null`.
            step: optimiser or trainer step, 0 for what was measured before training.

        Raises:
            TypeError: a value is no scalar (the message names the metric).
            ValueError: `data` has a key `step`, or `step` is negative.
        """
        if "step" in data:
            raise ValueError("metrics: the key 'step' is taken by the step of the line; use another name")
        if step < 0:
            raise ValueError(f"metrics: step must be 0 or more, got {step}")
        record = {"step": int(step), **{str(key): _scalar(key, value) for key, value in data.items()}}
        line = json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"
        self._file.write(line.encode())
        self._file.flush()

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All complete lines of a metrics file, in the order written; `null` (not finite) comes back as None.

    A torn last line, left by a kill or by reading while the run writes, is skipped.

    Raises:
        FileNotFoundError: there is no such file.
        MetricsError: a line, other than a torn last one, is not a metrics line.
    """
    return [record for _, record in read_lines(Path(path), _has_step, _refusal)]


def merge_steps(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One record per step, ordered by step; of a metric written twice for a step the later value stays."""
    merged: dict[int, dict[str, Any]] = {}
    for record in records:
        merged.setdefault(record["step"], {}).update(record)
    return [merged[step] for step in sorted(merged)]


def _scalar(key: str, value: Any) -> float | str | None:
    if value is None or isinstance(value, str):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"{type(value).__name__}: {value!r:.80}"
        raise TypeError(f"metrics: {key} must be a scalar, got {got}") from error
    return number if math.isfinite(number) else None


def _has_step(record: Mapping[str, Any]) -> bool:
    return type(record.get("step")) is int


def _refusal(place: str, line: bytes) -> MetricsError:
    return MetricsError(f"{place}: not a metrics line: {line[:80]!r}; delete that line or move the file away")
