"""How much of a method's gradient is signal: over batches, its mean against its scatter."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from examples.miniature.training import Loop
from examples.recall.noise import alignment, signal_to_noise
from examples.text.arms import SFT, Method, Training
from examples.text.base import BaseSettings
from examples.text.corpus import Corpus, documents
from refine_verl.config import LossSettings

# Of the order of windows; no training run uses it.
ORDER = 31_337
# Learning rate: no step is taken.
UNUSED = 1.0


def gradient_signal(
    method: Method, training: Training, base: BaseSettings, weights: dict[str, Tensor], corpus: Corpus, batches: int
) -> dict[str, float]:
    """Of the policy loss alone (of the next-token loss for SFT), at the base weights, in mini-batches.

    Returns:
        ``signal``: :func:`examples.recall.noise.signal_to_noise` over batches; ``norm``: mean norm of a gradient;
        ``along_sft``: cosine between the mean gradient and the mean one of the next-token loss on the same windows;
        ``with_signal``: share of groups whose rewards differ.
    """
    actor = base.actor(weights)
    policy = LossSettings(rl_coef=1.0, sft_coef=0.0) if method.rl_coef else LossSettings(rl_coef=0.0)
    loop = Loop(actor, replace(method.loop_settings(training, lr=UNUSED, seed=0), loss=policy))
    plain = Loop(actor, SFT.loop_settings(training, lr=UNUSED, seed=0))
    order = corpus.epochs(ORDER)
    policy_draws, plain_draws, silent = [], [], 0.0
    for index in range(batches):
        rows = [next(order) for _ in range(training.mini_batch)]
        batch = documents(corpus.train[rows])
        written = loop.write(index + 1, batch, rows) if method.rl_coef else None
        gradient, metrics = loop.flat_gradient(batch, written)
        policy_draws.append(gradient.double())
        plain_draws.append(plain.flat_gradient(batch, None)[0].double())
        silent += metrics.get("nsp/group_zero_std", 0.0) / batches
    draws = torch.stack(policy_draws)
    return {
        "signal": signal_to_noise(draws),
        "norm": draws.norm(dim=1).mean().item(),
        "along_sft": alignment(draws.mean(dim=0)[None], torch.stack(plain_draws).mean(dim=0)),
        "with_signal": 1.0 - silent,
    }
