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
        moved = index.clamp(min=0).to(device, non_blocking=True)
        return cls(moved, holes.to(device, non_blocking=True) if len(holes) else None)


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
        if self.back is None:
            return self.there(x)
        out = _TakeOnce.apply(x, self.there, self.back)
        assert isinstance(out, Tensor)
        return out

    @property
    def inverse(self) -> Take:
        """The way back, where no row is taken twice: [M, ...] -> [N, ...], zeros for rows that were not taken."""
        return Take(self.back, self.there)

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
    out = _Windows.apply(x, spans, index.to(x.device, non_blocking=True))
    assert isinstance(out, Tensor)
    return out


@dataclass(frozen=True)
class Layout:
    """A batch [B, L] (rows, packed rows or padded rows) as runs of tokens.

    Attributes:
        shape: (B, L).
        lengths: tokens of each run.
        tokens: flattened batch -> tokens.
    """

    shape: tuple[int, int]
    lengths: tuple[int, ...]
    tokens: Take

    @classmethod
    def of(
        cls,
        batch: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Layout:
        """Args:
        batch: [B, L, ..].
        attention_mask: [B, L] or longer (then its end counts), 0 for padding, on whatever side.
        cu_seqlens: [runs + 1], borders of the runs in a batch of one row.

        Raises:
            ValueError: borders that do not cover the row, or a mask of another shape; names what was given.
        """
        rows, width = batch.shape[:2]
        if cu_seqlens is not None:
            if attention_mask is not None:
                raise ValueError("give cu_seqlens or attention_mask, not both: a packed row has no padding")
            borders = cu_seqlens.tolist()
            if rows != 1 or borders[0] != 0 or borders[-1] != width or borders != sorted(borders):
                raise ValueError(f"cu_seqlens {borders} does not cut a batch of shape [{rows}, {width}] into runs")
            lengths = tuple(stop - start for start, stop in zip(borders, borders[1:], strict=False))
            return cls((rows, width), lengths, Take(None, None))
        if attention_mask is None:
            return cls((rows, width), (width,) * rows, Take(None, None))
        if attention_mask.dim() != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < width:
            raise ValueError(
                f"attention_mask of shape {list(attention_mask.shape)} for a batch of shape [{rows}, {width}]: one 0 "
                "or 1 per token is needed"
            )
        real = attention_mask[:, -width:].bool()
        places = real.flatten().nonzero()[:, 0].cpu()
        return cls((rows, width), tuple(real.sum(dim=1).tolist()), Take.of(places, rows * width, batch.device))

    def flatten(self, x: Tensor) -> Tensor:
        """[B, L, ..] -> [tokens, ..]."""
        return self.tokens(x.flatten(0, 1))

    def unflatten(self, x: Tensor) -> Tensor:
        """[tokens, ..] -> [B, L, ..], zeros at padding."""
        return self.tokens.inverse(x).unflatten(0, self.shape)
