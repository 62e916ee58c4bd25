"""Two FSDP2 ranks train a LaCT as one does, with the real worker and trainer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from reference.ranks import run_ranks
from reference.runs import TOY_LACT, toy_overrides
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
# without Muon: float32 sums in another order
GRADIENT, LOSS = 2e-5, 1e-5
# With it, a last bit comes back a hundred times as large (in one process, float32 against float64: 3e-5 to 1e-4).
# And Newton-Schulz takes no notice of the length of what it is given, so the gradients of the learning rates nearly
# cancel: a millionth of the whole gradient is left of them, which float32 knows to three digits. They are compared
# with a ten-thousandth of the whole. Their biases start at zero, so they consist of such gradients.
MUON, FLOOR = 5e-4, 1e-4
PARAMETER, PARAMETER_MUON = 1e-6, 5e-5


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "muon"])
def muon(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def ranks(muon: bool, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("lact_ranks")
    more = (*OVERRIDES, f"model.config.use_muon={str(muon).lower()}")
    overrides = toy_overrides(directory, directory / "run", *more, model=TOY_LACT)
    with ThreadPoolExecutor() as pool:
        started = {world: pool.submit(run_ranks, world, directory / str(world), overrides, "steps") for world in (1, 2)}
        return {world: future.result() for world, future in started.items()}


def worst(got: dict[str, Tensor], wanted: dict[str, Tensor], floor: float = 0.0) -> float:
    """Largest difference of a tensor, relative to its norm, or to ``floor`` times the norm of all if that is more."""
    assert got.keys() == wanted.keys()
    least = floor * torch.stack([value.double().norm() for value in wanted.values()]).norm()
    return max(
        ((got[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-300).max(least)).item()
        for name, value in wanted.items()
    )


def test_random_weights_do_not_depend_on_the_ranks(ranks: dict[int, dict[str, Any]]) -> None:
    one, two = ranks[1]["initial"], ranks[2]["initial"]
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert {"model.layers.1.attn.w1", "model.layers.1.attn.w0.w_left"} <= one.keys()


@pytest.mark.parametrize("step", [0, 1])
def test_two_ranks_are_one(ranks: dict[int, dict[str, Any]], muon: bool, step: int) -> None:
    loss, gradient, floor = (MUON, MUON, FLOOR) if muon else (LOSS, GRADIENT, 0.0)
    got, wanted = ranks[2]["steps"][step], ranks[1]["steps"][step]
    for name in ("positions", "rollout_tokens", "reward_binary"):
        assert torch.equal(got["rollouts"][name], wanted["rollouts"][name]), name
    for name in ("old_log_probs", "rewards", "reward_cosine", "entropy_mean"):
        torch.testing.assert_close(got["rollouts"][name], wanted["rollouts"][name], rtol=2e-5, atol=1e-6)
    for name in ("actor/ntp_loss", "actor/grad_norm", "nsp/reward/mean"):
        assert got["metrics"][name] == pytest.approx(wanted["metrics"][name], rel=loss), name
    assert len(got["gradients"]) == len(wanted["gradients"]) == 2
    for mine, theirs in zip(got["gradients"], wanted["gradients"], strict=True):
        assert worst(mine, theirs, floor) < gradient
        assert all(gradient.norm() > 0 for gradient in theirs.values())  # every parameter, the rates' included
    assert worst(got["parameters"], wanted["parameters"], floor) < (PARAMETER_MUON if muon else PARAMETER)


def test_the_second_rank_counts(ranks: dict[int, dict[str, Any]], muon: bool) -> None:
    """Negative control: rank 0's documents alone give other gradients, by far more than the tolerance."""
    alone, together = ranks[1]["rank_0_alone"], ranks[2]["steps"][0]
    assert torch.equal(alone["rollouts"]["positions"], together["rollouts"]["positions"][[0, 1, 4, 5]])
    gradient, floor = (MUON, FLOOR) if muon else (GRADIENT, 0.0)
    assert worst(alone["gradients"][0], together["gradients"][0], floor) > 100 * gradient
