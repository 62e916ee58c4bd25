"""The benchmark scripts on the smallest LaCT: what they count and when they refuse to report. No times."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def generation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.generation")


@pytest.mark.parametrize(("sample", "timed"), [(4, 4), (0, 12), (50, 12)])
def test_generation_times_a_sample_and_scales_it(generation: ModuleType, sample: int, timed: int) -> None:
    result = generation.run("tiny_lact", prompt=70, new=12, sample=sample, rounds=2)
    assert result["regenerated_tokens_timed"] == timed
    assert result["regenerate_s"] == pytest.approx(12 * result["regenerate_timed_s"] / timed)
    assert result["regenerate_over_state"] == pytest.approx(result["regenerate_s"] / result["state_s"])
    text = generation.table(result)
    assert ("every one of 12" in text) == (timed == 12) and ("scaled from 4 of 12" in text) == (timed == 4)


def test_a_sample_is_spread_evenly(generation: ModuleType) -> None:
    assert generation.sampled_steps(256, 4) == [32, 96, 160, 224]
    assert generation.sampled_steps(5, 0) == [0, 1, 2, 3, 4]


def test_nothing_is_reported_if_other_tokens_are_written(
    generation: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = generation.Generation.from_state

    def wrong(self: object) -> Tensor:
        tokens = honest(self).clone()
        tokens[0, -1] = (tokens[0, -1] + 1) % 128
        return tokens

    monkeypatch.setattr(generation.Generation, "from_state", wrong)
    with pytest.raises(SystemExit, match="below the largest"):
        generation.run("tiny_lact", prompt=70, new=12, sample=0, rounds=1)


def test_a_step_costs_as_many_tokens_as_forking_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    step_cost = importlib.import_module("benchmarks.step_cost")
    bench = step_cost.Bench(step_cost.PRESETS["tiny_lact"], step_cost.NSPSettings())
    assert bench.actor.config.model_type == "lact_swiglu"
    assert max(step_cost.compare(bench).values()) < 1e-3
    # 1 to read, at most 1/8 to replay, 1 to train, and c (k + k - 1) / T for the rollouts and their branches
    assert 2 < step_cost.count_tokens(bench, "fork") <= 2.125 + 8 * 9 / 256
    assert step_cost.count_tokens(bench, "prefix") > 8
