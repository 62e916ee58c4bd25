"""The file of predictions: what a kill leaves of it, and the means over it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from refine_verl.config import ConfigError
from refine_verl.record.predictions import PredictionsFile, mean_scores


def rows_of(path: Path) -> list[dict[str, Any]]:
    file = PredictionsFile(path)
    file.close()
    return file.rows


def test_rows_come_back_and_a_torn_line_does_not(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    file = PredictionsFile(path)
    file.write([{"id": "a", "prediction": "é\n|"}, {"id": "b", "loss": math.nan, "curve": [{"loss": math.inf}]}])
    file.close()
    assert rows_of(path) == [
        {"id": "a", "prediction": "é\n|"},
        {"id": "b", "loss": None, "curve": [{"loss": None}]},
    ]
    with path.open("a") as torn:
        torn.write('{"id": "c", "pred')
    again = PredictionsFile(path)
    assert [row["id"] for row in again.rows] == ["a", "b"]
    again.write([{"id": "c"}])
    again.close()
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b", "c"]


def test_rows_that_do_not_hold_any_more_are_dropped_and_the_others_keep_their_place(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    file = PredictionsFile(path)
    file.write([{"id": str(step), "step": step} for step in range(4)])
    file.close()
    kept = PredictionsFile(path, lambda row: row["step"] != 2)
    assert [row["step"] for row in kept.rows] == [0, 1, 3] == [row["step"] for row in rows_of(path)]
    kept.close()


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"id": "a"}\nnotes\n{"id": "b"}\n')
    with pytest.raises(ConfigError, match="line 2: not a prediction"):
        PredictionsFile(path)
    assert path.read_text().splitlines()[1] == "notes"


def test_a_last_line_that_ends_is_not_torn(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"id": "a"}\nnotes\n')
    with pytest.raises(ConfigError, match="line 2: not a prediction"):
        PredictionsFile(path)
    path.write_text('{"id": "a"}\n{"id": "b"}')
    assert [row["id"] for row in rows_of(path)] == ["a", "b"]  # whole but for its line end


def test_means_by_task(tmp_path: Path) -> None:
    rows = [
        {"task": "qa", "scores": {"f1": 1.0}, "scores_before": {"f1": 0.5}},
        {"task": "qa", "scores": {"f1": 0.0}},
        {"task": "code", "scores": {"similarity": 0.25}},
    ]
    assert mean_scores(rows) == {"val/qa/f1": 0.5, "val/code/similarity": 0.25}
    assert mean_scores(rows, "scores_before", "before/") == {"val/qa/before/f1": 0.5}
