"""From the scores of samples to one number of a table with its standard error."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from refine_verl.evaluate.settings import EvaluateSettings

if TYPE_CHECKING:
    from refine_verl.evaluate.samples import Unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One number of a table, with all that is needed to read it.

    Attributes:
        group, task, length: of the unit.
        metric: name of the score.
        value: as aggregated, in its own unit (shares in 0 ... 1).
        stderr: standard error over the samples; None for fewer than two.
        samples: how many there were.
        left_out: rows that were too long or too short.
        fingerprint: sha256 of what was asked.
        aggregate: how sample scores become the value, see `aggregate`.
        source: file or files.
        settings: which of all samples there are were asked, see `EvaluateSettings.selection`.
    """

    group: str
    task: str
    length: int | None
    metric: str
    value: float
    stderr: float | None
    samples: int
    left_out: int
    fingerprint: str
    aggregate: str
    source: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """Names the file with its samples."""
        return self.task if self.length is None else f"{self.task}_{self.length}"


def aggregate(kind: str, values: np.ndarray) -> float:
    """One number from the scores of samples.

    Args:
        kind: `mean`; `perplexity`, exp(-mean) of log-likelihoods; `weighted_perplexity`, exp(-sum / sum) of
            log-likelihoods and word counts.
        values: [N], or [N, 2] for the last.
    """
    if kind == "mean":
        return float(values.mean())
    if kind == "perplexity":
        exponent = -float(values.mean())
    else:
        exponent = -float(values[:, 0].sum()) / float(values[:, 1].sum())
    return math.exp(exponent) if exponent < 700 else math.inf


def standard_error(kind: str, values: np.ndarray) -> float | None:
    """Of `aggregate`: sample standard deviation over the root of N, carried through exp where there is one (delta
    method; for `weighted_perplexity` that of a ratio of means)."""
    if len(values) < 2:
        return None
    if kind != "weighted_perplexity":
        error = float(values.std(ddof=1) / math.sqrt(len(values)))
        return error if kind == "mean" else aggregate(kind, values) * error
    words = values[:, 1]
    rest = values[:, 0] - words * (values[:, 0].sum() / words.sum())
    return aggregate(kind, values) * float(rest.std(ddof=1) / math.sqrt(len(values)) / words.mean())


def make_row(unit: Unit, metric: str, kind: str, values: np.ndarray, settings: EvaluateSettings) -> Row:
    """The scores of a unit's samples as a row of results.

    Args:
        unit, metric: what was scored, and how.
        kind: see `aggregate`.
        values: [N], or [N, 2], see `aggregate`.
        settings: of the run.
    """
    return Row(
        group=unit.group,
        task=unit.task,
        length=unit.length,
        metric=metric,
        value=aggregate(kind, values),
        stderr=standard_error(kind, values),
        samples=len(values),
        left_out=unit.left_out,
        fingerprint=unit.fingerprint,
        aggregate=kind,
        source=unit.source,
        settings=settings.selection(unit.group),
    )
