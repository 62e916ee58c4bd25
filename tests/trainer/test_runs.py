"""Whole runs through the command line, Ray and FSDP2: learning, resuming, ranks, export."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import pytest
import torch
import torch.nn.functional as F
from reference.runs import (
    read_steps,
    repeatable,
    run_and_kill,
    run_to_the_end,
    toy_overrides,
    write_corpus,
)
from reference.shared import TWO_WORKERS, Finished, shared_run

pytestmark = [pytest.mark.slow, pytest.mark.dist]

STEPS = 30
OPTIMISER_STEPS = 2  # per step: 8 documents in mini-batches of 4


class Runs:
    """All runs of this file, two at a time; a test waits for the one it needs."""

    def __init__(self, corpus: Path, factory: pytest.TempPathFactory) -> None:
        self.corpus = corpus
        self.pool = ThreadPoolExecutor(max_workers=2)
        # the documents are tokenised once, by the first run; the others find them in the cache
        self.long = self.pool.submit(
            self._run, "long", f"trainer.total_training_steps={STEPS}", f"trainer.save_freq={STEPS}", prefix=()
        )
        self.killed_at: Future[int] = self.pool.submit(self._kill)
        self.sft = self.pool.submit(
            self._run,
            "sft",
            "trainer.total_training_steps=4",
            "trainer.save_freq=4",
            "refine.loss.rl_coef=0",
            "refine.warmup_steps=0",
        )
        self.resumed = self.pool.submit(self._resume)
        self.two = self.pool.submit(shared_run, factory, "two_workers", TWO_WORKERS)

    def directory(self, name: str) -> Path:
        return self.corpus / "runs" / name

    def overrides(self, name: str, *more: str) -> list[str]:
        return toy_overrides(self.corpus, self.directory(name), *more)

    def _run(self, name: str, *more: str, prefix: tuple[str, ...] | None = None) -> Finished:
        return Finished(self.directory(name), *run_to_the_end(self.overrides(name, *more), self.corpus, prefix))

    def _kill(self) -> int:
        arguments = self.overrides("killed", f"trainer.total_training_steps={STEPS}", "trainer.save_freq=3")
        return run_and_kill(arguments, self.corpus, self.directory("killed"), saved=3)

    def _resume(self) -> Finished:
        self.killed_at.result()
        return self._run("killed", "trainer.total_training_steps=6", "trainer.save_freq=3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    corpus = tmp_path_factory.mktemp("corpus")
    write_corpus(corpus)
    runs = Runs(corpus, tmp_path_factory)
    yield runs
    runs.pool.shutdown(wait=True, cancel_futures=True)


def finished(future: Future[Finished]) -> Finished:
    run = future.result()
    assert run.code == 0, run.output[-4000:]
    return run


@pytest.fixture(scope="module")
def long(runs: Runs) -> Finished:
    return finished(runs.long)


def test_the_run_directory_holds_what_is_promised(long: Finished) -> None:
    names = {path.name for path in long.directory.iterdir()}
    promised = {"config.yaml", "environment.json", "metrics.jsonl", "report.html", "model", f"global_step_{STEPS}"}
    assert promised <= names
    model = {path.name for path in (long.directory / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= model
    assert "actor/ntp_loss" in (long.directory / "report.html").read_text()
    for name in ("report.html", "model", "metrics.jsonl", "config.yaml"):
        assert name in long.output
    assert "Traceback" not in long.output
    for said_by_others in ("step:1 - ", "Token authentication", "Loading weights"):
        assert said_by_others not in long.output


STABLE_NAMES = {
    "nsp/reward/mean",
    "nsp/reward/std",
    "nsp/reward/min",
    "nsp/reward/max",
    "nsp/reward_cosine/mean",
    "nsp/reward_binary/mean",
    "nsp/entropy/mean",
    "nsp/entropy/selected_mean",
    "nsp/group_zero_std",
    "actor/ntp_loss",
    "actor/pg_loss",
    "actor/ppo_kl",
    "actor/pg_clipfrac",
    "actor/grad_norm",
    "actor/lr",
    "val/ntp_loss",
    "val/ntp_accuracy",
    "perf/tokens_per_second",
    "perf/forward_tokens_per_token",
    "perf/max_memory_gb",
    "timing_s/rollout",
    "timing_s/reward",
    "timing_s/update",
    "timing_s/validate",
    "timing_s/step",
}


def test_metrics_have_their_stable_names_and_every_step_is_there_once(long: Finished) -> None:
    steps = read_steps(long.directory)
    assert list(steps) == list(range(STEPS + 1))
    assert steps[3].keys() >= STABLE_NAMES
    assert set(steps[0]) == {"step", "val/ntp_loss", "val/ntp_accuracy"}
    assert all(("val/ntp_loss" in record) == (step % 3 == 0) for step, record in steps.items())
    assert all(value is not None for record in steps.values() for value in record.values())


def test_rollouts_start_after_the_warm_up(long: Finished) -> None:
    steps = read_steps(long.directory)
    for step in (1, 2):
        assert not any(name.startswith("nsp/") or name == "actor/pg_loss" for name in steps[step])
        assert steps[step]["perf/forward_tokens_per_token"] == 1
    for step in range(3, STEPS + 1):
        assert "nsp/reward/mean" in steps[step] and steps[step]["perf/forward_tokens_per_token"] > 2


def test_the_old_policy_is_the_new_one_in_the_first_mini_batch_only(long: Finished) -> None:
    """Between the two optimiser steps of a step the policy moves a little, so the ratio is not always 1."""
    ratios = [read_steps(long.directory)[step]["actor/ppo_kl"] for step in range(3, STEPS + 1)]
    assert all(value != 0 and abs(value) < 0.5 for value in ratios)


def test_it_learns(long: Finished) -> None:
    steps = read_steps(long.directory)
    assert steps[STEPS]["val/ntp_accuracy"] > steps[0]["val/ntp_accuracy"] + 0.5
    assert steps[STEPS]["val/ntp_loss"] < 0.5 * steps[0]["val/ntp_loss"]
    first, last = range(3, 8), range(STEPS - 4, STEPS + 1)
    for name in ("nsp/reward/mean", "nsp/reward_binary/mean"):
        early, late = (mean(steps[step][name] for step in some) for some in (first, last))
        assert late > early + 0.1, (name, early, late)
    assert mean(steps[s]["nsp/entropy/mean"] for s in last) < mean(steps[s]["nsp/entropy/mean"] for s in first)


@pytest.fixture(scope="module")
def exported(long: Finished) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    from refine_verl.kernels import ensure_kernels

    ensure_kernels()
    model, report = AutoModelForCausalLM.from_pretrained(long.directory / "model", output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def test_every_parameter_was_trained(long: Finished, exported: torch.nn.Module) -> None:
    from refine_verl.models import load_model

    initial = dict(load_model(long.directory / "initial_model", seed=42).named_parameters())
    trained = dict(exported.named_parameters())
    assert trained.keys() == initial.keys() and len(trained) > 20
    assert not [name for name in trained if torch.equal(trained[name], initial[name])]
    # the control: weights made from the seed are those the run began with
    moved = max((trained[name] - initial[name]).abs().max().item() for name in trained)
    assert moved < 2 * 5e-3 * OPTIMISER_STEPS * STEPS


def test_the_exported_model_has_the_last_validation_loss(runs: Runs, long: Finished, exported: torch.nn.Module) -> None:
    """Document by document, with transformers alone and the exported tokenizer."""
    import json

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(long.directory / "model")
    loss = correct = count = 0.0
    for line in (runs.corpus / "validation.jsonl").read_text().splitlines():
        tokens = torch.tensor(tokenizer(json.loads(line)["text"])["input_ids"])
        with torch.no_grad():
            logits = exported(input_ids=tokens[None]).logits[0, :-1].double()
        loss += F.cross_entropy(logits, tokens[1:], reduction="sum").item()
        correct += (logits.argmax(-1) == tokens[1:]).sum().item()
        count += len(tokens) - 1
    last = read_steps(long.directory)[STEPS]
    assert loss / count == pytest.approx(last["val/ntp_loss"], rel=1e-5)
    assert correct / count == pytest.approx(last["val/ntp_accuracy"], abs=1e-9)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(runs: Runs, long: Finished) -> None:
    """Bit for bit; the uninterrupted run has no checkpoint in between, so saving changes nothing either."""
    resumed = finished(runs.resumed)
    killed_at = runs.killed_at.result()
    assert killed_at > 3, "the run was killed after steps that have to be done again"
    got, wanted = read_steps(resumed.directory), read_steps(long.directory)
    assert list(got) == list(range(7))
    for step in range(7):
        assert repeatable(got[step]) == repeatable(wanted[step]), step
    assert repeatable(got[5]) != repeatable({**wanted[4], "step": 5})  # the control
    assert (resumed.directory / "model").is_dir() and (resumed.directory / "global_step_6").is_dir()


def test_two_workers_do_what_one_does(runs: Runs, long: Finished) -> None:
    two = finished(runs.two).directory
    got, wanted = read_steps(two), read_steps(long.directory)
    near_zero = {"actor/pg_loss", "actor/ppo_kl"}  # sums of terms that cancel
    for step in range(7):
        one, other = repeatable(wanted[step]), repeatable(got[step])
        # the run of two workers validates after every step
        other = {name: value for name, value in other.items() if name in one or not name.startswith("val/")}
        assert one.keys() == other.keys()
        for name, value in one.items():
            close = {"abs": 1e-5} if name in near_zero else {"rel": 1e-5, "abs": 1e-6}
            assert other[name] == pytest.approx(value, **close), (step, name)
    shards = {path.name for path in (two / "global_step_6" / "actor").glob("model_*")}
    assert shards == {"model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"}


def optimiser_steps(run: Finished, step: int) -> set[int]:
    """How often the optimiser has moved each parameter, as its checkpoint says."""
    file = run.directory / f"global_step_{step}" / "actor" / "optim_world_size_1_rank_0.pt"
    state = torch.load(file, weights_only=False)["state"]
    return {int(entry["step"]) for entry in state.values()}


def test_the_baseline_makes_as_many_optimiser_steps_and_no_rollouts(runs: Runs, long: Finished) -> None:
    sft = finished(runs.sft)
    assert optimiser_steps(sft, 4) == {4 * OPTIMISER_STEPS}
    assert optimiser_steps(long, STEPS) == {STEPS * OPTIMISER_STEPS}
    for step, record in read_steps(sft.directory).items():
        assert not any(name.startswith("nsp/") for name in record)
        assert step == 0 or record["perf/forward_tokens_per_token"] == 1


Refusal = tuple[list[str], str]
REFUSALS: dict[str, Refusal] = {
    "workers": (["trainer.n_gpus_per_node=2"], "trainer.n_gpus_per_node: this run has 2 worker(s)"),
    "model": (
        ["model.config.hidden_size=64", "trainer.total_training_steps=31"],
        "hidden_size=64 instead of 32",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_another_run_cannot_go_on_from_its_checkpoint(
    runs: Runs, long: Finished, case: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from refine_verl.main import main
    from refine_verl.trainer import launch

    monkeypatch.setattr(launch, "train", lambda *_: pytest.fail("Ray would have been started"))
    before = fingerprint(long.directory)
    more, message = REFUSALS[case]
    assert main(runs.overrides("long", f"trainer.total_training_steps={STEPS}", *more)) == 2
    said = capfd.readouterr().err
    assert message in said and f"global_step_{STEPS}" in said and "trainer.resume_mode=disable" in said
    assert fingerprint(long.directory) == before


def fingerprint(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and time of last change of every file."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def test_the_same_run_may_go_on(runs: Runs, long: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the refusals."""
    from refine_verl.main import main
    from refine_verl.trainer import launch

    reached: list[object] = []

    def train(config: object, *_: object) -> Path:
        reached.append(config)
        return long.directory

    monkeypatch.setattr(launch, "train", train)
    assert main(runs.overrides("long", f"trainer.total_training_steps={STEPS}")) == 0
    assert len(reached) == 1
