"""The models that mid-training starts from: random weights, trained on the task with the next-token loss.

One run of training gives both: *under-trained* weights, kept when the model begins to recall, and weights *at their
plateau*, after the rest of the run and a learning rate that falls to zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from examples.recall.task import Task
from refine_verl.models import FastWeightActor, load_model, make_actor

STATES = ("under", "plateau")


@dataclass(frozen=True)
class BaseSpec:
    """A model and how it is trained.

    Attributes:
        model_type, config: of the Hugging Face configuration; the vocabulary is the task's.
        task: what it is trained and tested on.
        easy_entries, easy_enough, easy_steps: before the real task, sequences of fewer entries until this share of
            values is right, or for so many steps at most. Without them some seeds never begin to recall.
        steps: on the real task at the full learning rate, the under-trained weights among them.
        decay_steps: behind them, with a learning rate falling to zero.
        enough: share of values right, in training batches, at which the under-trained weights are kept.
        lr, batch: of the training.
    """

    model_type: str
    config: dict[str, Any]
    task: Task
    steps: int
    decay_steps: int
    easy_entries: int = 2
    easy_enough: float = 0.5
    easy_steps: int = 1000
    enough: float = 0.25
    lr: float = 2e-3
    batch: int = 16

    def model(self, seed: int) -> nn.Module:
        """With random weights."""
        config = AutoConfig.for_model(
            self.model_type,
            vocab_size=self.task.vocabulary,
            fuse_cross_entropy=False,
            bos_token_id=None,
            eos_token_id=None,
            **self.config,
        )
        return load_model(None, config=config, seed=seed)

    def actor(self, weights: dict[str, torch.Tensor]) -> FastWeightActor:
        """With these weights."""
        model = self.model(0)
        model.load_state_dict(weights)
        return make_actor(model)


SMALL = {"hidden_size": 64, "num_hidden_layers": 2}
MODELS: dict[str, BaseSpec] = {
    "deltanet": BaseSpec(
        model_type="delta_net",
        config={**SMALL, "num_heads": 2},
        task=Task(entries=6, value_length=4, rounds=2, keys=32, values=64),
        steps=400,
        decay_steps=600,
    ),
    "lact": BaseSpec(
        model_type="lact_swiglu",
        config={
            **SMALL,
            "num_attn_heads": 2,
            "num_lact_heads": 2,
            "lact_chunk_size": 20,
            "window_size": 20,
            "w0_w2_low_rank": 8,
            "use_muon": False,
            "use_momentum": True,
            "attn_qk_norm": True,
            "initializer_range": 0.05,
            "rope_theta": 1e4,
        },
        task=Task(entries=2, value_length=3, rounds=4, keys=32, values=64),
        steps=800,
        decay_steps=500,
        easy_steps=0,
        lr=5e-3,
    ),
}


@dataclass
class Trained:
    """Weights by state, the step at which the under-trained were kept, and (step, entries, share right) on the way."""

    weights: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    steps: int = 0
    kept_at: int = 0
    curve: list[tuple[int, int, float]] = field(default_factory=list)
    parameters: int = 0


def train_base(spec: BaseSpec, seed: int) -> Trained:
    """Train from random weights.

    The under-trained weights are those of the first step whose last 10 batches had ``enough`` values right (and of
    the last step before the learning rate falls, where there is none).
    """
    actor = make_actor(spec.model(seed)).train()
    optimizer = torch.optim.AdamW(actor.parameters(), lr=spec.lr, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    trained = Trained(parameters=sum(p.numel() for p in actor.parameters()))
    recent: list[float] = []

    def step(lr_scale: float, entries: int) -> float:
        """Returns the share of values right in the last 10 batches (0 before there are 10)."""
        trained.steps += 1
        for group in optimizer.param_groups:
            group["lr"] = spec.lr * min(1.0, trained.steps / 50, lr_scale)
        tokens = spec.task.sample(generator, spec.batch, entries)
        recent.append(_step(actor, optimizer, spec.task, tokens, entries))
        share = sum(recent[-10:]) / 10 if len(recent) >= 10 else 0.0
        if trained.steps % 50 == 0:
            trained.curve.append((trained.steps, entries, share))
        return share

    for _ in range(spec.easy_steps):
        if step(1.0, spec.easy_entries) >= spec.easy_enough:
            break
    recent.clear()
    for index in range(1, spec.steps + spec.decay_steps + 1):
        share = step((spec.steps + spec.decay_steps + 1 - index) / max(spec.decay_steps, 1), spec.task.entries)
        if "under" not in trained.weights and (share >= spec.enough or index == spec.steps):
            trained.kept_at, trained.weights["under"] = trained.steps, _copy(actor)
    trained.weights["plateau"] = _copy(actor)
    return trained


def _step(
    actor: FastWeightActor, optimizer: torch.optim.Optimizer, task: Task, tokens: torch.Tensor, entries: int
) -> float:
    """One step on the next-token loss; returns the share of values that were right."""
    logits = actor(input_ids=tokens, use_cache=False).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
    optimizer.step()
    return task.values_right(logits.argmax(dim=-1), tokens, entries).all(dim=-1).float().mean().item()


def _copy(actor: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in actor.state_dict().items()}
