"""The models that mid-training starts from: a small DeltaNet, trained on the text until its learning rate is used up.

The learning rate stays at its highest, then falls to zero; weights are those of the lowest validation loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from examples.miniature.training import Loop
from examples.text.corpus import Corpus, documents
from examples.text.scores import next_token_scores
from refine_verl.adaptation.settings import AdaptSettings
from refine_verl.models import FastWeightActor, load_model, make_actor
from refine_verl.record.files import replacing


@dataclass(frozen=True)
class BaseSettings:
    """The model and its training.

    Attributes:
        hidden, layers, heads, vocabulary: of the model.
        steps: optimiser steps in all, ``warmup`` of them with a rising learning rate, ``decay_share`` with a falling
            one.
        batch: windows per step.
        lr: the highest learning rate of AdamW (0.9, 0.95).
        validate_every: steps.
        validate_on: windows of the validation text.
    """

    hidden: int = 96
    layers: int = 2
    heads: int = 2
    vocabulary: int = 1024
    steps: int = 2000
    warmup: int = 50
    decay_share: float = 0.4
    batch: int = 8
    lr: float = 5e-3
    validate_every: int = 200
    validate_on: int = 48

    def lr_scale(self, step: int) -> float:
        """What the learning rate is multiplied with at a step, counted from 1."""
        falling = (self.steps + 1 - step) / max(self.decay_share * self.steps, 1)
        return min(1.0, step / self.warmup, falling)

    def model(self, seed: int) -> nn.Module:
        """With random weights."""
        config = AutoConfig.for_model(
            "delta_net",
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_heads=self.heads,
            fuse_cross_entropy=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        return load_model(None, config=config, seed=seed)

    def actor(self, weights: dict[str, Tensor]) -> FastWeightActor:
        """With these weights."""
        model = self.model(0)
        model.load_state_dict(weights)
        return make_actor(model)


@dataclass
class Base:
    """Weights, the account of their training, and (step, validation loss) on the way."""

    weights: dict[str, Tensor]
    step: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)
    parameters: int = 0
    processor_seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """All but the weights."""
        return {name: value for name, value in vars(self).items() if name != "weights"}


def train_base(settings: BaseSettings, corpus: Corpus, seed: int) -> Base:
    """Train from random weights; ``seed`` is that of the weights and of the order of the windows."""
    actor = make_actor(settings.model(seed))
    loop = Loop(
        actor,
        AdaptSettings(
            method="sft",
            mini_batch_size=settings.batch,
            micro_batch_size=settings.batch,
            lr=settings.lr,
            betas=(0.9, 0.95),
        ),
    )
    order = corpus.epochs(seed)
    base = Base({}, parameters=sum(parameter.numel() for parameter in actor.parameters()))
    for step in range(1, settings.steps + 1):
        rows = [next(order) for _ in range(settings.batch)]
        loop.train(step, documents(corpus.train[rows]), rows, settings.lr_scale(step))
        if step % settings.validate_every and step != settings.steps:
            continue
        loss = next_token_scores(actor, corpus.validation[: settings.validate_on], 1)["ntp_loss"]
        if loss < min((known for _, known in base.curve), default=float("inf")):
            base.weights = {name: value.detach().clone() for name, value in actor.state_dict().items()}
            base.step = step
        base.curve.append((step, loss))
    base.processor_seconds = loop.compute.processor_seconds
    return base


def save_base(base: Base, path: Any) -> None:
    """Weights and account in one file, whole or not at all."""
    with replacing(path) as partial:
        torch.save({"weights": base.weights, **base.record()}, partial)


def load_base(path: Any) -> Base:
    """What :func:`save_base` wrote."""
    return Base(**torch.load(path, weights_only=True))
