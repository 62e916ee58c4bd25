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

from examples.paths.task import PathTask
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
    task: Task | PathTask
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


RECALL = ("deltanet", "lact")
"""Names in `MODELS` of those that learn to recall; the others learn the task of an example beside this one."""
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
    "paths": BaseSpec(
        model_type="delta_net",
        config={**SMALL, "num_heads": 2},
        task=PathTask(entries=3, value_length=3, rounds=4, nodes=24),
        steps=600,
        decay_steps=300,
        easy_steps=0,
        enough=0.15,
        lr=4e-3,
    ),
}


@dataclass
class Trained:
    """Weights by state, the step at which the under-trained were kept, and (step, entries, share right) on the way.

    ``attempts`` counts the initialisations that were needed.
    """

    weights: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    steps: int = 0
    attempts: int = 1
    kept_at: int = 0
    curve: list[tuple[int, int, float]] = field(default_factory=list)
    parameters: int = 0


ATTEMPTS = 3


def train_base(spec: BaseSpec, seed: int) -> Trained:
    """Train from random weights.

    The under-trained weights are those of the first step whose last 10 batches had ``enough`` values right (and of
    the last step before the learning rate falls, where there is none). Now and then training never gets beyond the
    uniform distribution; weights that have not learned the easy sequences at the end of their steps are given up for
    new ones, twice at most.
    """
    for attempt in range(ATTEMPTS):
        training = _Training(spec, seed + 1000 * attempt)
        begun = training.easy()
        if begun or attempt == ATTEMPTS - 1:
            break
    trained = training.trained
    trained.attempts = attempt + 1
    for index in range(1, spec.steps + spec.decay_steps + 1):
        left = (spec.steps + spec.decay_steps + 1 - index) / max(spec.decay_steps, 1)
        share = training.step(left, spec.task.entries)
        if "under" not in trained.weights and (share >= spec.enough or index == spec.steps):
            trained.kept_at, trained.weights["under"] = trained.steps, _copy(training.actor)
    trained.weights["plateau"] = _copy(training.actor)
    return trained


class _Training:
    """One attempt at a base."""

    def __init__(self, spec: BaseSpec, seed: int) -> None:
        self.spec = spec
        self.actor = make_actor(spec.model(seed)).train()
        self.optimizer = torch.optim.AdamW(self.actor.parameters(), lr=spec.lr, weight_decay=0.01)
        self.generator = torch.Generator().manual_seed(seed)
        self.trained = Trained(parameters=sum(p.numel() for p in self.actor.parameters()))
        self.recent: list[float] = []

    def easy(self) -> bool:
        """Learn sequences of few entries; returns whether that worked."""
        for _ in range(self.spec.easy_steps):
            if self.step(1.0, self.spec.easy_entries) >= self.spec.easy_enough:
                break
        else:
            if self.spec.easy_steps:
                return False
        self.recent.clear()
        return True

    def step(self, lr_scale: float, entries: int) -> float:
        """Returns the share of values right in the last 10 batches (0 before there are 10)."""
        self.trained.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.spec.lr * min(1.0, self.trained.steps / 50, lr_scale)
        tokens = self.spec.task.sample(self.generator, self.spec.batch, entries)
        self.recent.append(_step(self.actor, self.optimizer, self.spec.task, tokens, entries))
        share = sum(self.recent[-10:]) / 10 if len(self.recent) >= 10 else 0.0
        if self.trained.steps % 50 == 0:
            self.trained.curve.append((self.trained.steps, entries, share))
        return share


def _step(
    actor: FastWeightActor, optimizer: torch.optim.Optimizer, task: Task | PathTask, tokens: torch.Tensor, entries: int
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
