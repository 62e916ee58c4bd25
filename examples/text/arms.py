"""The methods that are compared, and one mid-training run of one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from examples.miniature.training import Compute, Loop
from examples.text.base import BaseSettings
from examples.text.corpus import Corpus, documents
from examples.text.scores import all_scores
from refine_verl.adaptation.settings import AdaptSettings
from refine_verl.config import LossSettings, NSPSettings

# `Compute.token_passes` of a token that is trained on.
TRAINED_PASSES = 3


@dataclass(frozen=True)
class Method:
    """A way to mid-train; ``nsp`` over the defaults of the mid-training recipe.

    Attributes:
        name: in file names and results.
        label: in tables and figures.
        nsp: settings of ``refine.nsp``.
        rl_coef: lambda_RL; 0 is SFT.
        divide_by_std: of the advantages.
    """

    name: str
    label: str
    nsp: Mapping[str, Any] = field(default_factory=dict)
    rl_coef: float = 0.0
    divide_by_std: bool = True

    def loop_settings(self, training: Training, lr: float, seed: int) -> AdaptSettings:
        """Those of the shared loop. SFT has no rollouts of a whole batch, so its batch is the mini-batch."""
        return AdaptSettings(
            method="refine" if self.rl_coef else "sft",
            nsp=NSPSettings(**{"chunks": training.chunks, "rollout_length": training.rollout_length, **self.nsp}),
            loss=LossSettings(rl_coef=self.rl_coef),
            norm_adv_by_std_in_grpo=self.divide_by_std,
            mini_batch_size=training.mini_batch,
            micro_batch_size=training.mini_batch,
            lr=lr,
            seed=seed,
        )


@dataclass(frozen=True)
class Training:
    """What all methods share: optimiser steps, windows per batch and per optimiser step, c and k.

    Rollouts are written for a whole batch before its optimiser steps, as in the paper.
    """

    steps: int = 200
    batch: int = 32
    mini_batch: int = 8
    chunks: int = 8
    rollout_length: int = 5


GROUPED: Mapping[str, Any] = {"rollouts_per_position": 8, "group": "position"}
SFT = Method("sft", "SFT")
PAPER = Method("paper", "REFINE as in the paper: n=1, groups of a sequence, λ 0.2", {}, 0.2)
POSITION = Method("grouped", "REFINE grouped: n=8, groups of a position, no division, λ 1", GROUPED, 1.0, False)
# The weight that the sweep on the validation text found best for writing whole sequences.
HEAVY = replace(POSITION, name="grouped5", label="the same with λ 5", rl_coef=5.0)
METHODS = (SFT, PAPER, POSITION, HEAVY)
# In one piece for a mini-batch: there is memory enough, and nothing is computed twice.
MANY: Mapping[str, Any] = {**GROUPED, "chunks": 32, "credit": "token", "rollouts_together": 8 * 32 * 8}
# Compared in shorter runs of their own (`Plan.many`): a step costs seven times one of SFT.
MANY_METHODS = (
    SFT,
    Method(
        "many5", "REFINE, c=32, n=8, groups of a position, credit per token, cosine, no division, λ 5", MANY, 5.0, False
    ),
)
# Whose gradients are measured, each with its reward.
ESTIMATORS = (
    SFT,
    PAPER,
    POSITION,
    Method("many", "REFINE, c=32, n=8, credit per token, cosine", MANY, 1.0, False),
    Method("paper_binary", "REFINE as in the paper, binary", {"reward": "binary"}, 0.2),
    Method("many_binary", "REFINE, c=32, n=8, credit per token, binary", {**MANY, "reward": "binary"}, 1.0, False),
)


def run(
    method: Method,
    training: Training,
    lr: float,
    seed: int,
    base: BaseSettings,
    weights: dict[str, Tensor],
    corpus: Corpus,
    held_out: Tensor,
    score_at: Sequence[int] = (),
) -> dict[str, Any]:
    """Mid-train from ``weights`` and score on ``held_out``.

    Args:
        method: what is done.
        training: how much of it.
        lr: constant, AdamW (0.9, 0.999), weight decay 0.01, as in the paper.
        seed: of the order of the windows and of positions and rollouts. Methods that share it see the same windows.
        base: settings of the model.
        weights: where it starts; not changed.
        corpus: its training text.
        held_out: int64 [N, T].
        score_at: further optimiser steps after which SFT is scored.

    Returns:
        ``scores`` by number of optimiser steps, ``passes`` (tokens read, and trained tokens times three, per document
        token of an SFT pass), ``processor_seconds`` and the ``metrics`` of training, averaged over the steps.
    """
    loop = Loop(base.actor(weights), method.loop_settings(training, lr, seed))
    order = corpus.epochs(10_000 + seed)
    wanted = sorted({training.steps, *score_at})
    size = training.batch if method.rl_coef else training.mini_batch
    history: list[dict[str, float]] = []
    scores: dict[str, dict[str, float]] = {}
    while loop.compute.steps < wanted[-1]:
        rows = [next(order) for _ in range(size)]
        history.append(loop.train(len(history) + 1, documents(corpus.train[rows]), rows))
        if loop.compute.steps in wanted:
            scores[str(loop.compute.steps)] = all_scores(loop.actor, held_out, training.rollout_length)
    return {
        "scores": scores,
        "passes": relative_passes(loop.compute, training, corpus.length),
        "processor_seconds": loop.compute.processor_seconds,
        "metrics": {name: sum(one[name] for one in history) / len(history) for name in history[0]},
    }


def relative_passes(compute: Compute, training: Training, length: int) -> float:
    """Passes of tokens per optimiser step, over those of SFT; a backward pass counts as two forward passes."""
    return compute.token_passes / compute.steps / (TRAINED_PASSES * training.mini_batch * length)
