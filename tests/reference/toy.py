"""Small documents, their random numbers and one update pass: shared by the tests of models and workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from refine_verl.config import NSPSettings
from refine_verl.models import Branches, Documents, FastWeightActor, RolloutDraws
from refine_verl.models.adapters import DeltaRuleAdapter
from refine_verl.nsp import position_uniforms, refine_objective, rollout_uniforms

VOCABULARY = 61
NSP = NSPSettings(chunks=3, rollout_length=4, rollouts_per_position=2)


class InSegments(DeltaRuleAdapter):
    """Without a trace, as an adapter of one method: documents are read in segments and states are replayed."""

    trace = None  # type: ignore[assignment]


class InPieces(DeltaRuleAdapter):
    """As on a GPU: operators give out final states only and are cut, here around the stand-ins."""

    def cuts_operators(self) -> bool:
        return True


def tiny_config(family: str, **values: object) -> Any:
    """A tiny configuration of ``family``."""
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "vocab_size": VOCABULARY,
        "hidden_ratio": 2,
        "fuse_cross_entropy": False,
    }
    if family == "gated_deltanet":
        settings.update(head_dim=16, expand_v=1.0)
    return AutoConfig.for_model(family, **{**settings, **values})


def documents_of(lengths: Sequence[int], seed: int = 3) -> Documents:
    """Random documents; the padding behind each one is random too, so reading it shows."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    return Documents.from_tensors(tokens, lengths)


def one_by_one(documents: Documents) -> list[Documents]:
    """The same documents, each in a batch of its own and without padding."""
    return [
        Documents.from_tensors(documents.tokens[b : b + 1, :length], [length])
        for b, length in enumerate(documents.lengths)
    ]


def draws_for(ids: Sequence[int], nsp: NSPSettings = NSP, step: int = 1) -> RolloutDraws:
    """What the worker draws for documents of these ids."""
    shape = (nsp.chunks, nsp.rollouts_per_position, nsp.rollout_length)
    return RolloutDraws(
        torch.stack([torch.from_numpy(position_uniforms(0, step, b, nsp.chunks)) for b in ids]),
        torch.stack([torch.from_numpy(rollout_uniforms(0, step, b, *shape)) for b in ids]),
    )


def relative(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return ((got - wanted).norm() / wanted.norm().clamp(min=1e-300)).item()


def share_of_loss(
    actor: FastWeightActor,
    documents: Documents,
    branches: Branches,
    old: Tensor,
    advantages: Tensor,
    totals: tuple[int, int],
    nsp: NSPSettings = NSP,
) -> Tensor:
    """This micro-batch's share of the REFINE loss, already back-propagated.

    Args:
        old: `[N * c * n, k]`; advantages: `[N * c * n]`; totals: tokens and rollouts of the mini-batch.
    """
    output = actor(mode="update", documents=documents, branches=branches, nsp=nsp)
    loss = loss_of(output, documents, old, advantages, totals)
    loss.backward()
    return loss.detach()


def loss_of(
    output: dict[str, Tensor],
    documents: Documents,
    old: Tensor,
    advantages: Tensor,
    totals: tuple[int, int] | None = None,
) -> Tensor:
    """The REFINE loss of what an `update` pass returned; ``totals`` as of `share_of_loss`, None: these documents'."""
    tokens = documents.total - len(documents)
    loss, _ = refine_objective(
        output["ntp_loss_sum"],
        tokens,
        output["log_probs"],
        old,
        advantages,
        rl_coef=0.7,
        sft_coef=1.0,
        global_tokens=totals[0] if totals else tokens,
        global_rollouts=totals[1] if totals else len(old),
    )
    return loss


def gradients(actor: FastWeightActor) -> dict[str, Tensor]:
    """A copy of every parameter's gradient."""
    return {name: parameter.grad.clone() for name, parameter in actor.named_parameters()}
