"""CPU stand-in for fla's rotary position embedding."""

from __future__ import annotations

import torch

from refine_verl.kernels.chunking import sequence_lengths


def _positions(x: torch.Tensor, offsets: int | torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """Position of every token: ``[1, T]`` or ``[B, T]``."""
    batch, tokens = x.shape[:2]
    shift = offsets if isinstance(offsets, torch.Tensor) else torch.full((1,), offsets)
    if cu_seqlens is None:
        return torch.arange(tokens) + shift.view(-1, 1)
    lengths = torch.tensor(sequence_lengths(batch, tokens, cu_seqlens))
    start = lengths.cumsum(0) - lengths
    within = torch.arange(tokens) - torch.repeat_interleave(start, lengths)
    return (within + torch.repeat_interleave(shift.expand(len(lengths)), lengths)).unsqueeze(0)


def rotary_embedding(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate the first R of each head's D channels by the angle of the token's position.

    Args:
        x: ``[B, T, H, D]``.
        cos, sin: ``[positions, R / 2]`` tables.
        interleaved: rotate neighbouring channels instead of channel i with i + R/2.
        inplace: accepted for fla's signature; the input is never overwritten.
        seqlen_offsets: position of each sequence's first token, one number or ``[N]``.
        cu_seqlens: ``[N + 1]`` bounds of packed sequences; positions restart at each.
        chunk_indices: accepted for fla's signature and not needed here.

    Returns:
        A tensor of x's shape and dtype; the rotation is computed in float32 (float64 for float64 inputs).
    """
    del inplace, chunk_indices
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    positions = _positions(x, seqlen_offsets, cu_seqlens)
    c, s = (table[positions].to(dtype).unsqueeze(2) for table in (cos, sin))
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].to(dtype), x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        out = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        out = torch.cat((a * c - b * s, b * c + a * s), -1)
    return torch.cat((out.to(x.dtype), rest), -1)
