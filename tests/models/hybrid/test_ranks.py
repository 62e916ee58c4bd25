"""Two FSDP2 ranks train a hybrid as one does, with the real worker and trainer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from reference.ranks import run_ranks
from reference.runs import TOY_EXPERTS, TOY_OLMO_HYBRID, TOY_QWEN3_5, toy_overrides
from torch import Tensor

pytestmark = [pytest.mark.slow, pytest.mark.dist]

OVERRIDES = (
    "refine.warmup_steps=0",
    "refine.nsp.rollouts_per_position=2",
    "model.activation_checkpointing=layer",
    # with this epsilon Adam's step is nearly proportional to the gradient: differences stay as small as they were
    "+actor_rollout_ref.actor.optim.override_optimizer_config.eps=1.0",
)
GRADIENT = 5e-5
"""float32 sums in another order."""


MODELS = {
    "olmo_hybrid": TOY_OLMO_HYBRID,
    "qwen3_5_text": TOY_QWEN3_5,
    "experts": (*TOY_EXPERTS, "model.balance_coef=0.1"),
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("hybrid_ranks")
    overrides = toy_overrides(directory, directory / "run", *OVERRIDES, model=request.param)
    with ThreadPoolExecutor() as pool:
        started = {world: pool.submit(run_ranks, world, directory / str(world), overrides, "steps") for world in (1, 2)}
        return {world: future.result() for world, future in started.items()}


def worst(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert got.keys() == wanted.keys()
    return max(
        ((got[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-300)).item()
        for name, value in wanted.items()
    )


@pytest.mark.parametrize("step", [0, 1])
def test_two_ranks_are_one(ranks: dict[int, dict[str, Any]], step: int) -> None:
    got, wanted = ranks[2]["steps"][step], ranks[1]["steps"][step]
    for name in ("positions", "rollout_tokens", "reward_binary"):
        assert torch.equal(got["rollouts"][name], wanted["rollouts"][name]), name
    for name in ("old_log_probs", "rewards", "entropy_mean"):
        torch.testing.assert_close(got["rollouts"][name], wanted["rollouts"][name], rtol=2e-5, atol=1e-6)
    assert len(got["gradients"]) == len(wanted["gradients"]) == 2
    for mine, theirs in zip(got["gradients"], wanted["gradients"], strict=True):
        assert worst(mine, theirs) < GRADIENT
        assert all(gradient.norm() > 0 for gradient in theirs.values())  # every parameter, attention's included
    assert worst(got["parameters"], wanted["parameters"]) < 1e-6


def test_the_second_rank_counts(ranks: dict[int, dict[str, Any]]) -> None:
    """Negative control: rank 0's documents alone give other gradients, by far more than the tolerance."""
    alone, together = ranks[1]["rank_0_alone"], ranks[2]["steps"][0]
    assert worst(alone["gradients"][0], together["gradients"][0]) > 100 * GRADIENT
