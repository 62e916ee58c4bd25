"""Moving tokens between layouts: rows of a tensor taken by index, with gradients that are such moves themselves.

The backward pass of ``index_select`` adds row by row. Where every row is taken at most once it is only the inverse
move, which is what :class:`Take` makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Move:
    """index int64 [M], and the places [holes] among them that are filled with zeros."""

    index: Tensor
    holes: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x.new_zeros(self.index.shape[0], *x.shape[1:])
        taken = x.index_select(0, self.index)
        return taken if self.holes is None else taken.index_fill_(0, self.holes, 0)

    @classmethod
    def of(cls, index: Tensor, device: torch.device) -> _Move:
        """From a CPU index with -1 for holes."""
        holes = (index < 0).nonzero()[:, 0]
        return cls(index.clamp(min=0).to(device), holes.to(device) if len(holes) else None)


class _TakeOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: _Move, back: _Move) -> Tensor:
        ctx.moves = (there, back)
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        there, back = ctx.moves
        return _TakeOnce.apply(grad, back, there), None, None


@dataclass(frozen=True)
class Take:
    """Rows of a tensor by index; -1 gives a row of zeros.

    Attributes:
        there: the move; None if it changes nothing.
        back: its inverse, None if some row is taken twice.
    """

    there: _Move | None
    back: _Move | None

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, ...] -> [M, ...]."""
        if self.there is None:
            return x
        if self.back is not None:
            out = _TakeOnce.apply(x, self.there, self.back)
            assert isinstance(out, Tensor)
            return out
        taken = x.index_select(0, self.there.index)
        return taken if self.there.holes is None else taken.index_fill(0, self.there.holes, 0)

    @classmethod
    def of(cls, index: Tensor, size: int, device: torch.device) -> Take:
        """Args:
        index: int64 [M] on the CPU, -1 for rows of zeros.
        size: N, number of rows to take from.
        device: of the tensors.
        """
        places = torch.arange(len(index))
        if len(index) == size and torch.equal(index, places):
            return cls(None, None)
        real = index >= 0
        inverse = torch.full((size,), -1)
        inverse[index[real]] = places[real]
        once = int((inverse >= 0).sum()) == int(real.sum())
        return cls(_Move.of(index, device), _Move.of(inverse, device) if once else None)


class _Windows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spans: Sequence[tuple[int, int]], index: Tensor) -> Tensor:
        ctx.spans, ctx.index, ctx.shape = spans, index, x.shape
        width = index.shape[0] // len(spans)
        taken = x.index_select(0, index).view(len(spans), width, *x.shape[1:])
        return taken.transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = grad.new_zeros(ctx.shape)
        tokens = grad.transpose(1, 2)
        for (start, stop), part in zip(ctx.spans, tokens, strict=True):
            total[start:stop] += part[: stop - start]
        return total, None, None


def windows(x: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Overlapping stretches of x [N, H, D]: [len(spans), H, width, D], shorter ones filled up behind with anything."""
    width = max(stop - start for start, stop in spans)
    starts = torch.tensor([start for start, _ in spans])
    index = (starts[:, None] + torch.arange(width)).clamp(max=x.shape[0] - 1).flatten()
    out = _Windows.apply(x, spans, index.to(x.device))
    assert isinstance(out, Tensor)
    return out
