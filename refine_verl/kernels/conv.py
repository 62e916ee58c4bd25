"""CPU stand-ins for fla's short causal convolution, with its signatures and its state layout.

The state of a sequence is ``[D, W]``: slot j holds the convolution's input of token ``T - W + j``. (A kernel
of width W looks back W - 1 tokens only, so slot 0 is carried along but never read.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from refine_verl.kernels.chunking import sequence_lengths
from refine_verl.kernels.delta_rule import check_unknown
from refine_verl.kernels.recording import ConvHistory, Kept, RowGradients, active_recorder

_UNUSED = ("backend", "cu_seqlens_cpu", "chunk_indices")
"""Arguments of fla's signature that choose a kernel or spare it a look at the GPU."""


def _convolve(padded: torch.Tensor, taps: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Correlate ``[B, W + T, D]`` rows with ``[W, D]`` taps: ``[B, T, D]`` in the dtype of ``taps``."""
    width = taps.shape[0]
    tokens = padded.shape[1] - width
    out = padded[:, 1 : 1 + tokens] * taps[0]
    for j in range(1, width):
        out.addcmul_(padded[:, 1 + j : 1 + j + tokens], taps[j])
    return out if bias is None else out.add_(bias)


class _CausalConv(torch.autograd.Function):
    """Convolution of rows that already carry their state in front; saves nothing but its input."""

    @staticmethod
    def forward(
        ctx: Any,
        padded: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        silu: bool,
        waiting: RowGradients,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(padded, weight, bias)
        ctx.silu, ctx.waiting = silu, waiting
        ctx.set_materialize_grads(False)
        return _conv_forward(padded, weight, bias, silu), padded.new_empty(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, d_out: torch.Tensor | None, d_handle: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        # what came through the handle waits in ctx.waiting
        padded, weight, bias = ctx.saved_tensors
        taps = _taps(padded, weight)
        width = taps.shape[0]
        tokens = padded.shape[1] - width
        if d_out is None:
            d_out = taps.new_zeros(padded.shape[0], tokens, padded.shape[2])
        d_out = d_out.to(taps.dtype)
        if ctx.silu:
            # Recomputing the pre-activation costs W multiply-adds per element and saves a [B, T, D] tensor.
            d_out = torch.ops.aten.silu_backward(d_out, _convolve(padded, taps, bias))
        d_padded = taps.new_zeros(padded.shape)
        d_taps = torch.empty_like(taps)
        for j in range(width):
            rows = slice(1 + j, 1 + j + tokens)
            d_padded[:, rows].addcmul_(d_out, taps[j])
            d_taps[j] = (padded[:, rows] * d_out).sum((0, 1))
        ctx.waiting.add_to(d_padded.flatten(0, 1), "inputs")
        d_bias = None if bias is None else d_out.sum((0, 1)).to(bias.dtype)
        return d_padded.to(padded.dtype), d_taps.t().to(weight.dtype), d_bias, None, None


def _taps(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Filter as contiguous ``[W, D]`` in the compute dtype: at least float32."""
    return weight.detach().t().to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _conv_forward(padded: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool) -> torch.Tensor:
    out = _convolve(padded, _taps(padded, weight), bias)
    return (F.silu(out, inplace=True) if silu else out).to(padded.dtype)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool | None = False,
    activation: str | None = None,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Depthwise causal convolution ``y_t = act(sum_j weight[:, j] * x_{t-W+1+j} + bias) + residual_t``.

    Args:
        x: ``[B, T, D]``, float32, float64 or bfloat16 (computed in float32).
        weight: ``[D, W]``.
        bias: ``[D]``.
        residual: ``[B, T, D]``, added last.
        initial_state: ``[N, D, W]`` inputs that precede each sequence, zeros by default.
        output_final_state: whether to return the last W inputs of each sequence, older state included where a
            sequence is shorter than W.
        activation: ``"silu"``, ``"swish"`` or ``None``.
        cu_seqlens: ``[N + 1]`` bounds of the sequences packed into the one row (B = 1).
        **kwargs: fla's others; refused unless ``None``, ``False`` or without meaning here (`_UNUSED`).

    Returns:
        ``y`` ``[B, T, D]`` in x's dtype and the final state ``[N, D, W]`` in x's dtype, or ``None``; both
        differentiable with respect to x, weight, bias, residual and the initial state. Nothing is written in
        place.

    Raises:
        ValueError: for an unknown activation or shapes that do not fit together.
        NotImplementedError: for an argument that has no CPU implementation.
    """
    check_unknown("causal_conv1d", {name: value for name, value in kwargs.items() if name not in _UNUSED})
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"causal_conv1d: activation must be None, 'silu' or 'swish', got {activation!r}")
    width, lengths = weight.shape[1], sequence_lengths(x.shape[0], x.shape[1], cu_seqlens)
    packed = len(lengths) > len(x)  # several sequences in the one row, each preceded by its own W state rows
    cuts = [size for length in lengths for size in (length, width)]
    state = _rows_before(x, initial_state, len(lengths), width)
    if packed:
        pairs = zip(state, x[0].split(lengths), strict=True)
        padded = torch.cat([rows for pair in pairs for rows in pair]).unsqueeze(0)
    else:
        padded = torch.cat([state, x], 1)
    y, kept = _differentiable_conv(padded, weight, bias, activation is not None)
    if packed:
        y = torch.cat(y.split(cuts[:-1], 1)[::2], 1)  # row r of y ends at row r + W of the padded input
    if residual is not None:
        y = y + residual
    if not output_final_state:
        return y, None
    final = torch.stack(padded[0].split(cuts)[1::2]) if packed else padded[:, -width:]
    final = final.transpose(1, 2).contiguous()
    if (recorder := active_recorder()) is not None:
        sizes = torch.tensor(lengths, device=x.device) + width
        recorder.add(final, ConvHistory(kept=kept, start=sizes.cumsum(0) - sizes, width=width))
    return y, final


def _rows_before(x: torch.Tensor, initial_state: torch.Tensor | None, count: int, width: int) -> torch.Tensor:
    """The inputs that precede each of ``count`` sequences, ``[N, W, D]`` in x's dtype."""
    channels = x.shape[2]
    if initial_state is None:
        return x.new_zeros(count, width, channels)
    if initial_state.shape != (count, channels, width):
        raise ValueError(
            f"causal_conv1d: initial_state must be [sequences, D, W] = {[count, channels, width]}, "
            f"got {list(initial_state.shape)}"
        )
    return initial_state.to(x.dtype).transpose(1, 2)


def _differentiable_conv(
    padded: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool
) -> tuple[torch.Tensor, Kept]:
    """The convolution, and its inputs for a `ConvHistory`."""
    inputs = {"inputs": padded.detach().flatten(0, 1)}
    if not (torch.is_grad_enabled() and (padded.requires_grad or weight.requires_grad)):
        return _conv_forward(padded, weight, bias, silu), Kept(inputs)
    waiting = RowGradients()
    y, handle = _CausalConv.apply(padded, weight, bias, silu, waiting)
    return y, Kept(inputs, handle, waiting) if padded.requires_grad else Kept(inputs)


def causal_conv1d_update(
    x: torch.Tensor,
    cache: torch.Tensor,
    residual: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per sequence: `causal_conv1d` for ``[N, 1, D]``, ``[1, N, D]`` (packed) or ``[N, D]`` inputs.

    Unlike fla's kernel it returns a new cache and leaves the given one alone. fla's ``ShortConvolution.step``
    uses the returned tensor, so nothing depends on the write, and snapshots of the state that share it stay
    valid.

    Raises:
        ValueError: if the number of tokens is not the number of cached sequences.
    """
    if weight is None:
        raise ValueError("causal_conv1d_update: weight is required")
    shape, channels = x.shape, weight.shape[0]
    rows = x.reshape(-1, 1, channels)
    if len(rows) != len(cache):
        raise ValueError(f"causal_conv1d_update: {len(rows)} tokens for a cache of {len(cache)} sequences")
    y, state = causal_conv1d(
        rows,
        weight,
        bias,
        None if residual is None else residual.reshape(rows.shape),
        cache,
        output_final_state=True,
        activation=activation,
    )
    assert state is not None
    return y.view(shape), state.to(cache.dtype)
