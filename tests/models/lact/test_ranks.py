"""Two FSDP2 ranks train a LaCT as one does, with the real worker and trainer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from reference.ranks import run_ranks
from reference.runs import TOY_LACT, toy_overrides
from reference.toy import relative
from torch import Tensor

pytestmark = [pytest.mark.slow, pytest.mark.dist]

OVERRIDES = (
    "refine.warmup_steps=0",
    "refine.nsp.rollouts_per_position=2",
    # Newton-Schulz in bf16 may turn a last bit of float32 into one of bf16, far beyond these tolerances
    "+model.config.muon_dtype=float32",
    # with this epsilon Adam's step is nearly proportional to the gradient: differences stay as small as they were
    "+actor_rollout_ref.actor.optim.override_optimizer_config.eps=1.0",
)
# float32 sums in another order
GRADIENT, LOSS = 2e-5, 1e-5


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("lact_ranks")
    overrides = toy_overrides(directory, directory / "run", *OVERRIDES, model=TOY_LACT)
    with ThreadPoolExecutor() as pool:
        started = {world: pool.submit(run_ranks, world, directory / str(world), overrides, "steps") for world in (1, 2)}
        return {world: future.result() for world, future in started.items()}


def worst(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert got.keys() == wanted.keys()
    return max(relative(got[name].double(), wanted[name].double()) for name in wanted)


def test_random_weights_do_not_depend_on_the_ranks(ranks: dict[int, dict[str, Any]]) -> None:
    one, two = ranks[1]["initial"], ranks[2]["initial"]
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert {"model.layers.1.attn.w1", "model.layers.1.attn.w0.w_left"} <= one.keys()


@pytest.mark.parametrize("step", [0, 1])
def test_two_ranks_are_one(ranks: dict[int, dict[str, Any]], step: int) -> None:
    got, wanted = ranks[2]["steps"][step], ranks[1]["steps"][step]
    for name in ("positions", "rollout_tokens", "reward_binary"):
        assert torch.equal(got["rollouts"][name], wanted["rollouts"][name]), name
    for name in ("old_log_probs", "rewards", "reward_cosine", "entropy_mean"):
        torch.testing.assert_close(got["rollouts"][name], wanted["rollouts"][name], rtol=2e-5, atol=1e-6)
    for name in ("actor/ntp_loss", "actor/grad_norm", "nsp/reward/mean"):
        assert got["metrics"][name] == pytest.approx(wanted["metrics"][name], rel=LOSS), name
    assert len(got["gradients"]) == len(wanted["gradients"]) == 2
    for mine, theirs in zip(got["gradients"], wanted["gradients"], strict=True):
        assert worst(mine, theirs) < GRADIENT
        assert all(gradient.norm() > 0 for gradient in theirs.values())  # every parameter, the rates' included
    assert worst(got["parameters"], wanted["parameters"]) < 1e-6


def test_the_second_rank_counts(ranks: dict[int, dict[str, Any]]) -> None:
    """Negative control: rank 0's documents alone give other gradients, by far more than the tolerance."""
    alone, together = ranks[1]["rank_0_alone"], ranks[2]["steps"][0]
    assert torch.equal(alone["rollouts"]["positions"], together["rollouts"]["positions"][[0, 1, 4, 5]])
    assert worst(alone["gradients"][0], together["gradients"][0]) > 100 * GRADIENT
