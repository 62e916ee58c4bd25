"""`python -m benchmarks.load`: that it measures what it says, and finds a leak of one process among many."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from reference.runs import TIMEOUT, environment, toy_overrides, write_corpus

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.load")


def samples(leak: float = 0.0, objects: float = 0.0, slower: float = 0.0) -> list[dict[str, float]]:
    """100 steps of two workers; the second leaks MB, the store gains MB, steps take longer by seconds per step."""
    return [
        {
            "step": float(step),
            "driver": 800.0 + step % 3,
            "worker/30": 600.0 + step % 2,
            "worker/9": 600.0 + leak * step,
            "raylet": 30.0,
            "gcs": 40.0,
            "store": 0.05 + objects * step,
            "objects": 4.0,
            "references": 8.0,
            "created": 0.1 * step,
            # every tenth step validates, too
            "processor": step + slower * step**2 / 2 + 5 * (step // 10),
        }
        for step in range(101)
    ]


METRICS = [
    {"step": step, "timing_s/step": 1.0 + 0.01 * (step % 5), **({"timing_s/validate": 5.0} if step % 10 == 0 else {})}
    for step in range(1, 101)
]


@pytest.mark.parametrize(
    ("wrong", "name"),
    [({}, None), ({"leak": 0.5}, "worker 1"), ({"objects": 0.1}, "store"), ({"slower": 0.01}, "processor")],
)
def test_what_grows_is_named(load: ModuleType, wrong: dict[str, float], name: str | None) -> None:
    trends = load.judge(load.tidy(samples(**wrong), METRICS))
    assert [key for key, trend in trends.items() if trend.verdict == "grows"] == ([name] if name else [])
    assert {trend.verdict for key, trend in trends.items() if key != name} == {"flat"}


def test_validation_is_no_part_of_a_step(load: ModuleType) -> None:
    steps, seconds = load.tidy(samples(), METRICS)["processor"]
    assert not [step for step in steps if step % 10 == 0] and set(seconds) == {1.0}


def test_processes_by_what_they_are(load: ModuleType) -> None:
    assert load.role_of(["ray::NSPRolloutWorker.update", ""]) == "worker"
    assert load.role_of(["/x/ray/core/src/ray/raylet/raylet", "--port=1"]) == "raylet"
    assert load.role_of(["/x/gcs_server"]) == "gcs"
    assert load.role_of(["python", "-m", "raylet"]) is None and load.role_of([]) is None


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.runs
def test_a_short_run(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    toy = toy_overrides(tmp_path, tmp_path / "run")
    overrides = [item for item in toy if not item.startswith(("recipe=", "trainer."))]
    command = [sys.executable, "-m", "benchmarks.load", "--steps", "24", "--save-every", "12", "--validate-every", "8"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "load.json"), *overrides],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode in (0, 1), done.stderr[-3000:]  # so short a run may seem to grow
    seen = json.loads((tmp_path / "load.json").read_text())
    assert ("nothing grows" in done.stdout) == (done.returncode == 0)
    series = seen["series"]
    assert {
        "driver",
        "worker 0",
        "worker 1",
        "raylet",
        "gcs",
        "store",
        "step",
        "processor",
    } <= series.keys()
    assert series["step"]["step"] == list(range(1, 25)) and min(series["step"]["value"]) > 0
    for name in ("driver", "worker 0", "worker 1"):
        assert len(series[name]["value"]) > 16 and min(series[name]["value"]) > 50, name
    assert max(series["store"]["value"]) < 1 and seen["created_mb_per_step"] < 1  # contract: less than 1 MB a step
    assert seen["trends"]["driver"]["low"] <= seen["trends"]["driver"]["slope"] <= seen["trends"]["driver"]["high"]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["cache", "load.json", "train.jsonl", "validation.jsonl"]
