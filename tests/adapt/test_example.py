"""The recall example runs, scores what it says it scores, and its figures are those of its README."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "examples/test_time"


@pytest.fixture(scope="module")
def recall() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recall_example", FOLDER / "recall.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["recall_example"] = module
    spec.loader.exec_module(module)
    return module


def test_the_task(recall: ModuleType) -> None:
    """A store of entries, then questions with their answers; what is wanted is the value of the last key."""
    prompts, wanted = recall.sample(torch.Generator().manual_seed(0), 5)
    size = 1 + recall.VALUE_LENGTH
    assert prompts.shape == (5, (1 + recall.ROUNDS) * recall.ENTRIES * size - recall.VALUE_LENGTH)
    for prompt, value in zip(prompts.tolist(), wanted.tolist(), strict=True):
        store = {prompt[i]: prompt[i + 1 : i + size] for i in range(0, recall.ENTRIES * size, size)}
        assert len(store) == recall.ENTRIES and store[prompt[-1]] == value
        asked = prompt[recall.ENTRIES * size :: size]
        assert {asked.count(key) for key in store} == {recall.ROUNDS}
        for i in range(recall.ENTRIES * size, len(prompt) - 1, size):
            assert store[prompt[i]] == prompt[i + 1 : i + size]


def test_it_runs_and_is_reproducible(recall: ModuleType) -> None:
    preset = replace(recall.PRESETS["fast"], seeds=2, test_prompts=8, passes=1, most_base_steps=3)
    scores = recall.run(preset)
    assert scores == recall.run(preset)
    assert set(scores) == set(recall.METHODS)
    assert recall.table(scores).count("\n") == 1 + len(recall.METHODS)


def test_intervals(recall: ModuleType) -> None:
    """Mean and 95% interval by hand: 1, 2, 3 has standard error 1/sqrt(3), times 4.30."""
    assert recall.interval([1.0, 2.0, 3.0]) == "2.000 ± 2.483"


def test_the_readme_states_the_settings_that_run(recall: ModuleType) -> None:
    text = (FOLDER / "README.md").read_text()
    preset = recall.PRESETS["fast"]
    for value in (preset.lr, preset.passes, preset.test_prompts, preset.seeds):
        assert re.search(rf"(?<![\w.]){re.escape(f'{value:g}')}(?![\w.])", text), value
