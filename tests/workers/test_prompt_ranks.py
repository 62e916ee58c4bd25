"""Post-training and test-time training, from the trainer's step down to the gradients, on one rank and on two."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from reference.prompt_ranks import GAP, LARGEST_GAP, TTT_RUNS
from reference.prompt_runs import prompt_overrides, write_prompts
from reference.ranks import run_ranks
from torch import Tensor

pytestmark = pytest.mark.dist

Results = dict[tuple[str, int], dict[str, Any]]
COMMON = (
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
    "refine.nsp.rollouts_per_position=2",
    # with this epsilon Adam's step is nearly proportional to the gradient: differences stay as small as they were
    "+actor_rollout_ref.actor.optim.override_optimizer_config.eps=1.0",
)
# a batch of 4 and one of 1, and mini-batches of 2: two ranks need dummies
TTT = ("data.train_batch_size=4", "refine.ppo_mini_batch_size=2", "refine.nsp.reward=cosine")
SUMMED_IN_ANOTHER_ORDER = 1e-5
# Rollouts of several prompts are written in one pass, and a library chooses the kernel of a matrix product by its
# rows: the last bit of a float32 loss may depend on which prompts are adapted to together. Seen: 7e-8.
WRITTEN_WITH_OTHERS = 1e-6


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    directory = tmp_path_factory.mktemp("prompt_ranks")
    write_prompts(directory)

    def run(recipe: str, world: int) -> dict[str, Any]:
        more = TTT if recipe == "ttt" else ("refine.ppo_mini_batch_size=4",)
        overrides = prompt_overrides(recipe, directory, directory / "run", *COMMON, *more)
        return run_ranks(world, directory / f"{recipe}_{world}", overrides, module="reference.prompt_ranks")

    with ThreadPoolExecutor(max_workers=2) as pool:
        cases = [(recipe, world) for recipe in ("posttrain", "ttt") for world in (1, 2)]
        return dict(zip(cases, pool.map(lambda case: run(*case), cases), strict=True))


def worst(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    return max(((got[name] - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-30)).item() for name in wanted)


def equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return all(torch.equal(got[name], wanted[name]) for name in wanted)


def by_id(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


# Post-training


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("inner", "steps"), [("refine", 2), ("sft", 2), ("none", 0)])
def test_the_inner_phase_never_sees_an_answer(results: Results, world: int, inner: str, steps: int) -> None:
    """Other answers: the gradients of the inner phase keep every bit, those of the outer phase do not."""
    found = results["posttrain", world]
    given, other = found[inner]["gradients"], found[f"{inner}_other_answers"]["gradients"]
    assert len(given) == len(other) == steps + 2  # two mini-batches in each phase
    assert all(equal(*pair) for pair in zip(given[:steps], other[:steps], strict=True))
    assert not any(equal(*pair) for pair in zip(given[steps:], other[steps:], strict=True))


@pytest.mark.parametrize("name", ["refine", "refine_twice", "sft", "none", "grpo", "grpo_alone", "served"])
def test_one_rank_and_two_learn_the_same(results: Results, name: str) -> None:
    one, two = results["posttrain", 1][name], results["posttrain", 2][name]
    for got, wanted in zip(two["gradients"], one["gradients"], strict=True):
        assert worst(got, wanted) < SUMMED_IN_ANOTHER_ORDER
    assert worst(two["parameters"], one["parameters"]) < SUMMED_IN_ANOTHER_ORDER
    for metric, value in one["metrics"].items():
        if metric.startswith(("actor/", "answer/", "answers/", "nsp/")):
            assert two["metrics"][metric] == pytest.approx(value, rel=1e-4, abs=1e-5), metric
    # the control: another step has other gradients
    assert worst(one["gradients"][-1], results["posttrain", 1]["sft_twice"]["gradients"][-1]) > 0.01


def test_the_schedule_moves_once_per_step_whatever_the_phases(results: Results) -> None:
    found = results["posttrain", 1]
    assert [found[f"{inner}_schedule"] for inner in ("refine", "sft", "none")] == [2, 2, 2]  # after two steps


def test_what_each_phase_measures(results: Results) -> None:
    found = results["posttrain", 1]
    inner, outer = {"actor/ntp_loss", "actor/pg_loss", "nsp/reward/mean"}, {"answer/ntp_loss", "answer/grad_norm"}
    assert inner | outer <= found["refine"]["metrics"].keys()
    assert "nsp/reward/mean" not in found["sft"]["metrics"] and "actor/ntp_loss" in found["sft"]["metrics"]
    assert not inner & found["none"]["metrics"].keys() and outer <= found["none"]["metrics"].keys()
    grpo = found["grpo"]["metrics"].keys()
    assert {"answer/pg_loss", "answer/ppo_kl", "answer/reward/mean"} <= grpo and "answer/ntp_loss" not in grpo
    costs = {name: found[name]["metrics"]["perf/forward_tokens_per_token"] for name in ("none", "sft", "refine")}
    assert costs["none"] == 1 and costs["none"] < costs["sft"] < costs["refine"]


@pytest.mark.parametrize("world", [1, 2])
def test_log_probabilities_of_a_server_are_compared_and_not_trained_with(results: Results, world: int) -> None:
    """`refine.answers.engine=vllm`: those of the trained pass are the old ones, whatever the server said."""
    found = results["posttrain", world]
    served, own = found["served"], found["grpo_alone"]
    tokens = int(found["sampled"]["answer_lengths"].sum())  # sampled before: of as many answers, but for the weights
    mean, largest = (served["metrics"][f"answers/log_prob_gap/{name}"] for name in ("mean", "max"))
    assert largest == pytest.approx(LARGEST_GAP, abs=1e-4)
    assert mean == pytest.approx(GAP + (LARGEST_GAP - GAP) / tokens, abs=0.2 / tokens) and mean > GAP
    assert not any(name.startswith("answers/") for name in own["metrics"])
    for got, wanted in zip(served["gradients"], own["gradients"], strict=True):
        assert worst(got, wanted) < SUMMED_IN_ANOTHER_ORDER


def test_sampled_answers_do_not_depend_on_the_ranks(results: Results) -> None:
    one, two = results["posttrain", 1]["sampled"], results["posttrain", 2]["sampled"]
    assert torch.equal(one["answer_tokens"], two["answer_tokens"])
    assert torch.equal(one["answer_lengths"], two["answer_lengths"])
    assert len({tuple(row.tolist()) for row in one["answer_tokens"][2]}) > 1  # answers to a prompt differ


def test_validation_answers_every_row_once_up_to_its_limit(results: Results) -> None:
    one, two = results["posttrain", 1]["validation"], results["posttrain", 2]["validation"]
    assert one == two and len(by_id(one)) == 5
    assert all(set(row["scores"]) == {"odd"} and row["references"][1] == "x" for row in one)


# Test-time training


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_restored_is_restored_to_the_last_bit(results: Results, world: int) -> None:
    restored = results["ttt", world]["restored"]
    assert restored == {f"{inner}_{reset}": reset != "none" for inner, reset in TTT_RUNS}


@pytest.mark.parametrize("world", [1, 2])
def test_a_failing_generation_leaves_nothing_behind(results: Results, world: int) -> None:
    """Before the first optimiser step, when there is no optimiser state, and after some."""
    found = results["ttt", world]
    assert found["failure"] == "generation failed" and found["has_state"]
    assert found["restored_after_failure"] == [True, True]


@pytest.mark.parametrize(("inner", "reset"), TTT_RUNS)
def test_the_order_of_rows_matters_only_where_adaptation_carries_on(results: Results, inner: str, reset: str) -> None:
    name = f"{inner}_{reset}"
    given, shuffled = by_id(results["ttt", 1][name]), by_id(results["ttt", 1][f"{name}_shuffled"])
    assert given.keys() == shuffled.keys() and len(given) == 5
    if reset == "none":
        assert any(given[row]["adaptation"] != shuffled[row]["adaptation"] for row in given)
    else:
        assert given == shuffled


@pytest.mark.parametrize(("inner", "reset"), TTT_RUNS)
def test_one_rank_and_two_adapt_the_same(results: Results, inner: str, reset: str) -> None:
    one, two = (by_id(results["ttt", world][f"{inner}_{reset}"]) for world in (1, 2))
    for name, row in one.items():
        for key in ("prediction", "prediction_before", "scores", "batch", "task", "references"):
            assert two[name][key] == row[key], key
        assert [point["step"] for point in row["adaptation"]] == [0, 1, 2]
        for got, wanted in zip(two[name]["adaptation"], row["adaptation"], strict=True):
            assert got == pytest.approx(wanted, rel=1e-5)
        assert all(("reward" in point) == (inner == "refine") for point in row["adaptation"][:-1])
        assert row["adaptation"][-1]["loss"] < row["adaptation"][0]["loss"]  # it did learn


def test_adapting_together_and_alone_are_different_things(results: Results) -> None:
    """The last batch has one prompt; the other four are the control, whose losses differ by more than 1e-3."""
    together, alone = (by_id(results["ttt", 1][f"refine_{reset}"]) for reset in ("batch", "sample"))
    for name, row in together.items():
        before, after = (
            abs(row["adaptation"][step]["loss"] / alone[name]["adaptation"][step]["loss"] - 1) for step in (0, 2)
        )
        assert before < WRITTEN_WITH_OTHERS
        assert after < WRITTEN_WITH_OTHERS if row["batch"] == 2 else after > 100 * WRITTEN_WITH_OTHERS


def test_a_worker_that_is_left_over_adds_nothing(results: Results) -> None:
    """One prompt on two ranks: the second one's dummy has no part in the gradient."""
    (one,), (two,) = results["ttt", 1]["one_prompt"], results["ttt", 2]["one_prompt"]
    assert worst(two, one) < SUMMED_IN_ANOTHER_ORDER
