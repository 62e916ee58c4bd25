"""The example on what is kept of a document: its arms, its miniature, and the command on a model and a file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.evaluate_files import make_model, write_jsonl, write_parquet

import refine_verl
from examples.keep import __main__ as command
from examples.keep import plan as plan_module
from examples.keep.arms import LABELS, Case, Meter, answer_all
from examples.keep.facts import PASSAGE, Reader, make_case
from examples.keep.files import adapters
from examples.keep.plan import Plan, Training, collect, tried
from examples.keep.rows import beginning, cut, read_documents
from examples.keep.section import figures, runs_digest, section
from examples.keep.settings import FileSettings
from examples.miniature.results import ROOT
from refine_verl.config import ConfigError
from refine_verl.models.lora import has_adapters

READER = Reader(facts=3, easy_steps=1, steps=1, decay_steps=1)
TRAINING = Training(rank=2, lr=1e-2, steps=2)
PLAN = Plan(
    READER,
    facts=(8, 12),
    seeds=2,
    documents=1,
    tuning=tried((2,), (1e-2, 2e-2), (1,)),
    tuning_seeds=1,
    tuning_documents=1,
    tuning_facts=(8,),
)


def settings(training: Training = TRAINING, reader: Reader = READER) -> dict[str, Any]:
    return {method: training.settings(method, reader, 0) for method in ("sft", "refine")}


@pytest.fixture(scope="module")
def model() -> Any:
    return READER.spec.model(3).eval()


# Documents of facts


def test_a_document_and_its_questions() -> None:
    """Every fact is asked for, and begins a passage of facts of the document."""
    case, answers = make_case(READER, 12, torch.Generator().manual_seed(0))
    store = {row[0]: row[1:] for row in case.document.unflatten(0, (12, 4)).tolist()}
    assert len(store) == 12 and answers.tolist() == list(store.values())
    assert [question.tolist() for question in case.questions] == [[key] for key in store] == [x.tolist() for x in case.alone]
    assert [passage[0].item() for passage in case.passages] == list(store)
    for passage in case.passages:
        facts = passage.unflatten(0, (-1, 4)).tolist()
        assert len({fact[0] for fact in facts}) == PASSAGE and all(store[fact[0]] == fact[1:] for fact in facts)
    assert len({tuple(passage[4:8].tolist()) for passage in case.passages}) > 2


# Arms


def test_a_state_answers_as_reading_again_does(model: Any) -> None:
    """The same tokens from less: the document once, and a size that does not depend on its length."""
    sizes = []
    for facts in (8, 16):
        case, _ = make_case(READER, facts, torch.Generator().manual_seed(facts))
        found = answer_all(model, case, {}, stop_tokens=(), batch_size=4)
        assert list(found) == ["nothing", "reading", "state"]
        state, reading = found["state"], found["reading"]
        assert all(torch.equal(*pair) for pair in zip(state.answers, reading.answers, strict=True))
        assert not all(torch.equal(*pair) for pair in zip(state.answers, found["nothing"].answers, strict=True))
        # of each answer the last token is not read
        assert state.making_passes == 4 * facts and state.asking_passes == facts * (1 + 2)
        assert reading.making_passes == 0 and reading.asking_passes == facts * (4 * facts + 1 + 2)
        assert reading.kept_bytes == 4 * 4 * facts and found["nothing"].kept_bytes == 0
        sizes.append(state.kept_bytes)
    assert sizes[0] == sizes[1] == refine_verl.remember(model, [case.document]).num_bytes


def test_adapters_learn_the_document_and_leave_the_model_as_it_was(model: Any) -> None:
    case, answers = make_case(READER, 8, torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    strong = Training(rank=8, lr=3e-2, steps=40)
    found = answer_all(model, case, {"sft": settings(strong)["sft"]}, stop_tokens=())
    right = {arm: (torch.stack(each.answers) == answers).all(dim=1).sum().item() for arm, each in found.items()}
    assert right["sft"] >= 6 and max(right["nothing"], right["state"]) <= 1
    after = model.state_dict()
    assert not has_adapters(model) and all(torch.equal(value, after[name]) for name, value in before.items())
    with refine_verl.adapt(model, list(case.passages), settings(strong)["sft"]) as adapted:
        again = adapted.generate(list(case.alone), max_new_tokens=3, stop_tokens=())
        size = sum(p.numel() * 4 for name, p in adapted.model.named_parameters() if "lora_" in name)
        memory = refine_verl.remember(adapted.model, [case.document])
        both = memory.ask(list(case.questions), max_new_tokens=3, stop_tokens=())
    assert all(torch.equal(*pair) for pair in zip(again, found["sft"].answers, strict=True))
    assert all(torch.equal(one.tokens, two) for one, two in zip(both, found["sft_state"].answers, strict=True))
    assert found["sft"].kept_bytes == size and found["sft_state"].kept_bytes == size + memory.num_bytes
    # 40 passes over 8 passages of 32 tokens, forward and backward
    assert found["sft"].making_passes == 40 * 8 * 32 * 3
    assert found["sft_state"].making_passes == found["sft"].making_passes + 32


def test_rollouts_of_refine_are_counted(model: Any) -> None:
    """More than the same passes of SFT: reading, rollouts, and the branches that are trained."""
    case, _ = make_case(READER, 8, torch.Generator().manual_seed(0))
    found = answer_all(model, case, settings(), stop_tokens=())
    assert list(found) == list(LABELS)
    trunk, positions, length = 8 * 32, 8 * 8, 3
    expected = 2 * (trunk + positions * length + 3 * (trunk + positions * (length - 1)))
    assert found["refine"].making_passes == pytest.approx(expected, rel=0.05)
    assert found["sft"].making_passes == 2 * 3 * trunk


def test_seconds_are_of_the_processor(model: Any) -> None:
    meter = Meter(model)
    mark = meter.mark()
    torch.randn(400, 400) @ torch.randn(400, 400)
    seconds, passes = meter.since(mark)
    assert seconds > 0 and passes == 0


# The miniature


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("keep") / "out"
    collect(PLAN, out)
    return out


@pytest.fixture
def results(finished: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((finished / "results.json").read_text())
    return found


def test_a_plan_runs_to_tables(results: dict[str, Any]) -> None:
    assert [(run["seed"], run["facts"]) for run in results["runs"]] == [(0, 8), (0, 12), (1, 8), (1, 12)]
    assert all(list(run["arms"]) == list(LABELS) for run in results["runs"])
    assert [base["seed"] for base in results["bases"]] == [0, 1]
    text = section(results, "figures")
    for part in ("## What is kept of a document", "### Costs, documents of 12 facts", "### Settings of adapters"):
        assert part in text, part
    assert all(label in text for label in LABELS.values()) and "nan" not in text
    assert figures(results)["keep_exact.svg"].startswith("<svg")


def test_each_method_has_the_settings_that_were_best_on_other_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, dict[str, Training]]] = []

    def asked(self: Any, name: str, seed: int, facts: int, documents: int, training: Any) -> dict[str, Any]:
        seen.append((seed, dict(training)))
        first = training["sft"] == PLAN.tuning[0]
        values = {"sft": 0.2 + first, "refine": 0.2 - 0.1 * first}
        return {arm: {"score": values.get(arm, 0.0)} for arm in LABELS}

    monkeypatch.setattr(plan_module._Work, "_asked", asked)
    monkeypatch.setattr(plan_module._Work, "base", lambda self, seed: None)
    results = collect(PLAN, tmp_path)
    tuned, used = ([entry for entry in seen if (entry[0] >= 1000) == late] for late in (True, False))
    assert len(tuned) == 2 and len(used) == 4
    assert all(training == {"sft": PLAN.tuning[0], "refine": PLAN.tuning[1]} for _, training in used)
    assert results["chosen"]["refine"] == dataclasses.asdict(PLAN.tuning[1])


def test_a_run_goes_on_where_it_was_cut(finished: Path, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    real = plan_module.answer_all
    monkeypatch.setattr(plan_module, "answer_all", lambda *args, **how: (ran.append(1), real(*args, **how))[1])
    (finished / "pieces/facts12-seed1.json").unlink()
    again = collect(PLAN, finished)
    assert len(ran) == 1 and again["bases"] == results["bases"] and again["tuning"] == results["tuning"]
    shown = [[run["arms"][arm]["score"] for arm in LABELS] for run in again["runs"]]
    assert shown == [[run["arms"][arm]["score"] for arm in LABELS] for run in results["runs"]]
    collect(dataclasses.replace(PLAN, documents=2, tuning=(TRAINING,), seeds=1, facts=(8,)), finished)
    assert len(ran) == 3  # records of other settings are not taken


def test_what_was_read_from_other_runs_is_not_shown(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("examples.keep.section.READING", tmp_path / "reading.md")
    (tmp_path / "reading.md").write_text(f"<!-- runs {runs_digest(results)} -->\n\nStates do so and so.\n")
    assert "States do so and so." in section(results)
    results["runs"][0]["arms"]["sft"]["score"] += 1e-3
    assert "States do so and so." not in section(results)


def test_the_command_of_the_miniature(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fast run makes a page of its own; the project's is for full runs."""
    monkeypatch.setattr(plan_module, "PLANS", {"fast": PLAN})
    theirs = (ROOT / "docs/results.md").read_bytes()
    assert command.main(["--fast", f"out={finished}"]) == 0
    assert capsys.readouterr().out == f"{finished / 'results.md'}\n"
    assert "## What is kept of a document" in (finished / "results.md").read_text()
    assert (ROOT / "docs/results.md").read_bytes() == theirs
    assert command.main(["--fsat"]) == 2
    assert "--fast" in capsys.readouterr().err
    assert command.main(["--help"]) == 0
    assert "model=DIR data=FILE" in capsys.readouterr().out
