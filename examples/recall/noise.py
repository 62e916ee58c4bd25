"""How noisy the policy gradient is: the same batch, positions and rollouts drawn again and again.

For each estimator (positions c, rollouts n, the group they are compared in, what a token is credited with, with or
without division by the standard deviation) the gradient of the policy loss alone is computed for independent draws
g_1 ... g_R.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from examples.miniature.training import Loop
from examples.recall.arms import BATCH
from examples.recall.bases import BaseSpec
from examples.recall.scores import batches
from refine_verl.adaptation.settings import AdaptSettings
from refine_verl.config import LossSettings, NSPSettings
from refine_verl.models import Documents
from refine_verl.nsp import group_standardise
from refine_verl.nsp.advantage import token_advantages
from refine_verl.nsp.metrics import equal_outcomes_share


@dataclass(frozen=True)
class Estimator:
    """A way to estimate the policy gradient from c * n rollouts per document."""

    chunks: int
    rollouts: int
    group: str
    credit: str = "rollout"
    divide: bool = False

    @property
    def name(self) -> str:
        """Its key in results."""
        return f"c{self.chunks}_n{self.rollouts}_{self.group}_{self.credit}{'_std' if self.divide else ''}"

    @property
    def label(self) -> str:
        """In tables and figures."""
        divided = ", divided" if self.divide else ""
        return f"c = {self.chunks}, n = {self.rollouts}, per {self.group}, credit per {self.credit}{divided}"

    def nsp(self, reward: str) -> NSPSettings:
        """Settings that write its rollouts; what every token earned is always asked for."""
        return NSPSettings(
            chunks=self.chunks, rollouts_per_position=self.rollouts, group=self.group, reward=reward, credit="token"
        )

    def advantages(self, written: Mapping[str, Tensor]) -> Tensor:
        """[B, c, n, k], of rollouts written with :meth:`nsp`."""
        compare = functools.partial(group_standardise, group=self.group, divide_by_std=self.divide)
        return token_advantages(written, NSPSettings(credit=self.credit), compare)

    def equal(self, written: Mapping[str, Tensor]) -> float:
        """Share of groups without a difference."""
        kept = {name: values for name, values in written.items() if name != "token_rewards" or self.credit == "token"}
        return equal_outcomes_share(kept, self.group)


PAPER = Estimator(8, 1, "sequence", divide=True)
ESTIMATORS = (
    PAPER,
    Estimator(8, 1, "sequence"),
    Estimator(8, 1, "sequence", "token"),
    Estimator(8, 8, "position"),
    Estimator(8, 8, "position", "token"),
    # from here on all write as many tokens
    Estimator(8, 32, "sequence", divide=True),
    Estimator(8, 32, "position"),
    Estimator(8, 32, "position", "token"),
    Estimator(32, 8, "sequence", divide=True),
    Estimator(32, 8, "sequence", "token"),
    Estimator(32, 8, "position"),
    Estimator(32, 8, "position", "token", divide=True),
    Estimator(32, 8, "position", "token"),
)
REFERENCE = Estimator(8, 32, "position", "token")
REFERENCE_DRAWS = 4
"""Draws of the reference for each draw of an estimator."""


def signal_to_noise(draws: Tensor) -> float:
    """|E g|^2 over tr Cov g from independent draws [R, P], unbiased in numerator and denominator.

    The squared length of the mean of R draws is |E g|^2 + tr Cov / R in expectation, hence the correction; where there
    is next to no signal the result scatters around 0 and may be below it.
    """
    mean = draws.mean(dim=0)
    noise = (draws - mean).square().sum() / (len(draws) - 1)
    return ((mean.square().sum() - noise / len(draws)) / noise).item()


def alignment(draws: Tensor, direction: Tensor) -> float:
    """Mean cosine between single draws [R, P] and a direction [P]."""
    return torch.nn.functional.cosine_similarity(draws, direction[None], dim=1).mean().item()


def measure(
    spec: BaseSpec, weights: dict[str, Tensor], reward: str, seed: int, draws: int, batch: int = BATCH
) -> dict[str, Any]:
    """Signal-to-noise ratio and alignment of every estimator, and how many groups have nothing to compare.

    ``alignment`` is with the gradient of the expected reward: the mean over independent draws of `REFERENCE`, which is
    unbiased at the paper's positions; ``halves`` is the cosine between the means of its two halves.
    """
    actor = spec.actor(weights)
    documents = spec.task.documents(batches(spec.task, seed, batch, 1)[0])
    draw = functools.partial(_draws, documents=documents, actor=actor, reward=reward, seed=seed)
    expected = draw([REFERENCE], count=REFERENCE_DRAWS * draws, first=10_000)[REFERENCE.name][0]
    first, second = (half.mean(dim=0) for half in expected.chunk(2))
    reference = expected.mean(dim=0)
    next_token = _next_token_gradient(actor, documents)
    result: dict[str, Any] = {
        "next_token_alignment": alignment(next_token[None], reference),
        "halves": alignment(first[None], second),
        "estimators": {},
    }
    for _, same in groupby(ESTIMATORS, lambda one: (one.chunks, one.rollouts)):
        for name, (gradients, equal) in draw(list(same), count=draws, first=1).items():
            result["estimators"][name] = {
                "signal_to_noise": signal_to_noise(gradients),
                "alignment": alignment(gradients, reference),
                "zero_std": equal,
                "norm": gradients.norm(dim=1).mean().item(),
            }
    return result


def _settings(**given: Any) -> AdaptSettings:
    return AdaptSettings(mini_batch_size=BATCH, micro_batch_size=BATCH, **given)


def _draws(
    estimators: Sequence[Estimator], *, documents: Documents, actor: Any, reward: str, seed: int, count: int, first: int
) -> dict[str, tuple[Tensor, float]]:
    """Gradients [R, P] of estimators with the same c and n, all from the same rollouts, and `Estimator.equal`."""
    alone = LossSettings(rl_coef=1.0, sft_coef=0.0)
    loop = Loop(actor, _settings(nsp=estimators[0].nsp(reward), loss=alone, seed=seed))
    gradients: dict[str, list[Tensor]] = {one.name: [] for one in estimators}
    equal = dict.fromkeys(gradients, 0.0)
    for index in range(first, first + count):
        written = loop.write(index, documents, range(len(documents)))
        for one in estimators:
            scored = {**written, "advantages": one.advantages(written)}
            gradients[one.name].append(loop.flat_gradient(documents, scored)[0])
            equal[one.name] += one.equal(written) / count
    return {name: (torch.stack(parts), equal[name]) for name, parts in gradients.items()}


def _next_token_gradient(actor: Any, documents: Documents) -> Tensor:
    return Loop(actor, _settings(method="sft", nsp=NSPSettings())).flat_gradient(documents, None)[0]
