"""The task: entries of a key and a value of several tokens, then the keys again and again, each with its value.

A sequence is ``store | round | round | ...``. The store lists ``entries`` keys, each followed by its value; every round
asks for all of them in an order of its own. What follows a key that was seen before is certain; keys, and all of the
store, are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from refine_verl.models import Documents


@dataclass(frozen=True)
class Task:
    """Sizes of the task; ids below ``keys`` are keys, the ``values`` ids above are what values are made of."""

    entries: int = 6
    value_length: int = 4
    rounds: int = 2
    keys: int = 32
    values: int = 64

    @property
    def vocabulary(self) -> int:
        return self.keys + self.values

    @property
    def entry_length(self) -> int:
        return 1 + self.value_length

    @property
    def length(self) -> int:
        """T, tokens of a sequence."""
        return self.entries * self.entry_length * (1 + self.rounds)

    def values_right(self, predictions: Tensor, tokens: Tensor, entries: int | None = None) -> Tensor:
        """Which tokens of the values asked for in rounds were predicted.

        Args:
            predictions: int64 [N, T-1], of tokens 1 ... T-1.
            tokens: int64 [N, T].
            entries: of these sequences; default: all.

        Returns:
            bool [N, rounds * entries, value_length]. A value that is right as a whole is what greedy generation would
            have written after its key.
        """
        store = (self.entries if entries is None else entries) * self.entry_length
        right = (predictions == tokens[:, 1:])[:, store - 1 :]
        return right.unflatten(1, (-1, self.entry_length))[..., 1:]

    def sample(self, generator: torch.Generator, count: int, entries: int | None = None) -> Tensor:
        """Fresh sequences, int64 [count, T]; with fewer ``entries`` they are shorter and easier."""
        entries = self.entries if entries is None else entries
        keys = torch.stack([torch.randperm(self.keys, generator=generator)[:entries] for _ in range(count)])
        values = self.keys + torch.randint(0, self.values, (count, entries, self.value_length), generator=generator)
        store = torch.cat([keys[..., None], values], dim=-1)
        parts = [store]
        for _ in range(self.rounds):
            order = torch.stack([torch.randperm(entries, generator=generator) for _ in range(count)])
            parts.append(store.gather(1, order[..., None].expand_as(store)))
        return torch.cat(parts, dim=1).flatten(1)

    def documents(self, tokens: Tensor) -> Documents:
        """Sequences of equal length as a batch."""
        return Documents.from_tensors(tokens, (tokens.shape[1],) * len(tokens))
