"""The recall example: its task, its base models, every kind of job through the command, and what a cut run leaves."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.recall import __main__ as command
from examples.recall import runner
from examples.recall.arms import ABLATIONS, HEADLINE, MANY_WEIGHTS, PAPER, QUESTION, Arm, many
from examples.recall.bases import MODELS, RECALL, BaseSpec, train_base
from examples.recall.jobs import ARMS, Amount, Job, all_jobs, run_job
from examples.recall.noise import ESTIMATORS, alignment, signal_to_noise
from examples.recall.noise import PAPER as PAPERS_ESTIMATOR
from examples.recall.records import Records
from examples.recall.scores import batches, held_out, score
from examples.recall.section import figures, section
from examples.recall.task import Task
from refine_verl.compose.composition import compose_config
from refine_verl.config import REWARDS, SELECTIONS
from refine_verl.models import make_actor

TINY = Amount(
    seeds=1,
    steps=1,
    ablation_steps=1,
    held_out=8,
    draws=2,
    noise_batch=1,
    bound_rollouts=2,
    prompts=8,
    passes=1,
    shrink=400,
)


# The task


def test_the_task() -> None:
    """A store, then every key once per round with its value; what can be known is what follows a key of a round."""
    task = Task(entries=3, value_length=2, rounds=2, keys=5, values=7)
    for row in task.sample(torch.Generator().manual_seed(0), 20).tolist():
        assert len(row) == task.length == 27
        store = {row[i]: row[i + 1 : i + 3] for i in range(0, 9, 3)}
        assert len(store) == 3 and all(key < 5 for key in store)
        for start in (9, 18):
            asked = {row[i]: row[i + 1 : i + 3] for i in range(start, start + 9, 3)}
            assert asked == store


def test_what_counts_as_right() -> None:
    task = Task(entries=2, value_length=2, rounds=1, keys=5, values=7)
    tokens = task.sample(torch.Generator().manual_seed(0), 3)
    predictions = tokens[:, 1:].clone()
    assert task.values_right(predictions, tokens).shape == (3, 2, 2) and task.values_right(predictions, tokens).all()
    predictions[:, :6] = -1  # the store and the first key of the round
    predictions[1, 6] = -1  # the first token of its value
    right = task.values_right(predictions, tokens)
    assert right.sum() == right.numel() - 1 and not right[1, 0, 0]
    predictions[:, 8] = -1  # the second key
    assert torch.equal(task.values_right(predictions, tokens), right)


def test_held_out_sequences_are_not_trained_on() -> None:
    task = MODELS["deltanet"].task
    seen = {tuple(row) for part in batches(task, 0, 16, 4) for row in part.tolist()}
    assert len(seen) == 64 and not seen & {tuple(row) for row in held_out(task, 0, 64).tolist()}
    assert torch.equal(batches(task, 0, 16, 2)[1], batches(task, 0, 16, 4)[1])


# Base models and scores


@pytest.mark.parametrize("name", MODELS)
def test_bases(name: str) -> None:
    """Two different sets of weights, the same every time, between 0.1 and 1 million parameters."""
    short = dataclasses.replace(MODELS[name], easy_steps=1, steps=2, decay_steps=2)
    one, two = train_base(short, 3), train_base(short, 3)
    assert 1e5 <= one.parameters <= 1e6 and one.steps == 4 + (short.easy_steps > 0)
    for state, weights in one.weights.items():
        assert all(torch.equal(value, two.weights[state][key]) for key, value in weights.items())
    assert any(not torch.equal(value, one.weights["plateau"][key]) for key, value in one.weights["under"].items())


class Oracle(torch.nn.Module):
    """Predicts the successor of every token of the sequences it knows."""

    def __init__(self, actor: Any, tokens: torch.Tensor, wrong: int) -> None:
        super().__init__()
        self.actor, self.tokens, self.wrong = actor, tokens, wrong
        self.forward_tokens = 0

    def forward(self, *args: Any, mode: str | None = None, **kwargs: Any) -> Any:
        if mode is not None:
            return self.actor(*args, mode=mode, **kwargs)
        following = torch.cat([kwargs["input_ids"][:, 1:], kwargs["input_ids"][:, :1]], dim=1)
        following[:, : self.wrong] = 0
        logits = torch.nn.functional.one_hot(following, 96).float()
        return type("Output", (), {"logits": logits})()


@pytest.mark.parametrize(("wrong", "exact"), [(0, 1.0), (29, 1.0), (31, 11 / 12)])
def test_scores(wrong: int, exact: float) -> None:
    """What is in the store and the first key do not count; the first token of the first value does."""
    spec = MODELS["deltanet"]
    tokens = held_out(spec.task, 0, 4)
    tokens[tokens == 0] = 1  # so that 0 is always wrong
    scores = score(Oracle(make_actor(spec.model(0)), tokens, wrong), spec.task, tokens)  # type: ignore[arg-type]
    assert scores["exact"] == pytest.approx(exact)
    assert scores["tokens"] == pytest.approx(1 - (1 - exact) / 4)
    assert 0 < scores["ntp_loss"] < 6 and scores["reward_hybrid"] == pytest.approx(
        scores["reward_cosine"] + scores["reward_binary"], abs=1e-5
    )


# Arms


@pytest.mark.parametrize(("arm", "name"), [(PAPER, "midtrain"), (many("binary"), "midtrain_many_rollouts")])
def test_settings_are_those_of_the_recipe(arm: Arm, name: str) -> None:
    settings = arm.settings("under", 0)
    recipe = compose_config([f"recipe={name}", "model.path=DIR", "data.train_files=FILES"])
    for name in (
        "credit",
        "chunks",
        "rollout_length",
        "rollouts_per_position",
        "reward",
        "group",
        "selection",
        "temperature",
    ):
        assert getattr(settings.nsp, name) == recipe.refine.nsp[name], name
    assert settings.loss.rl_coef == recipe.refine.loss.rl_coef
    assert settings.norm_adv_by_std_in_grpo == recipe.algorithm.norm_adv_by_std_in_grpo
    assert settings.clip_ratio == recipe.actor_rollout_ref.actor.clip_ratio
    assert settings.weight_decay == recipe.actor_rollout_ref.actor.optim.weight_decay


def test_ablations_cover_what_they_should() -> None:
    """Every arm has a name of its own and settings that are allowed."""
    arms = [*HEADLINE, *(arm for table in ABLATIONS.values() for arm in table)]
    assert len(ARMS) == len(arms) + len(MANY_WEIGHTS)
    settings = {arm.name: arm.settings("under", 0) for arm in arms}
    assert {s.nsp.reward for s in settings.values()} == set(REWARDS)
    assert {s.nsp.selection for s in settings.values()} == set(SELECTIONS)
    numbers = [s.nsp.rollout_length for s in settings.values()]
    assert {k for k in numbers if isinstance(k, int)} == {1, 3, 5, 7}
    assert {(k.min, k.max) for k in numbers if not isinstance(k, int)} == {(1, 5), (3, 7)}
    assert {s.nsp.chunks for s in settings.values()} == {2, 4, 8}
    found = {(s.nsp.rollouts_per_position, s.nsp.group, s.norm_adv_by_std_in_grpo) for s in settings.values()}
    wanted = {(n, group, std) for n in (4, 8, 16) for group in ("sequence", "position") for std in (True, False)}
    assert found >= wanted | {(1, "sequence", True), (1, "sequence", False)}


def test_weights_with_many_rollouts_change_nothing_else() -> None:
    one = many("binary").settings("under", 0)
    others = [arm.settings("under", 0) for arm in MANY_WEIGHTS]
    assert {other.loss.rl_coef for other in others} == {1.0, 25.0} and one.loss.rl_coef == 5.0
    assert all(dataclasses.replace(other, loss=one.loss) == one for other in others)


def test_the_question_is_the_last_round() -> None:
    task = MODELS["deltanet"].task
    assert task.entries * task.entry_length == QUESTION and task.length == 3 * QUESTION


# Noise


def test_signal_to_noise_by_hand() -> None:
    """Draws m + s * noise in P dimensions: |m|^2 / (P s^2), and 0 without a mean."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 50, generator=generator)
    mean = torch.zeros(50)
    mean[0] = 5.0
    assert signal_to_noise(mean + 0.5 * noise) == pytest.approx(25 / (50 * 0.25), rel=0.05)
    assert signal_to_noise(noise) == pytest.approx(0.0, abs=0.002)
    assert alignment(mean[None].repeat(3, 1), mean) == pytest.approx(1.0)
    assert alignment(-mean[None], mean) == pytest.approx(-1.0)


def test_estimators_at_equal_rollout_tokens() -> None:
    """The paper's is that of its recipe; most others write 256 rollouts; each has a name, and its own advantages."""
    assert len({one.name for one in ESTIMATORS}) == len(ESTIMATORS)
    nsp = PAPER.settings("under", 0).nsp
    paper = PAPERS_ESTIMATOR
    assert (paper.chunks, paper.rollouts, paper.group) == (nsp.chunks, nsp.rollouts_per_position, nsp.group)
    assert paper.credit == nsp.credit and paper.divide
    equal = [one for one in ESTIMATORS if one.chunks * one.rollouts == 256]
    found = {(one.chunks, one.group, one.credit, one.divide) for one in equal}
    assert len(equal) >= 8 and {(8, "sequence", "rollout", True), (32, "position", "token", False)} <= found
    written = {"token_rewards": torch.rand(2, 32, 8, 5, generator=torch.Generator().manual_seed(0))}
    written["rewards"] = written["token_rewards"].mean(dim=-1)
    advantages = {one.name: one.advantages(written) for one in equal if one.chunks == 32}
    for name, first in advantages.items():
        assert not any(torch.allclose(first, second) for other, second in advantages.items() if other != name)
        assert (first[..., 0] == first[..., 4]).all() == ("rollout" in name)


# The command

KINDS = [
    Job("base", "deltanet", 0),
    Job("headline", "deltanet", 0, "under"),
    Job("noise", "deltanet", 0, "under", "cosine"),
    Job("signal", "deltanet", 0, "under"),
    Job("bound", "deltanet", 0, "under", "binary"),
    Job("ablation", "deltanet", 0, "under", "chunks_2"),
    Job("ablation", "deltanet", 0, "under", "many_rl25"),
    Job("ablation", "deltanet", 0, "under", "many_rl1"),
    Job("test_time", "deltanet", 0, "under", "none"),
    Job("test_time", "deltanet", 0, "under", "sft"),
    Job("test_time", "deltanet", 0, "under", "refine"),
]


def test_all_jobs() -> None:
    jobs = all_jobs(list(RECALL), command.FULL)
    assert len({job.name for job in jobs}) == len(jobs) and {job.seed for job in jobs} == set(range(5))
    assert {job.kind for job in KINDS} == {job.kind for job in jobs}
    assert {(job.model, job.state) for job in jobs if job.kind == "headline"} == {
        (model, state) for model in RECALL for state in ("under", "plateau")
    }


RUN = r"Run \w+ of .*"  # names a run by its numbers, processor time among them


def without_run(page: Path) -> str:
    return re.sub(RUN, "", page.read_text())


def test_every_kind_of_job_ends_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each kind in a process of its own, with a tenth of a second of work; the page has all their parts."""
    monkeypatch.setattr(command, "FAST", TINY)
    monkeypatch.setattr(command, "all_jobs", lambda models, amount: KINDS)
    command.main(["--fast", "--out", str(tmp_path), "--processes", "1"])
    text = (tmp_path / "results.md").read_text()
    for heading in (
        "Base models",
        "REFINE against SFT",
        "Ablations",
        "Places",
        "How noisy",
        "Training with a gradient",
        "Weight of the policy loss with many",
        "Test-time training",
    ):
        assert f"## {heading}" in text, heading
    assert "| λ = 5 |" in text and "| λ = 25 |" in text
    assert "*Upper bound*, a nearly exact policy gradient (n = 2)" in text
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "recall_headline.svg",
        "recall_compute.svg",
        "recall_ablations_under.svg",
        "recall_noise.svg",
    }
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "jobs").iterdir()}
    (tmp_path / "jobs/ablation-deltanet-under-chunks_2-seed0.json").write_text("{")  # as if cut while writing
    monkeypatch.setattr(command, "FULL", TINY)
    theirs = (command.ROOT / "docs/results.md").read_bytes()
    for kind in ([], ["--fast"]):  # the project's page is for whole runs only
        (tmp_path / "results.md").unlink()
        command.main([*kind, "--out", str(tmp_path), "--report"])
        assert "Places per sequence" not in (tmp_path / "results.md").read_text()
    assert (command.ROOT / "docs/results.md").read_bytes() == theirs
    assert command.destination(tmp_path, whole=True)[1] == command.ROOT / "docs"
    command.main(["--fast", "--out", str(tmp_path), "--processes", "1"])
    assert without_run(tmp_path / "results.md") == re.sub(RUN, "", text)
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"ablation-deltanet-under-chunks_2-seed0.json"}


def test_kinds_of_jobs() -> None:
    """With the bases they start from; what is not a kind is refused."""
    jobs = all_jobs(list(RECALL), command.FULL)
    found = command.with_bases(command.chosen(jobs, ["bound"]), jobs)
    assert {job.kind for job in found} == {"base", "bound"} and command.chosen(jobs, None) == jobs
    bases = {(job.model, job.seed) for job in found if job.kind == "base"}
    assert bases == {(job.model, job.seed) for job in found if job.kind == "bound"}
    with pytest.raises(SystemExit, match="--kinds: there are no jobs of the kind nosie. Known: .*noise"):
        command.chosen(jobs, ["nosie"])


def test_what_is_missing() -> None:
    """What results do not have, and what they have of other settings; nothing is refused."""
    have = [{**dataclasses.asdict(job), "fingerprint": runner.fingerprint(job, TINY)} for job in KINDS]
    assert command.missing(KINDS, TINY, {"jobs": have[1:]}) == KINDS[:1]
    assert command.missing(KINDS, TINY, None) == KINDS
    del have[2]["fingerprint"]
    assert command.missing(KINDS, TINY, {"jobs": have}) == KINDS[2:3]
    longer = dataclasses.replace(TINY, ablation_steps=2)  # of all but base models
    assert command.missing(KINDS, longer, {"jobs": have}) == KINDS[1:]
    with pytest.raises(SystemExit, match="--missing: results.json has all jobs"):
        command.missing(KINDS[:1], TINY, {"jobs": have})


def test_the_committed_results_lack_nothing() -> None:
    """Or there are arms that nobody has trained, and the page does not say so."""
    results = json.loads((Path(command.__file__).parent / "results.json").read_text())
    with pytest.raises(SystemExit, match="has all jobs"):
        command.missing(all_jobs(list(RECALL), command.FULL), command.FULL, results)


def results(date: str, *names: str, **more: Any) -> dict[str, Any]:
    """Made-up ones of jobs called ``kind-what``."""
    about = {"amount": {"seeds": 5}, "environment": {"torch": "2"}, "processor_minutes": 3.0}
    jobs = []
    for name in names:
        kind, _, what = name.partition("-")
        jobs.append({**dataclasses.asdict(Job(kind, "m", 0, "", what)), "date": date})
    return {"date": date, "jobs": jobs, **about, **more}


def test_what_is_measured_later_takes_the_place_of_what_was() -> None:
    """Other jobs stay, and so does what the page says of their run; of whole kinds nothing old is left."""
    old = results("monday", "base", "headline", "noise-a", "noise-b")
    new = results("tuesday", "base", "noise-a", "signal", amount={"seeds": 3})
    names = ["noise-m-a-seed0", "signal-m-seed0"]
    both = command.added_to(old, new, names, ["noise", "signal"])
    assert [(job["kind"], job["date"]) for job in both["jobs"]] == [
        ("base", "monday"),
        ("headline", "monday"),
        ("noise", "tuesday"),
        ("signal", "tuesday"),
    ]
    assert both["date"] == "monday" and both["amount"]["seeds"] == 5
    assert [(run["date"], run["jobs"]) for run in both["later"]] == [("tuesday", names)]
    again = command.added_to(both, results("friday", "noise-a"), names[:1])
    assert [run["jobs"] for run in again["later"]] == [names[1:], names[:1]]
    kept = command.added_to(old, results("friday", "noise-a"), names[:1])
    assert [(job["what"], job["date"]) for job in kept["jobs"][2:]] == [("b", "monday"), ("a", "friday")]


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no finished jobs below"):
        command.main(["--report", "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_means_of_the_training_are_of_as_many_steps_as_are_shown() -> None:
    arm = {"scores": {}, "training": {"30": {"nsp/reward/mean": 0.25}, "60": {"nsp/reward/mean": 0.5}}}
    job = {"kind": "headline", "model": "deltanet", "state": "under", "what": "", "seed": 0}
    records = Records({"jobs": [{**job, "result": {"arms": {"paper": arm}}}]})
    assert records.training("deltanet", "under", "paper", 30, "nsp/reward/mean") == {"0": 0.25}
    assert records.training("deltanet", "under", "paper", 10, "nsp/reward/mean") == {}


def test_records_of_other_settings_are_not_reused(tmp_path: Path) -> None:
    job = KINDS[3]
    (tmp_path / "jobs").mkdir()
    record = {"fingerprint": runner.fingerprint(job, TINY), "result": {}}
    (tmp_path / "jobs" / f"{job.name}.json").write_text(json.dumps(record))
    assert runner.read_record(job, TINY, tmp_path) == record
    with pytest.raises(ValueError, match="no base model"):
        runner.run_all([dataclasses.replace(job, seed=1)], TINY, tmp_path, 1)
    assert runner.read_record(job, dataclasses.replace(TINY, ablation_steps=2), tmp_path) is None


def test_methods_differ_and_repeat() -> None:
    """The same job gives the same numbers; SFT and REFINE give different ones from the same base and data."""
    spec: BaseSpec = MODELS["deltanet"]
    weights = {"under": dict(spec.model(0).state_dict())}
    job = Job("ablation", "deltanet", 0, "under", "sft_lr5")
    one, two = (run_job(job, TINY, weights)["scores"]["1"] for _ in range(2))
    other = run_job(dataclasses.replace(job, what="paper_lr5"), TINY, weights)["scores"]["1"]
    assert one == two and one["ntp_loss"] != other["ntp_loss"]


# The project's page


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    root = Path(command.__file__).resolve().parents[2]
    file, page = root / "examples/recall/results.json", root / "docs/results.md"
    results = json.loads(file.read_text())
    assert section(results, "figures").strip() in page.read_text()
    assert "What the figures say" in page.read_text()
    results["jobs"] = results["jobs"][:-1]  # another run: what was read from this one does not go with it
    assert "What the figures say" not in section(results, "figures")


def test_the_committed_figures_are_those_of_the_committed_results() -> None:
    root = Path(command.__file__).resolve().parents[2]
    results = json.loads((root / "examples/recall/results.json").read_text())
    for name, svg in figures(results).items():
        assert (root / "docs/figures" / name).read_text() == svg
