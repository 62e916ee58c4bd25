"""Documents of unequal length without padding: one packed row and the places where each one starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refine_verl.models.state import FastWeightState

IGNORED = -100
"""Target of a token that is not predicted, as in torch's cross-entropy."""


@dataclass(frozen=True)
class Packed:
    """Token runs of one or more sequences, ready for a model.

    Attributes:
        tokens: int64 [rows, L] when all runs have the same length L, else [1, total].
        lengths: length of each run.
        cu_seqlens: int64 [len(lengths) + 1] offsets of the runs in the packed row, None if ``tokens`` has one
            row per run (then it is not needed and kernels for plain batches apply).
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    cu_seqlens: Tensor | None

    @classmethod
    def of_rows(cls, tokens: Tensor) -> Packed:
        """One run for each row of ``tokens`` [R, L]."""
        return cls(tokens, (tokens.shape[1],) * tokens.shape[0], None)

    @property
    def last(self) -> Tensor:
        """int64 [runs]: index of each run's last token in the flattened order of ``tokens``."""
        return (torch.tensor(self.lengths).cumsum(0) - 1).to(self.tokens.device, non_blocking=True)


def pack(runs: Sequence[Tensor]) -> Packed:
    """Pack int64 [L_i] token runs, each of at least one token, in order."""
    lengths = tuple(run.shape[0] for run in runs)
    if min(lengths) < 1:
        raise ValueError(f"cannot pack an empty run of tokens (lengths {lengths})")
    if len(set(lengths)) == 1:
        return Packed.of_rows(torch.stack(list(runs)))
    offsets = torch.tensor((0, *lengths)).cumsum(0).to(runs[0].device, non_blocking=True)
    return Packed(torch.cat(list(runs)).unsqueeze(0), lengths, offsets)


@dataclass(frozen=True)
class Documents:
    """A micro-batch of documents S = (x_0, ..., x_{T-1}).

    Attributes:
        tokens: int64 [N, Tmax]; row b holds T_b tokens, what follows them is never read.
        lengths: T_b for each document.
        learn_from: index of the first token of each document that has a next-token loss: T of the prompt for a
            prompt with its answer behind it, T_b for a document that only keeps ranks in step; None: 1 for all.
        before: N rows, the state after what was read before the documents, a constant; None: they are the beginning.
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    learn_from: tuple[int, ...] | None = None
    before: FastWeightState | None = None

    @classmethod
    def from_tensors(
        cls,
        tokens: Tensor,
        lengths: Tensor | Sequence[int],
        learn_from: Tensor | Sequence[int] | None = None,
        before: FastWeightState | None = None,
    ) -> Documents:
        """From padded tokens [N, Tmax], lengths [N], first tokens to learn [N] and the state before them [N rows]."""
        first = None if learn_from is None else _integers(learn_from)
        return cls(tokens, _integers(lengths), first, before)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        """Number of tokens of all documents."""
        return sum(self.lengths)

    def select(self, rows: Sequence[int]) -> Documents:
        """Some of the documents, in the order of ``rows``."""
        return Documents(
            self.tokens[torch.as_tensor(list(rows)).to(self.tokens.device, non_blocking=True)],
            tuple(self.lengths[row] for row in rows),
            None if self.learn_from is None else tuple(self.learn_from[row] for row in rows),
            None if self.before is None else self.before.select(list(rows)),
        )

    def split(self, size: int) -> list[Documents]:
        """Micro-batches of ``size`` documents, the last of what is left."""
        rows = range(len(self))
        return [self.select(rows[start : start + size]) for start in range(0, len(self), size)]

    @property
    def predicted(self) -> int:
        """Number of tokens that have a next-token loss."""
        first = self.learn_from or (1,) * len(self)
        return sum(length - start for length, start in zip(self.lengths, first, strict=True))

    @property
    def whole(self) -> Packed:
        """All tokens of all documents."""
        return self.cut([0] * len(self), self.lengths)

    def cut(self, starts: Sequence[int], stops: Sequence[int]) -> Packed:
        """Pack tokens starts[b]..stops[b]-1 of every document; past its end a document yields its first token."""
        runs = []
        for b, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            ended = start >= self.lengths[b]
            runs.append(self.tokens[b, :1] if ended else self.tokens[b, start:stop])
        return pack(runs)

    def next_tokens(self, packed: Packed, stops: Sequence[int]) -> Tensor:
        """What each token of a `cut` predicts, in the order of ``packed.tokens``: int64 [tokens].

        Its successor; IGNORED for the last token of a document and for what lies before ``learn_from``.
        """
        runs = []
        for b, (length, stop) in enumerate(zip(packed.lengths, stops, strict=True)):
            following = self.tokens[b, stop - length + 1 : stop + 1]
            if stop == self.lengths[b]:
                following = torch.cat([following[: length - 1], following.new_full((1,), IGNORED)])
            if self.learn_from is not None:
                skipped = min(max(self.learn_from[b] - (stop - length + 1), 0), length)
                following = torch.cat([following.new_full((skipped,), IGNORED), following[skipped:]])
            runs.append(following)
        return torch.cat(runs)

    def places(self, positions: Tensor) -> Tensor:
        """Where ``positions`` [N, c] are among the tokens of all documents: int64 [N * c]; both on the CPU."""
        lengths = torch.tensor(self.lengths)
        return (positions + (lengths.cumsum(0) - lengths)[:, None]).flatten()

    def even_cuts(self, segments: int) -> list[list[int]]:
        """``segments + 1`` borders per document, as even as possible: list over borders of [N] positions.

        A document of fewer tokens than segments gets one token in each of the first and none in the rest.
        """
        return [
            [index * length // segments if length >= segments else min(index, length) for length in self.lengths]
            for index in range(segments + 1)
        ]


def _integers(values: Tensor | Sequence[int]) -> tuple[int, ...]:
    return tuple(int(value) for value in (values.tolist() if isinstance(values, Tensor) else values))
