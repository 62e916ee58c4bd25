"""On a CUDA device: fla's own kernels under bf16 autocast, and families that have no CPU stand-ins."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from refine_verl.config import NSPSettings
from refine_verl.models import (
    Branches,
    Documents,
    FastWeightActor,
    RolloutDraws,
    load_model,
    make_actor,
    snapshot_count,
)
from refine_verl.models.adapters import WritesAdapter
from refine_verl.models.packing import Packed
from refine_verl.nsp import position_uniforms, refine_objective, rollout_uniforms

pytestmark = pytest.mark.gpu

# bf16 keeps 8 bits of a product, and forking cuts the document into other segments than recomputing does.
RELATIVE = 3e-2
NSP = NSPSettings(chunks=4, rollout_length=5)
LENGTHS = (512, 300)
COMMON = {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
FAMILIES = {
    "delta_net": {"num_heads": 2},
    "gated_deltanet": {"num_heads": 2, "head_dim": 64, "expand_v": 1.0},
    "gla": {"num_heads": 2},
    "kda": {"num_heads": 2, "head_dim": 64},
    "hgrn2": {"expand_ratio": 64},
}


def actor_of(family: str, device: str = "cuda") -> FastWeightActor:
    config = AutoConfig.for_model(family, **COMMON, **FAMILIES[family])
    model = load_model(None, config=config, seed=1).to(device)
    return make_actor(model, autocast_dtype=torch.bfloat16 if device == "cuda" else None)


def documents_on(device: str) -> Documents:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, COMMON["vocab_size"], (len(LENGTHS), max(LENGTHS)), generator=generator)
    return Documents.from_tensors(tokens.to(device), LENGTHS)


def update(actor: FastWeightActor, documents: Documents, nsp: NSPSettings) -> tuple[Tensor, Tensor]:
    """Log-probabilities and the flattened gradient of one update pass."""
    device = documents.tokens.device
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, COMMON["vocab_size"], (2, nsp.chunks, 1, nsp.rollout_length), generator=generator)
    positions = torch.tensor([[10, 150, 280, 506], [3, 100, 101, 290]])
    advantages = torch.randn(2 * nsp.chunks, generator=generator).to(device)
    actor.zero_grad()
    output = actor(
        mode="update", documents=documents, branches=Branches(positions.to(device), tokens.to(device)), nsp=nsp
    )
    count = documents.total - len(documents)
    old = output["log_probs"].detach() + 0.05
    loss, _ = refine_objective(
        output["ntp_loss_sum"], count, output["log_probs"], old, advantages,
        rl_coef=1.0, sft_coef=1.0, global_tokens=count, global_rollouts=2 * nsp.chunks,
    )  # fmt: skip
    loss.backward()
    gradient = torch.cat([p.grad.flatten().float().cpu() for p in actor.parameters() if p.grad is not None])
    return output["log_probs"].detach().float().cpu(), gradient


def relative(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grad_scope", ["full", "branch"])
def test_fork_equals_prefix(family: str, grad_scope: str) -> None:
    documents, nsp = documents_on("cuda"), replace(NSP, grad_scope=grad_scope)
    forked = update(actor_of(family), documents, nsp)
    recomputed = update(actor_of(family), documents, replace(nsp, rollout="prefix"))
    assert relative(forked[0], recomputed[0]) < RELATIVE
    assert relative(forked[1], recomputed[1]) < RELATIVE


@pytest.mark.parametrize("family", FAMILIES)
def test_rollouts_then_update_agree(family: str) -> None:
    """The policy that is trained gives the rollouts the log-probabilities they were written with."""
    actor, documents = actor_of(family), documents_on("cuda")
    shape = (NSP.chunks, NSP.rollouts_per_position, NSP.rollout_length)
    draws = RolloutDraws(
        torch.stack([torch.from_numpy(position_uniforms(0, 1, b, NSP.chunks)) for b in range(2)]),
        torch.stack([torch.from_numpy(rollout_uniforms(0, 1, b, *shape)) for b in range(2)]),
    )
    rollouts = actor(
        mode="rollout", documents=documents, nsp=NSP, draws=draws, snapshots=snapshot_count(NSP.chunks, max(LENGTHS))
    )
    branches = Branches(rollouts.positions, rollouts.tokens)
    output = actor(mode="update", documents=documents, branches=branches, nsp=NSP)
    assert relative(output["log_probs"].detach(), rollouts.log_probs.flatten(0, 2)) < RELATIVE


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_then_their_log_probabilities_agree(family: str) -> None:
    """Sampled token by token from forked states, scored in one packed pass over answers of unequal length."""
    actor, prompts = actor_of(family), documents_on("cuda")
    draws = torch.rand(2, 3, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    written = actor(
        mode="generate", prompts=prompts, limits=[20, 7], length=20, copies=3, temperature=1.0, draws=draws,
        stop_tokens=[1, 2, 3],
    )  # fmt: skip
    assert written.lengths[1].max() <= 7
    output = actor(
        mode="answer_log_probs", prompts=prompts, tokens=written.tokens, lengths=written.lengths, temperature=1.0,
        segments=3,
    )  # fmt: skip
    output["log_probs"].sum().backward()
    assert relative(output["log_probs"].detach(), written.log_probs.flatten(0, 1)) < RELATIVE
    assert all(p.grad is not None and p.grad.isfinite().all() for p in actor.parameters())


@pytest.mark.parametrize("family", ["delta_net", "gated_deltanet"])
def test_documents_do_not_leak(family: str) -> None:
    actor, documents = actor_of(family), documents_on("cuda")
    other = documents.tokens.clone()
    other[0] = other[0].flip(0)
    losses = [actor(mode="score", documents=Documents.from_tensors(t, LENGTHS))[0] for t in (documents.tokens, other)]
    assert torch.equal(losses[0][1], losses[1][1])
    assert not torch.equal(losses[0][0], losses[1][0])


def test_norms_of_writes_are_those_of_states_read_token_by_token() -> None:
    """Of a model that never forgets: fla's operators, asked once more, against the states themselves."""
    actor, documents = actor_of("delta_net"), documents_on("cuda").split(1)[1]
    with torch.no_grad(), actor.autocast(trains=False):
        traced = actor.trace(documents)
        assert traced is not None and isinstance(actor.adapter, WritesAdapter)
        got = actor.adapter.write_norms(traced[1]).cpu()
        state, before, wanted = None, None, []
        for token in documents.tokens[0, : documents.lengths[0]].split(1):
            _, state = actor.run(Packed.of_rows(token[None]), state, keep_state=True)
            after = [layer["recurrent_state"].clone() for layer in state.tree]
            steps = after if before is None else [b - a for a, b in zip(before, after, strict=True)]
            wanted.append(torch.stack([step.norm() for step in steps]).cpu())
            before = after
    assert relative(got, torch.stack(wanted, dim=1)) < RELATIVE
    assert relative(got[:, 1:], torch.stack(wanted, dim=1)[:, :-1]) > 3 * RELATIVE
