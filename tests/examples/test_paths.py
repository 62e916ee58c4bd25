"""The example on ways through a graph: its task, its base, and its command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from examples.miniature.results import ROOT
from examples.paths import __main__ as command
from examples.paths.section import figures, section
from examples.paths.task import PathTask
from examples.recall.bases import MODELS
from examples.recall.jobs import Amount, Job

TINY = Amount(seeds=1, steps=1, ablation_steps=1, held_out=8, shrink=400)


def graphs(task: PathTask, row: list[int]) -> list[list[int]]:
    size = len(row) // task.rounds
    return [row[start : start + size] for start in range(0, len(row), size)]


def test_the_way_is_the_only_one() -> None:
    """From the goal back to the centre every node has one predecessor; that way, turned round, is what is asked for."""
    task = PathTask(entries=3, value_length=3, rounds=2, nodes=20)
    goals = set()
    for row in task.sample(torch.Generator().manual_seed(0), 20).tolist():
        assert len(row) == task.length and max(row) < task.vocabulary
        for graph in graphs(task, row):
            pairs = list(zip(graph[:18:2], graph[1:18:2], strict=True))
            mark, goal, centre, *way = graph[18:]
            before = {further: nearer for nearer, further in pairs}
            assert len(before) == 9 and mark == 20 and len(set(graph[:18])) == 10
            back = [goal]
            while back[-1] != centre:
                back.append(before[back[-1]])
            assert back[::-1][1:] == way and [nearer for nearer, _ in pairs].count(centre) == 3
            goals.add([further for _, further in pairs].index(goal))
    assert len(goals) == 9  # its edge may stand anywhere


def test_what_counts_as_right() -> None:
    task = PathTask(entries=2, value_length=2, rounds=2, nodes=10)
    tokens = task.sample(torch.Generator().manual_seed(0), 3)
    predictions = tokens[:, 1:].clone()
    assert task.values_right(predictions, tokens).shape == (3, 2, 2) and task.values_right(predictions, tokens).all()
    predictions[:, :10] = -1  # edges, mark, goal and centre of the first graph: 11 tokens, the first of them given
    assert task.values_right(predictions, tokens).all()
    predictions[1, 10] = -1  # the first step of its way
    right = task.values_right(predictions, tokens)
    assert right.sum() == right.numel() - 1 and not right[1, 0, 0]
    easier = task.sample(torch.Generator().manual_seed(0), 3, entries=1)
    assert task.values_right(easier[:, 1:], easier, 1).all() and easier.shape[1] < tokens.shape[1]


def test_documents_have_room_for_all_positions() -> None:
    """c = 32 positions with k = 5 tokens behind each."""
    assert MODELS["paths"].task.length >= 32 + 5


def test_the_command_ends_on_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job("base", "paths", 0), Job("signal", "paths", 0, "plateau")]
    assert set(jobs) <= set(command.jobs(["paths"], command.FULL))
    example = dataclasses.replace(command.PATHS, fast=TINY, jobs=lambda models, amount: jobs)
    command.main(["--fast", "--out", str(tmp_path), "--processes", "1"], example)
    text = (tmp_path / "results.md").read_text()
    for part in ("## Ways through a graph", "### Base models", "### Training from the plateau", "SFT, cost of *paper*"):
        assert part in text, part
    assert "first token" in text and (tmp_path / "figures/paths_first.svg").is_file()


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    file, page = ROOT / "examples/paths/results.json", ROOT / "docs/results.md"
    results = json.loads(file.read_text())
    assert section(results, "figures").strip() in page.read_text()
    assert all((ROOT / "docs/figures" / name).read_text() == svg for name, svg in figures(results).items())
    assert "**What these figures say" in page.read_text()
    results["jobs"] = results["jobs"][:-1]  # another run: what was read from this one does not go with it
    assert "**What these figures say" not in section(results, "figures")
