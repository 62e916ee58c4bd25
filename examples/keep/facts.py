"""Documents of facts and the models that read them: DeltaNets that the example trains itself.

A document is a list of facts, each a key and a value of several tokens, all random: nothing can be known of a fact but
by reading it. A question is a key, its answer the value. Models learn to read on sequences of the example on recall: a
document, and then its keys again, each with its value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from examples.keep.arms import Case
from examples.recall.bases import SMALL, BaseSpec, Trained, train_base
from examples.recall.task import Task
from refine_verl.models import FastWeightActor

PASSAGE = 8
"""Facts of a passage that adapters are trained on."""


@dataclass(frozen=True)
class Reader:
    """A model and how it learns to read; it is kept at its plateau.

    Attributes:
        facts, value_length, keys, values: of the documents it learns on, which are ``facts`` long.
        rounds: how often each fact is asked for in a training sequence.
        easy_steps: at most so many on two facts before that.
        steps, decay_steps, lr: of the training.
    """

    facts: int = 8
    value_length: int = 3
    keys: int = 64
    values: int = 64
    rounds: int = 2
    easy_steps: int = 1000
    steps: int = 600
    decay_steps: int = 600
    lr: float = 2e-3

    @property
    def task(self) -> Task:
        return Task(self.facts, self.value_length, self.rounds, self.keys, self.values)

    @property
    def spec(self) -> BaseSpec:
        config: dict[str, Any] = {**SMALL, "num_heads": 2}
        steps = {"steps": self.steps, "decay_steps": self.decay_steps, "easy_steps": self.easy_steps}
        return BaseSpec("delta_net", config, self.task, lr=self.lr, **steps)

    def train(self, seed: int) -> Trained:
        """From random weights."""
        return train_base(self.spec, seed)

    def model(self, weights: dict[str, Tensor]) -> FastWeightActor:
        """With these weights."""
        return self.spec.actor(weights)


def make_case(reader: Reader, facts: int, generator: torch.Generator) -> tuple[Case, Tensor]:
    """A document, all of its questions, and what adapters are trained on.

    Each fact begins a passage, with others behind it: an answer is to follow a key wherever that stands, also where
    nothing stands before it, as in a question without its document.

    Args:
        reader: whose keys and values.
        facts: of the document.
        generator: of all that is random.

    Returns:
        The case and its answers, int64 [facts, value_length].
    """
    length = 1 + reader.value_length
    store = reader.task.sample(generator, 1, facts)[0, : facts * length].unflatten(0, (facts, length))
    questions = list(store[:, :1])
    case = Case(
        document=store.flatten(),
        passages=[store[_beginning_with(first, facts, generator)].flatten() for first in range(facts)],
        questions=questions,
        alone=questions,
        limits=[reader.value_length] * facts,
    )
    return case, store[:, 1:]


def _beginning_with(first: int, facts: int, generator: torch.Generator) -> Tensor:
    """A fact and others in random order."""
    order = torch.randperm(facts, generator=generator)
    return torch.cat([torch.tensor([first]), order[order != first]])[:PASSAGE]
