"""Routes of tokens through experts: the same in the passes that write a rollout and in the one that trains on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from reference.hybrid import hybrid_actor, hybrid_config
from reference.toy import NSP, documents_of, draws_for, relative
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import load_balancing_loss_func

from refine_verl.config import ConfigError, ModelSettings, RefineSettings
from refine_verl.models import Branches, Packed, RolloutBatch
from refine_verl.models.hybrid.experts import balance_loss, combined, fingerprint
from refine_verl.models.reward_manager import HiddenStateRewardManager
from refine_verl.models.step import Step
from refine_verl.nsp import refine_objective
from refine_verl.preflight.run import check_balance

in_float64 = pytest.mark.usefixtures("in_float64")


def written_and_trained(positions: int = 0, **kwargs: object) -> tuple[RolloutBatch, Tensor]:
    """Rollouts, and the routes of the trained pass of branches that start ``positions`` tokens late."""
    actor, documents = hybrid_actor("experts", **kwargs), documents_of((40, 33))
    nsp = replace(NSP, rollouts_together=4)
    rollouts = actor(mode="rollout", documents=documents, nsp=nsp, draws=draws_for(range(2)), snapshots=24)
    branches = Branches(rollouts.positions + positions, rollouts.tokens)
    return rollouts, actor(mode="update", documents=documents, branches=branches, nsp=nsp)["routes"]


@in_float64
@pytest.mark.parametrize("checkpointing", ["none", "layer", "segment"])
def test_writing_and_training_agree(checkpointing: str) -> None:
    rollouts, trained = written_and_trained(activation_checkpointing=checkpointing)
    assert rollouts.routes is not None and rollouts.routes.shape == (2, 3, 2, 3)
    assert torch.equal(rollouts.routes.flatten(0, 2), trained)
    assert len(trained.unique()) > 5


@in_float64
def test_another_state_routes_otherwise() -> None:
    """Negative control: the same tokens after one more token."""
    rollouts, trained = written_and_trained(positions=1)
    assert (rollouts.routes.flatten(0, 2) != trained).float().mean() > 0


@in_float64
def test_the_fused_step_knows_both() -> None:
    step = Step(hybrid_actor("experts"), NSP, 0)
    numbers, output = step.on_policy(1, documents_of((40, 33)), range(2), HiddenStateRewardManager("cosine"))
    assert torch.equal(numbers["routes"].flatten(0, 2), output["routes"])


@in_float64
def test_models_without_experts_have_no_routes() -> None:
    actor, documents = hybrid_actor("qwen3_next"), documents_of((40,))
    rollouts = actor(mode="rollout", documents=documents, nsp=NSP, draws=draws_for([0]), snapshots=24)
    assert rollouts.routes is None
    branches = Branches(rollouts.positions, rollouts.tokens)
    assert "routes" not in actor(mode="update", documents=documents, branches=branches, nsp=NSP)


def test_a_route_is_a_set_of_experts_in_every_layer() -> None:
    one = fingerprint(torch.tensor([[3, 1], [1, 3], [1, 2], [0, 3]]))
    assert one[0] == one[1] and len(one.unique()) == 3
    other = one.flip(0)
    both = combined([one, other])
    assert both is not None and len(both.unique()) == 4
    assert not torch.equal(both, combined([other, one])) and combined([]) is None


@in_float64
def test_routes_are_those_of_the_last_pass() -> None:
    actor = hybrid_actor("experts")
    with torch.no_grad():
        actor.run(documents_of((9, 4)).whole, None, keep_state=False)
        assert actor.routes().shape == (13,)
        actor.run(Packed.of_rows(torch.tensor([[5, 6]])), None, keep_state=False)
        assert actor.routes().shape == (2,)


def test_autocast_goes_for_experts_too() -> None:
    """As for every other matrix product of a run on a GPU; gradients reach the parameters in their own dtype."""
    actor, packed = hybrid_actor("experts"), documents_of((9,)).whole
    actor.to(torch.float32)
    experts, seen = actor.base_model.layers[0].mlp.experts, []
    experts.register_forward_hook(lambda module, given, out: seen.append((module.gate_up_proj.dtype, out.detach())))
    plain, _ = actor.run(packed, None, keep_state=False)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        hidden, _ = actor.run(packed, None, keep_state=False)
    hidden.sum().backward()
    assert [dtype for dtype, _ in seen] == [torch.float32, torch.bfloat16]
    assert experts.gate_up_proj.grad.dtype == torch.float32 and experts.gate_up_proj.grad.abs().sum() > 0
    assert "gate_up_proj" not in experts.__dict__
    assert 0 < relative(hidden, plain) < 0.3


@in_float64
@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_the_load_balance_loss_is_that_of_transformers(checkpointing: str) -> None:
    """Of the documents alone, with and without rollouts, and its gradient."""
    documents = documents_of((40, 33))
    plain = hybrid_actor("experts")
    routers = [layer.mlp.gate for layer in plain.base_model.layers]
    logits: list[Tensor] = []
    for router in routers:
        router.register_forward_hook(lambda _, __, out: logits.append(out[0]))
    plain.run(documents.whole, None, keep_state=False)
    wanted = load_balancing_loss_func(tuple(logits), num_experts=4, top_k=2)
    wanted.backward()
    actor = hybrid_actor("experts", activation_checkpointing=checkpointing, balance_coef=0.5)
    rollouts = actor(mode="rollout", documents=documents, nsp=NSP, draws=draws_for(range(2)), snapshots=24)
    for branches in (None, Branches(rollouts.positions, rollouts.tokens)):
        actor.zero_grad()
        found = actor(mode="update", documents=documents, branches=branches, nsp=NSP)["balance_loss_sum"]
        assert relative(found.detach(), 0.5 * 71 * wanted.detach()) < 1e-9
        found.backward()
        for router, mine in zip(routers, (layer.mlp.gate for layer in actor.base_model.layers), strict=True):
            assert relative(mine.weight.grad, 0.5 * 71 * router.weight.grad) < 1e-9
    _, output = Step(actor, NSP, 0).on_policy(1, documents, range(2), HiddenStateRewardManager("cosine"))
    assert relative(output["balance_loss_sum"].detach(), 0.5 * 71 * wanted.detach()) < 1e-9
    assert "balance_loss_sum" not in plain(mode="update", documents=documents, branches=None, nsp=NSP)


def test_even_experts_have_the_least_loss() -> None:
    even = torch.eye(4).repeat(5, 1)
    assert balance_loss([even], 1).item() == pytest.approx(1)
    assert balance_loss([even, 9 * torch.eye(4)[:1].expand(20, 4)], 1) > 1.2


def test_a_share_of_the_objective() -> None:
    """Two micro-batches of one mini-batch: weighted by their tokens."""
    shares = [
        refine_objective(
            torch.tensor(2.0), count, rl_coef=0.0, sft_coef=1.0, global_tokens=10, global_rollouts=0,
            balance_loss_sum=torch.tensor(0.3 * count),
        )
        for count in (4, 6)
    ]  # fmt: skip
    assert sum(loss.item() for loss, _ in shares) == pytest.approx(0.4 + 0.3)
    assert sum(metrics["actor/balance_loss"].item() for _, metrics in shares) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("family", "model", "refine", "said"),
    [
        ("qwen3_next", {}, {}, "0.1 has no effect: a qwen3_next without experts"),
        ("experts", {"activation_checkpointing": "segment"}, {}, "needs documents in one piece"),
        ("experts", {}, {"nsp": replace(NSP, rollout="prefix")}, "not computed with refine.nsp.rollout=prefix"),
        ("experts", {}, {"phase": "posttrain", "inner": "none", "outer": "grpo"}, "no effect with refine.inner=none"),
        ("experts", {}, {"phase": "posttrain", "inner": "none", "outer": "sft"}, None),
        ("experts", {}, {}, None),
    ],
)
def test_a_loss_that_cannot_be_had_is_refused(
    family: str, model: dict[str, str], refine: dict[str, Any], said: str
) -> None:
    settings = ModelSettings(path="DIR", balance_coef=0.1, **model)
    arguments = hybrid_config(family), settings, RefineSettings(**refine)
    if said is None:
        check_balance(*arguments)
        return
    with pytest.raises(ConfigError, match=f"model.balance_coef: .*{said}"):
        check_balance(*arguments)
