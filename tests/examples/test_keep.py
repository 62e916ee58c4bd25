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
from examples.keep.records import means
from examples.keep.rows import beginning, cut, read_documents
from examples.keep.section import figures, scores, section
from examples.keep.settings import FileSettings
from examples.keep.tables import costs
from examples.miniature.reading import runs_digest
from examples.miniature.results import ROOT
from refine_verl.config import ConfigError
from refine_verl.data.tokenizers import open_model_tokenizer
from refine_verl.models import load_model
from refine_verl.models.lora import has_adapters
from refine_verl.prepare.longbench import TASKS
from refine_verl.scoring import main_metric, score

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
    assert (
        [question.tolist() for question in case.questions]
        == [[key] for key in store]
        == [x.tolist() for x in case.alone]
    )
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


def test_a_run_goes_on_where_it_was_cut(
    finished: Path, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
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
    (tmp_path / "reading.md").write_text(f"<!-- runs {runs_digest(results['runs'])} -->\n\nStates do so and so.\n")
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
    assert capsys.readouterr().out.endswith(f"{finished / 'results.md'}\n")
    assert "## What is kept of a document" in (finished / "results.md").read_text()
    assert (ROOT / "docs/results.md").read_bytes() == theirs
    assert command.main(["--fsat"]) == 2
    assert "--fast" in capsys.readouterr().err
    assert command.main(["--help"]) == 0
    assert "model=DIR data=FILE" in capsys.readouterr().out


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    file, page = ROOT / "examples/keep/results.json", ROOT / "docs/results.md"
    results = json.loads(file.read_text())
    assert section(results, "figures").strip() in page.read_text()
    assert all((ROOT / "docs/figures" / name).read_text() == svg for name, svg in figures(results).items())
    assert "What these figures say" in section(results)


def test_figures_of_the_guide_are_those_of_the_committed_results() -> None:
    results = json.loads((ROOT / "examples/keep/results.json").read_text())
    guide = (ROOT / "docs/keep.md").read_text()
    for arm in [arm for arm in LABELS if arm != "nothing"]:
        right = [sum(found.values()) / len(found) for found in (scores(results, arm, facts) for facts in (8, 32))]
        kept, made, _, asked, _ = costs(means([run["arms"] for run in results["runs"] if run["facts"] == 32])[arm])
        cells = [
            f"{right[0]:.3f}",
            f"{right[1]:.3f}",
            *(["the text", ""] if arm == "reading" else [kept, f"{made} s"]),
            asked,
        ]
        (line,) = [line for line in guide.splitlines() if line.startswith(f"| {LABELS[arm]}") and "0." in line]
        assert [cell.strip() for cell in line.strip("|").split("|")][1:] == cells


# A model and files

CONTEXTS = ("The grass is green. Bob has nine apples.", "Question: the sky is blue. Ann has seven apples.")
ASKED = ("What is green?", "How many has Bob?")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model over bytes, and a file in LongBench's format: two documents, three questions."""
    root = tmp_path_factory.mktemp("keep_files")
    make_model(root / "model")
    pairs = [(CONTEXTS[0], ASKED[0]), (CONTEXTS[1], ASKED[0]), (CONTEXTS[0], ASKED[1])]
    rows = [
        {"prompt": TASKS["hotpotqa"].prompt(*pair), "answers": ["nine", "9"], "max_gen_tokens": 5, "task": "hotpotqa"}
        for pair in pairs
    ]
    write_parquet(root / "hotpotqa.parquet", rows)
    return root


def file_settings(world: Path, **values: Any) -> FileSettings:
    given = {"model": str(world / "model"), "data": (str(world / "hotpotqa.parquet"),), "out": str(world / "out")}
    return FileSettings(**{**given, **values})


def test_prompts_become_documents_with_questions(world: Path) -> None:
    """Rows with the same document share it; the question begins where the published prompt says, and last."""
    first, second = read_documents(file_settings(world))
    assert first.text.endswith(CONTEXTS[0]) and second.text.endswith(CONTEXTS[1])
    assert first.text.startswith("Answer the question based on the given passages.")
    assert [question.rpartition("Question: ")[2] for question in first.questions] == [f"{x}\nAnswer:" for x in ASKED]
    assert len(second.rows) == 1 and second.rows[0].max_new_tokens == 5
    (only,) = read_documents(file_settings(world, limit=1))
    assert len(only.rows) == 2  # a limit is of documents
    asked = read_documents(file_settings(world, question="\nAnswer:"))
    assert [len(each.rows) for each in asked] == [1, 1, 1]


@pytest.mark.parametrize(
    ("task", "mark"),
    [
        ("ruler_squadqa", "\n\nAnswer the question based on the given passages."),
        ("gov_report", "\n\nNow, write a one-page summary of the report."),
        ("repobench-p", "Next line of code:"),
        ("niah_multikey_1", "\nWhat "),
        ("samsum", "\n\nDialogue: "),
        ("trec", "\nQuestion: "),
        ("mine", ""),
    ],
)
def test_where_the_question_of_a_task_begins(task: str, mark: str) -> None:
    assert beginning(task).startswith(mark) and bool(beginning(task)) == bool(mark)


def test_passages_of_a_long_document() -> None:
    document = torch.arange(23)
    for passage, lengths in ((None, [23]), (30, [23]), (10, [10, 13]), (8, [8, 8, 7]), (23, [23])):
        parts = cut(document, passage)
        assert [len(part) for part in parts] == lengths and torch.equal(torch.cat(parts), document)


def test_the_command_on_a_model_and_a_file(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All arms in a table; answers are those of `remember` and `adapt`; the same command does nothing again."""
    out = tmp_path / "out"
    words = [f"model={world / 'model'}", f"data={world / 'hotpotqa.parquet'}", f"out={out}"]
    words += ["adapt.lora_rank=2", "adapt.steps=1", "adapt.nsp.chunks=3"]
    assert command.main(words) == 0
    text = capsys.readouterr().out
    assert "2 documents" in text and "3 questions" in text and all(f"| {label} |" in text for label in LABELS.values())
    results = json.loads((out / "results.json").read_text())
    assert (out / "results.md").read_text().strip() == text.strip()
    assert results["adapters"]["refine"]["nsp"]["chunks"] == 3 and results["adapters"]["sft"]["lora_rank"] == 2

    model, (asked, _) = load_model(world / "model").eval(), read_documents(file_settings(world))
    words_of = open_model_tokenizer(None, str(world / "model"), 257, keys=("tokenizer", "model"))
    case: Case = asked.case(words_of, None)
    arms = results["documents"][0]["arms"]
    answers = refine_verl.remember(model, [asked.text], words_of).ask(asked.questions, max_new_tokens=5)
    assert arms["state"]["answers"] == arms["reading"]["answers"] == [answer.text for answer in answers]
    metric = main_metric("hotpotqa")
    right = [score("hotpotqa", answer.text, ["nine", "9"])[metric] for answer in answers]
    assert arms["state"]["score"] == pytest.approx(sum(right) / 2)
    assert words_of.decode(case.alone[0].tolist()) == asked.questions[0].lstrip() != asked.questions[0]

    monkeypatch.setattr("examples.keep.files.answer_all", lambda *args, **how: pytest.fail("answered again"))
    assert command.main(words) == 0
    assert capsys.readouterr().out == text


def test_settings_of_one_method_are_not_forced_on_the_other() -> None:
    given = {"lora_rank": 4, "nsp": {"chunks": 3}}
    assert adapters("refine", given).nsp.chunks == 3 and adapters("sft", given).lora_rank == 4
    assert adapters("sft", None).lora_rank > 0 and adapters("refine", None).lr == adapters("sft", None).lr
    with pytest.raises(ConfigError, match=r"adapt\.lora_rank.*Set a rank"):
        adapters("sft", {"lora_rank": 0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["data=none.parquet"], "data"),
        (["adapt.lora_rnk=2"], "Did you mean 'lora_rank'"),
        (["adapt.lora_rank=0"], "adapt.lora_rank: is 0"),
        (["adapt.lora_rank=2", "adapt.target_modules=[q_prj]"], "q_proj"),
        (["adapt.nsp.chunks=4000"], "needs 4005"),
        (["question=Whence"], "no document followed by 'Whence'"),
        (["task=mine"], "mine"),
        (["convention=mine"], "convention"),
        (["fast=true"], "unknown key"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], message: str
) -> None:
    given = {"model": world / "model", "data": world / "hotpotqa.parquet", "out": tmp_path / "out"}
    if change == ["task=mine"]:
        given["data"] = tmp_path / "own.jsonl"
        write_jsonl(tmp_path / "own.jsonl", [{"prompt": "A text. What?", "answers": ["nine"]}])
    words = [f"{key}={value}" for key, value in given.items() if not any(x.startswith(f"{key}=") for x in change)]
    assert command.main([*words, *change]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
