"""The causal convolution with state as two nested loops."""

from __future__ import annotations

import torch


def causal_conv_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: torch.Tensor | None, silu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence ``[T, D]``, filter ``[D, W]``, state ``[D, W]``; returns ``[T, D]`` and the new state."""
    width = weight.shape[1]
    past = [torch.zeros_like(weight[:, 0])] * width if state is None else list(state.unbind(1))
    outputs = []
    for token in x:
        past = [*past[1:], token]
        y = torch.zeros_like(token) if bias is None else bias
        for j in range(width):
            y = y + weight[:, j] * past[j]
        outputs.append(y * torch.sigmoid(y) if silu else y)
    return (torch.stack(outputs) if outputs else x), torch.stack(past, 1)
