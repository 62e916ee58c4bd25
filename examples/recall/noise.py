"""How noisy the policy gradient is: the same batch, positions and rollouts drawn again and again.

For each estimator (n rollouts per position, the group they are compared in, with or without division by its standard
deviation) the gradient of the policy loss alone is computed for independent draws g_1 ... g_R.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from refine_verl.nsp import group_standardise, group_zero_std_share

COUNTS = (1, 4, 8)
REFERENCE_COUNT = 16


def estimators(n: int) -> list[tuple[str, str, bool]]:
    """(name, group, divide_by_std) of those that n rollouts per position allow."""
    groups = ("sequence",) if n == 1 else ("sequence", "position")
    return [
        (f"n{n}_{group}{'' if divide else '_nostd'}", group, divide) for group in groups for divide in (True, False)
    ]


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


def measure(spec: BaseSpec, weights: dict[str, Tensor], reward: str, seed: int, draws: int) -> dict[str, Any]:
    """Signal-to-noise ratio and alignment of every estimator, and how many groups have nothing to compare.

    ``alignment`` is with the gradient of the expected reward: the mean over as many other draws of 16 rollouts per
    position, compared within the position and not divided, an unbiased and the least noisy estimate.
    """
    actor = spec.actor(weights)
    documents = spec.task.documents(batches(spec.task, seed, BATCH, 1)[0])
    expected = _draws(_loop(actor, reward, REFERENCE_COUNT, seed), documents, [("", "position", False)], draws, 10_000)
    reference = expected[""][0].mean(dim=0)
    next_token = _next_token_gradient(_loop(actor, reward, 1, seed), documents)
    result: dict[str, Any] = {
        "next_token_alignment": alignment(next_token[None], reference),
        "estimators": {},
    }
    for n in COUNTS:
        for name, (gradients, zero) in _draws(
            _loop(actor, reward, n, seed), documents, estimators(n), draws, 1
        ).items():
            result["estimators"][name] = {
                "signal_to_noise": signal_to_noise(gradients),
                "alignment": alignment(gradients, reference),
                "zero_std": zero,
                "norm": gradients.norm(dim=1).mean().item(),
            }
    return result


def _loop(actor: Any, reward: str, n: int, seed: int) -> Loop:
    nsp = NSPSettings(rollouts_per_position=n, reward=reward)
    return Loop(actor, _settings(nsp=nsp, loss=LossSettings(rl_coef=1.0, sft_coef=0.0), seed=seed))


def _settings(**given: Any) -> AdaptSettings:
    return AdaptSettings(mini_batch_size=BATCH, micro_batch_size=BATCH, **given)


def _draws(
    loop: Loop, documents: Documents, kinds: Sequence[tuple[str, str, bool]], count: int, first: int
) -> dict[str, tuple[Tensor, float]]:
    """Gradients [R, P] of each kind, all from the same rollouts, and the mean share of groups without a difference."""
    gradients: dict[str, list[Tensor]] = {name: [] for name, _, _ in kinds}
    zero = dict.fromkeys(gradients, 0.0)
    for index in range(first, first + count):
        written = loop.write(index, documents, range(len(documents)))
        for name, group, divide in kinds:
            rewards = written["rewards"]
            advantages = group_standardise(rewards, group, divide_by_std=divide)
            scored = {**written, "advantages": advantages}
            gradients[name].append(loop.flat_gradient(documents, scored)[0])
            zero[name] += group_zero_std_share(rewards, group) / count
    return {name: (torch.stack(parts), zero[name]) for name, parts in gradients.items()}


def _next_token_gradient(loop: Loop, documents: Documents) -> Tensor:
    return Loop(loop.actor, _settings(method="sft", nsp=loop.settings.nsp)).flat_gradient(documents, None)[0]
