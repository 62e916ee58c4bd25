"""The task: find the way through a star-shaped graph, of which only the first step is hard.

A sequence is several graphs, one after the other. A graph is the edges of a star in random order (``arms`` chains of
``length`` nodes that start at one centre; an edge is its two nodes, the nearer to the centre first), then a mark, the
goal (the end of one of the chains), the centre, and the way from the centre to the goal. Whoever is told the way so far
finds the next node among the edges; to choose the *first* node one has to walk back from the goal. The next-token loss
shows the way so far in training, so that all but one token of the way can be learned without ever planning
(Bachmann and Nagarajan, 2024, "The pitfalls of next-token prediction").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from refine_verl.models import Documents


@dataclass(frozen=True)
class PathTask:
    """Sizes of the task, under the names that base models know from the recall task; id ``nodes`` is the mark.

    Attributes:
        entries: arms of a star.
        value_length: nodes of an arm without the centre, and so of a way.
        rounds: graphs of a sequence.
        nodes: ids that nodes are drawn from, anew in each graph.
    """

    entries: int = 3
    value_length: int = 3
    rounds: int = 4
    nodes: int = 24

    @property
    def vocabulary(self) -> int:
        return self.nodes + 1

    @property
    def length(self) -> int:
        """T, tokens of a sequence."""
        return self.rounds * self._graph_length(self.entries)

    def _graph_length(self, arms: int) -> int:
        return 2 * arms * self.value_length + 3 + self.value_length

    def values_right(self, predictions: Tensor, tokens: Tensor, entries: int | None = None) -> Tensor:
        """Which nodes of the ways were predicted.

        Args:
            predictions: int64 [N, T-1], of tokens 1 ... T-1.
            tokens: int64 [N, T].
            entries: arms of these graphs; default: all.

        Returns:
            bool [N, rounds, value_length]. A way that is right as a whole is what greedy generation would have written
            after the centre.
        """
        size = self._graph_length(self.entries if entries is None else entries)
        missed = torch.zeros_like(tokens[:, :1], dtype=torch.bool)  # nothing predicts token 0, which is no way's
        right = torch.cat([missed, predictions == tokens[:, 1:]], dim=1)
        return right.unflatten(1, (-1, size))[..., -self.value_length :]

    def sample(self, generator: torch.Generator, count: int, entries: int | None = None) -> Tensor:
        """Fresh sequences, int64 [count, T]; with fewer ``entries`` they are shorter and easier."""
        arms = self.entries if entries is None else entries
        graphs = [self._graph(generator, arms) for _ in range(count * self.rounds)]
        return torch.stack(graphs).view(count, -1)

    def _graph(self, generator: torch.Generator, arms: int) -> Tensor:
        drawn = torch.randperm(self.nodes, generator=generator)[: 1 + arms * self.value_length]
        centre, chains = drawn[:1], drawn[1:].view(arms, self.value_length)
        nearer = torch.cat([centre.expand(arms, 1), chains[:, :-1]], dim=1)
        edges = torch.stack([nearer, chains], dim=-1).flatten(0, 1)
        edges = edges[torch.randperm(len(edges), generator=generator)].flatten()
        way = chains[0]  # chains are drawn alike, and their edges are shuffled
        return torch.cat([edges, torch.tensor([self.nodes]), way[-1:], centre, way])

    def documents(self, tokens: Tensor) -> Documents:
        """Sequences of equal length as a batch."""
        return Documents.from_tensors(tokens, (tokens.shape[1],) * len(tokens))
