"""Mid-training on real text in miniature: the corpus, the scores, one plan from end to end."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.miniature.reading import runs_digest
from examples.text import __main__ as command
from examples.text import plan as plan_module
from examples.text.arms import METHODS, PAPER, POSITION, SFT, Training, run
from examples.text.base import BaseSettings, train_base
from examples.text.corpus import Corpus, load_corpus
from examples.text.plan import Plan, collect
from examples.text.scores import all_scores, next_token_scores, rollout_scores
from examples.text.section import attenuation, difference, figures, read_runs, section

TINY = BaseSettings(
    hidden=16, layers=1, heads=1, vocabulary=16, steps=30, warmup=2, batch=4, validate_every=10, validate_on=4
)
TRAINING = Training(steps=4, batch=4, mini_batch=2, chunks=2, rollout_length=3)
PLAN = Plan(
    TINY,
    TRAINING,
    length=48,
    held_out=4,
    bases=1,
    seeds=2,
    lrs=(1e-3,),
    sweep_lr=1e-3,
    sweep=(1.0,),
    lr_sweep=(),
    signal_batches=3,
    many_steps=2,
    many_seeds=2,
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Counting up modulo 16 from random starts, with a random token now and then."""
    generator = torch.Generator().manual_seed(0)
    windows = (torch.randint(0, 16, (24, 1), generator=generator) + torch.arange(48)) % 16
    noise = torch.rand(windows.shape, generator=generator) < 0.1
    windows = torch.where(noise, torch.randint(0, 16, windows.shape, generator=generator), windows)
    return Corpus(windows[:16], windows[16:20], windows[20:], "counting")


@pytest.fixture(scope="module")
def finished(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a plan that has run."""
    directory = tmp_path_factory.mktemp("finished")
    collect(PLAN, directory, corpus)
    return directory


@pytest.fixture
def results(finished: Path) -> dict[str, Any]:
    """What it left."""
    found: dict[str, Any] = json.loads((finished / "results.json").read_text())
    return found


def test_corpus_is_split_by_files_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "held"):
        (tmp_path / split).mkdir()
        for index in range(22 if split == "train" else 3):
            (tmp_path / split / f"{index:02d}.txt").write_text(f"{split} {index} " * 40)
    monkeypatch.setattr("examples.text.corpus.TRAIN_FILES", (str(tmp_path / "train"),))
    monkeypatch.setattr("examples.text.corpus.TEST_FILES", (str(tmp_path / "held"),))
    out = tmp_path / "out"
    corpus = load_corpus(out, vocabulary=300, length=32, held_out=3)
    assert corpus.length == 32 and len(corpus.validation) == 3 and len(corpus.test) == 3
    again = load_corpus(out, vocabulary=300, length=32, held_out=3)
    assert again.fingerprint == corpus.fingerprint and torch.equal(again.train, corpus.train)
    everything = load_corpus(out, vocabulary=300, length=32, held_out=10_000)
    train, validation = ({tuple(row) for row in part.tolist()} for part in (everything.train, everything.validation))
    assert validation and not train & validation
    assert len(everything.validation) < len(everything.train) and torch.equal(everything.train, corpus.train)


def test_orders_of_windows_are_the_seeds(corpus: Corpus) -> None:
    def first(seed: int) -> list[int]:
        order = corpus.epochs(seed)
        return [next(order) for _ in range(40)]

    assert first(1) == first(1) != first(2)
    assert sorted(first(1)[:16]) == list(range(16))


def test_scores_are_what_generation_writes(corpus: Corpus) -> None:
    base = train_base(replace(TINY, steps=60), corpus, 0)
    actor, k = TINY.actor(base.weights), 3
    scores = next_token_scores(actor, corpus.test, k)
    right, places = 0, 0
    for window in corpus.test[:, :24]:
        for end in range(1, len(window) - k + 1):
            text = window[None, :end]
            for _ in range(k):
                with torch.no_grad():
                    logits = actor(input_ids=text, use_cache=False).logits[:, -1:]
                text = torch.cat([text, logits.argmax(dim=-1)], dim=1)
            right += int(torch.equal(text[0, end:], window[end : end + k]))
            places += 1
    assert 0 < right < places
    assert next_token_scores(actor, corpus.test[:, :24], k)["greedy_match"] == pytest.approx(right / places, abs=1e-6)
    assert 0 < scores["sampled_match"] < scores["greedy_match"] < scores["ntp_accuracy"] < 1
    untrained = next_token_scores(TINY.actor(train_base(replace(TINY, steps=1), corpus, 0).weights), corpus.test, k)
    assert untrained["ntp_loss"] > scores["ntp_loss"] and untrained["ntp_accuracy"] < scores["ntp_accuracy"]


def test_rollouts_of_a_better_model_are_rewarded_more(corpus: Corpus) -> None:
    weak, strong = (TINY.actor(train_base(replace(TINY, steps=steps), corpus, 0).weights) for steps in (1, 100))
    assert rollout_scores(strong, corpus.test, 3) == rollout_scores(strong, corpus.test, 3)
    assert (
        rollout_scores(strong, corpus.test, 3)["reward_binary"] > rollout_scores(weak, corpus.test, 3)["reward_binary"]
    )


def test_a_temperature_makes_predictions_sharper(corpus: Corpus) -> None:
    actor = TINY.actor(train_base(TINY, corpus, 0).weights)
    plain, same, cold = (all_scores(actor, corpus.test, 3, *given) for given in ((), (1.0,), (0.5,)))
    assert plain == same and cold["entropy"] < plain["entropy"]
    assert cold["ntp_accuracy"] == plain["ntp_accuracy"] and cold["greedy_match"] == plain["greedy_match"]
    logits = actor(input_ids=corpus.test).logits[:, :-1].double() / 0.5
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), corpus.test[:, 1:].flatten())
    assert cold["ntp_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert cold["reward_cosine"] != plain["reward_cosine"]


def test_methods_see_the_same_windows_for_as_many_steps(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[list[int]]] = {}
    real = plan_module.run.__globals__["documents"]
    weights = train_base(TINY, corpus, 0).weights
    for method in METHODS:
        batches: list[Any] = []

        def record(windows: torch.Tensor, batches: list[Any] = batches) -> Any:
            batches.extend(windows.tolist())
            return real(windows)

        monkeypatch.setattr("examples.text.arms.documents", record)
        found = run(method, TRAINING, 1e-3, 5, TINY, weights, corpus, corpus.test)
        assert list(found["scores"]) == [str(TRAINING.steps)]
        seen[method.name] = batches
    assert seen["sft"] == seen["paper"] == seen["grouped"] and len(seen["sft"]) == 8


def test_cost_of_a_step_is_counted(corpus: Corpus) -> None:
    weights = train_base(TINY, corpus, 0).weights
    passes = {
        method.name: run(method, TRAINING, 1e-3, 0, TINY, weights, corpus, corpus.test)["passes"] for method in METHODS
    }
    length, c, k = corpus.length, TRAINING.chunks, TRAINING.rollout_length
    assert passes["sft"] == 1.0
    for method, n in ((PAPER, 1), (POSITION, 8)):
        assert passes[method.name] == pytest.approx(((1 + c * n * k / length) + 3 * (1 + c * n * (k - 1) / length)) / 3)


def test_a_plan_runs_to_tables(results: dict[str, Any]) -> None:
    assert [one["temperature"] for one in results["sharpened"]] == list(PLAN.temperatures)
    assert len(results["runs"]) == 2 * len(METHODS) and len(results["sweep"]) == 3
    assert results["bases"][0]["curve"][0][1] > results["bases"][0]["scores"]["validation"]["ntp_loss"] - 1e-3
    steps = sorted(int(step) for run_ in results["runs"] if run_["method"] == "sft" for step in run_["scores"])
    assert steps[0] == TRAINING.steps < steps[-1]
    assert all(0 <= one["with_signal"] <= 1 and -1 <= one["along_sft"] <= 1 for one in results["signal"])
    text = section(results)
    assert (
        text.startswith("## Real text")
        and "grouped minus SFT, same compute" in text
        and "Sharper predictions" in text
        and "nan" not in text
    )
    assert all(drawing.startswith("<svg") for drawing in figures(results).values())
    assert difference(results, 1e-3, "paper", "ntp_loss").count == 2


def test_many_rollouts_are_compared_in_runs_of_their_own(results: dict[str, Any]) -> None:
    """Shorter ones, with SFT that costs as much; their base may be another one than that of the other runs."""
    assert [(run_["method"], run_["seed"]) for run_ in results["many"]] == [
        (name, seed) for seed in range(2) for name in ("many5", "sft")
    ]
    passes = results["many"][0]["passes"]
    c, n, k, length = 32, 8, TRAINING.rollout_length, PLAN.length
    assert passes == pytest.approx(((1 + c * n * k / length) + 3 * (1 + c * n * (k - 1) / length)) / 3, rel=1e-4)
    assert list(results["many"][1]["scores"]) == ["2", str(round(2 * passes))]
    text = section(results)
    _, _, part = text.partition("### Many rollouts")
    part, _, _ = part.partition("###")
    assert "2 optimiser steps at learning rate 0.001 from the same base model, 2 pairs" in part
    assert "| many5 minus SFT, same compute |" in part and "grouped" not in part
    other = {**results, "bases": [{**results["bases"][0], "base": 0}], "many_bases": results["bases"]}
    assert "from a base model trained anew with the same settings" in section(other)
    cut = {**results, "many": results["many"][:1]}  # SFT, the last, has not run
    assert "### Many rollouts" not in section(cut)


def test_only_what_is_new_can_be_run(
    results: dict[str, Any], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into the results that are there: the runs with many rollouts, with their base, and the gradients."""
    ran = []
    monkeypatch.setattr(plan_module, "run", lambda *args: (ran.append(args[0].name), {"passes": 2.0, "scores": {}})[1])
    monkeypatch.setattr(plan_module, "gradient_signal", lambda *args: {"signal": 1.0})
    new = collect(PLAN, tmp_path, corpus, only_many=True)
    assert ran == ["many5", "sft", "many5", "sft"] and not new["runs"] and not new["sweep"]
    known = {**results, "plan": {**results["plan"], "many_steps": 1}}
    both = command.with_many(known, new)
    assert both["runs"] == results["runs"] and both["bases"] == results["bases"]
    assert both["many"] == new["many"] and both["many_bases"] == new["bases"] and both["signal"] == new["signal"]
    assert both["plan"] == results["plan"]


def test_a_run_goes_on_where_it_was_cut(
    finished: Path, results: dict[str, Any], tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "pieces" / "test-sft-lambda0-lr0.001-base0-seed1.json").unlink()
    ran = []
    real = plan_module.run
    monkeypatch.setattr(plan_module, "run", lambda *args: (ran.append(args[0]), real(*args))[1])
    again = collect(PLAN, tmp_path, corpus)
    assert ran == [SFT]
    assert [run_["scores"] for run_ in again["runs"]] == [run_["scores"] for run_ in results["runs"]]
    assert again["signal"] == results["signal"]
    monkeypatch.setattr(plan_module, "gradient_signal", lambda *args: {})
    collect(replace(PLAN, training=replace(TRAINING, chunks=3), seeds=1, sweep=()), tmp_path, corpus)
    assert len(ran) > 3  # records of other settings are not taken


def test_bold_stands_for_intervals_on_one_side(results: dict[str, Any]) -> None:
    """Made-up figures: the table must say what is better, worse, and undecided."""
    for run_ in results["runs"]:
        for scores in run_["scores"].values():
            shift = {"sft": 0.0, "paper": 1.0, "grouped": -1.0, "grouped5": 0.0}[run_["method"]]
            scores.update(ntp_loss=2.0 + shift, ntp_accuracy=0.5 + shift, reward_binary=0.1 * run_["seed"] * shift)
    rows = [line for line in section({**results, "many": []}).splitlines() if "minus SFT, same steps" in line]
    paper, grouped, _ = ([cell.strip() for cell in line.split("|")] for line in rows)
    assert paper[2] == "*+1.0000 ± 0.0000*" and grouped[2] == "**-1.0000 ± 0.0000**"
    assert paper[3].startswith("**+1") and grouped[3].startswith("*-1") and not paper[7].startswith("*")


def test_what_was_read_from_other_runs_is_not_shown(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = tmp_path / "reading.md"
    monkeypatch.setattr("examples.text.section.READING", reading)
    reading.write_text(f"<!-- runs {runs_digest(read_runs(results))} -->\n\nREFINE does so and so.\n")
    assert "REFINE does so and so." in section(results)
    results["runs"][0]["scores"][str(TRAINING.steps)]["ntp_loss"] += 1e-3
    assert "REFINE does so and so." not in section(results)


def test_the_command(results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast run makes a page of its own; the project's is for full runs."""

    def collected(plan: Plan, out: Path, only_many: bool) -> None:
        out.mkdir(exist_ok=True)
        (out / "results.json").write_text(json.dumps(results))

    monkeypatch.setattr(command, "collect", collected)
    theirs = (command.ROOT / "docs/results.md").read_bytes()
    assert command.main(["--fast", "--out", str(tmp_path / "out")]) == 0
    assert "## Real text" in (tmp_path / "out/results.md").read_text()
    assert {path.name for path in (tmp_path / "out/figures").iterdir()} == set(figures(results))
    assert (command.ROOT / "docs/results.md").read_bytes() == theirs
    (tmp_path / "docs").mkdir()
    (tmp_path / "text.json").write_text("{}")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "project_sources", lambda: {"text": tmp_path / "text.json"})
    assert command.publish(tmp_path / "out", whole=True) == tmp_path / "docs/results.md"
    assert json.loads((tmp_path / "text.json").read_text()) == results
    command.publish(tmp_path / "out", whole=True, only_many=True)
    assert json.loads((tmp_path / "text.json").read_text()) == {**results, "many_bases": results["bases"]}


def test_a_run_that_was_cut_is_shown_for_the_pairs_that_all_have(results: dict[str, Any]) -> None:
    """One seed of one method too few: what the others have of it does not enter their means either."""
    lr, last = PLAN.lrs[0], max(run_["seed"] for run_ in results["runs"])
    whole = len({(run_["base"], run_["seed"]) for run_ in results["runs"]})
    assert f"### Learning rate {lr:g}, {whole} pairs" in section(results)
    cut = [run_ for run_ in results["runs"] if (run_["method"], run_["seed"]) != ("grouped", last)]
    for run_ in cut:
        if run_["seed"] == last:
            for scores in run_["scores"].values():
                scores.update(ntp_loss=1e9)
    text = section({**results, "runs": cut})
    assert f"### Learning rate {lr:g}, {whole - len({run_['base'] for run_ in cut})} pairs" in text
    assert "1000000000" not in text


def test_how_large_a_cosine_of_noisy_means_can_be() -> None:
    """Two parallel expectations under independent noise: the cosine of means of R draws is what the formula says."""
    generator = torch.Generator().manual_seed(0)
    size, draws, scale = 4000, 16, 0.1
    direction = torch.randn(size, generator=generator)
    means = [scale * direction + torch.randn(400, size, generator=generator) / draws**0.5 for _ in range(2)]
    found = torch.nn.functional.cosine_similarity(*means, dim=1).mean().item()
    signal = scale**2
    assert attenuation(signal, signal, draws) == pytest.approx(found, rel=0.05)
    assert attenuation(0.01, -0.1, 16) == 0.0
