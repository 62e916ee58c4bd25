"""From the batches callers have (rows, packed rows, padded rows) to concatenated tokens, and back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A batch [B, L] as runs of tokens.

    Attributes:
        shape: (B, L).
        lengths: tokens of each run.
        places: int64 [tokens], where they lie in the flattened batch; None if everywhere.
    """

    shape: tuple[int, int]
    lengths: tuple[int, ...]
    places: Tensor | None

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
            return cls(
                (rows, width), tuple(stop - start for start, stop in zip(borders, borders[1:], strict=False)), None
            )
        if attention_mask is None:
            return cls((rows, width), (width,) * rows, None)
        if attention_mask.dim() != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < width:
            raise ValueError(
                f"attention_mask of shape {list(attention_mask.shape)} for a batch of shape [{rows}, {width}]: one 0 "
                "or 1 per token is needed"
            )
        real = attention_mask[:, -width:].bool()
        counts = real.sum(dim=1).tolist()
        whole = all(count == width for count in counts)
        return cls((rows, width), tuple(counts), None if whole else real.flatten().nonzero()[:, 0])

    def flatten(self, x: Tensor) -> Tensor:
        """[B, L, ..] -> [tokens, ..]."""
        x = x.flatten(0, 1)
        return x if self.places is None else x.index_select(0, self.places)

    def unflatten(self, x: Tensor) -> Tensor:
        """[tokens, ..] -> [B, L, ..], zeros at padding."""
        if self.places is not None:
            full = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
            x = full.index_copy(0, self.places, x)
        return x.unflatten(0, self.shape)
