"""Aggregates, their standard errors, and bootstrap intervals of differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from refine_verl.evaluate.compare import bootstrap_average, bootstrap_difference
from refine_verl.evaluate.results import Row, aggregate, standard_error
from refine_verl.evaluate.settings import LONGBENCH
from refine_verl.evaluate.tables import build_tables

pytest.importorskip("scipy")
RNG = np.random.default_rng(0)


def test_aggregates_by_hand() -> None:
    assert aggregate("mean", np.array([0.0, 1.0, 1.0, 0.0])) == 0.5
    assert standard_error("mean", np.array([0.0, 1.0, 1.0, 0.0])) == pytest.approx(math.sqrt(1 / 3) / 2)
    assert aggregate("perplexity", np.array([-1.0, -3.0])) == pytest.approx(math.exp(2))
    assert aggregate("weighted_perplexity", np.array([[-10.0, 5], [-20.0, 10]])) == pytest.approx(math.exp(2))
    assert standard_error("weighted_perplexity", np.array([[-10.0, 5], [-20.0, 10]])) == pytest.approx(0)
    assert standard_error("mean", np.array([1.0])) is None
    assert aggregate("perplexity", np.array([-5000.0])) == math.inf


@pytest.mark.parametrize("kind", ["mean", "perplexity", "weighted_perplexity"])
def test_standard_errors_are_those_of_resampling(kind: str) -> None:
    words = RNG.integers(5, 30, 400)
    logs = -words * RNG.normal(1.0, 0.2, 400)
    values = np.stack([logs, words], 1) if kind == "weighted_perplexity" else logs / words
    draws = [aggregate(kind, values[RNG.integers(0, 400, 400)]) for _ in range(1000)]
    # 1000 resamples know a standard deviation to 1 / sqrt(2000) = 2.2 %
    assert standard_error(kind, values) == pytest.approx(np.std(draws), rel=0.1)


def test_pairs_are_kept() -> None:
    before = RNG.normal(0, 1, 60)
    after = before + 0.1 + RNG.normal(0, 0.01, 60)
    low, high = bootstrap_difference("mean", before, after) or (0, 0)
    assert 0.09 < low < 0.1 < high < 0.11
    low, high = bootstrap_difference("mean", before, RNG.permutation(after)) or (0, 0)
    assert low < 0 < high  # the same numbers without their pairs say nothing


def test_intervals_cover() -> None:
    found = [bootstrap_difference("mean", np.zeros(40), RNG.normal(0.3, 1, 40)) for _ in range(100)]
    assert 85 <= sum(low < 0.3 < high for low, high in filter(None, found)) <= 100


def test_without_spread() -> None:
    assert bootstrap_difference("mean", np.zeros(5), np.ones(5)) == (1.0, 1.0)
    assert bootstrap_difference("mean", np.zeros(1), np.ones(1)) is None


def test_average_over_tasks() -> None:
    small, large = RNG.normal(1.0, 0.1, 10), RNG.normal(3.0, 0.1, 1000)
    low, high = bootstrap_average([small, large]) or (0, 0)
    # a task counts once, however many samples it has
    assert low < (small.mean() + large.mean()) / 2 < high < 2.1


def row_of(task: str, value: float) -> Row:
    return Row(
        group="longbench",
        task=task,
        length=None,
        metric="m",
        value=value,
        stderr=None,
        samples=1,
        left_out=0,
        fingerprint="",
        aggregate="mean",
        source="",
    )


def test_the_papers_row() -> None:
    """DeltaNet-1.3B in Table 5 gives the Avg that is printed there, in the order that is printed there."""
    printed = [6.5, 8.7, 10.0, 4.8, 6.4, 12.4, 16.3, 9.4, 17.7, 15.1, 33.8, 29.0]
    rows = [row_of(task, value / 100) for task, value in zip(LONGBENCH, printed, strict=True)]
    (table,) = build_tables(rows[::-1], "DeltaNet-1.3B")
    assert table.header == ["Model", *["NQ", "QR", "MF", "HP", "2W", "QM", "MN", "SS", "TC", "TQ", "LC", "RP", "Avg"]]
    assert table.rows[0] == ["DeltaNet-1.3B", *map(str, printed), "14.2"]
    assert build_tables(rows[:2], "x")[0].header[-1] == "Avg of 2"
