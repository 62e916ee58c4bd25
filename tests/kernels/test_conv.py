"""The short convolution against two nested loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference.kernel_coverage import compares
from reference.short_conv import causal_conv_reference

from refine_verl.kernels.patch import TARGETS

CONV = TARGETS["fla.modules.causal_conv1d.ops:causal_conv1d"]
UPDATE = TARGETS["fla.modules.causal_conv1d.ops:causal_conv1d_update"]


def make_inputs(batch: int, tokens: int, sequences: int, width: int = 4) -> list[torch.Tensor]:
    """x, weight, bias, state, residual."""
    gen = torch.Generator().manual_seed(0)
    shapes = [(batch, tokens, 6), (6, width), (6,), (sequences, 6, width), (batch, tokens, 6)]
    return [torch.randn(*s, generator=gen, dtype=torch.float64).requires_grad_() for s in shapes]


def reference(inputs: list[torch.Tensor], cu: list[int] | None, silu: bool) -> list[torch.Tensor]:
    x, weight, bias, state, residual = inputs
    pieces = list(x) if cu is None else [x[0, a:b] for a, b in zip(cu, cu[1:], strict=False)]
    done = [causal_conv_reference(piece, weight, bias, state[n], silu) for n, piece in enumerate(pieces)]
    outputs = [o for o, _ in done]
    y = torch.stack(outputs) if cu is None else torch.cat(outputs)[None]
    return with_grads(y + residual, torch.stack([s for _, s in done]), inputs)


def with_grads(y: torch.Tensor, state: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(1)
    loss = sum((z * torch.randn(z.shape, generator=gen, dtype=z.dtype)).sum() for z in (y, state))
    return [y, state, *torch.autograd.grad(loss, inputs)]


def stand_in(inputs: list[torch.Tensor], cu: list[int] | None, silu: bool) -> list[torch.Tensor]:
    x, weight, bias, state, residual = inputs
    y, final = CONV(
        x,
        weight,
        bias,
        residual,
        state,
        True,
        "silu" if silu else None,
        cu_seqlens=None if cu is None else torch.tensor(cu, dtype=torch.int32),
    )
    return with_grads(y, final, inputs)


@compares("fla.modules.causal_conv1d.ops:causal_conv1d", "fla.layers.gated_deltanet:causal_conv1d")
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 20])
def test_rows_match_loop(tokens: int, width: int, silu: bool) -> None:
    inputs = make_inputs(2, tokens, 2, width)
    for expected, actual in zip(reference(inputs, None, silu), stand_in(inputs, None, silu), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cu", [[0, 20], [0, 1, 3, 6, 10, 20], [0, 1, 2, 3], [0, 10, 11]], ids=str)
def test_packed_sequences_match_loop(cu: list[int]) -> None:
    inputs = make_inputs(1, cu[-1], len(cu) - 1)
    for expected, actual in zip(reference(inputs, cu, True), stand_in(inputs, cu, True), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("damage", ["state", "boundary", "shift"])
def test_comparison_notices_a_wrong_input(damage: str) -> None:
    inputs = make_inputs(1, 12, 2)
    expected = reference(inputs, [0, 5, 12], True)[0]
    x, weight, bias, state, residual = inputs
    if damage == "state":
        state = torch.zeros_like(state)
    x = x.roll(1, 1) if damage == "shift" else x
    cu = torch.tensor([0, 6, 12] if damage == "boundary" else [0, 5, 12])
    actual, _ = CONV(x, weight, bias, residual, state, activation="silu", cu_seqlens=cu)
    assert (actual - expected).abs().max() > 1e-3


def test_without_state_the_past_is_zero() -> None:
    x, weight, *_ = make_inputs(2, 7, 2)
    expected = torch.stack([causal_conv_reference(row, weight, None, None, False)[0] for row in x])
    y, final = CONV(x, weight)
    torch.testing.assert_close(y, expected)
    assert final is None


def test_documents_do_not_change_each_other() -> None:
    x, weight, bias, state, _ = (z.detach().float() for z in make_inputs(1, 30, 3))
    cu = torch.tensor([0, 2, 13, 30])
    before, state_before = CONV(x, weight, bias, None, state, True, "silu", cu_seqlens=cu)
    x[:, 2:13] = float("nan")
    after, state_after = CONV(x, weight, bias, None, state, True, "silu", cu_seqlens=cu)
    assert torch.equal(before[:, :2], after[:, :2])
    assert torch.equal(before[:, 13:], after[:, 13:])
    assert torch.equal(state_before[::2], state_after[::2])


@compares("fla.modules.causal_conv1d.ops:causal_conv1d_update")
@pytest.mark.parametrize("shape", [(3, 1, 6), (1, 3, 6), (3, 6)], ids=str)
def test_update_is_one_step_and_writes_nothing(shape: tuple[int, ...]) -> None:
    x, weight, bias, state, residual = (z.detach() for z in make_inputs(3, 1, 3))
    kept = state.clone()
    y, new = UPDATE(x.view(shape), state, residual.view(shape), weight, bias, "silu")
    expected = [causal_conv_reference(x[n], weight, bias, state[n], True) for n in range(3)]
    torch.testing.assert_close(y, (torch.stack([o for o, _ in expected]) + residual).view(shape))
    torch.testing.assert_close(new, torch.stack([s for _, s in expected]))
    assert torch.equal(state, kept)
    assert new.data_ptr() != state.data_ptr()


def test_bfloat16_is_computed_in_float32() -> None:
    x, weight, bias, state, _ = (z.detach().bfloat16() for z in make_inputs(1, 50, 1))
    y, final = CONV(x, weight, bias, None, state, True, "silu")
    wide = [z.double() for z in (x, weight, bias, state)]
    expected, _ = causal_conv_reference(wide[0][0], wide[1], wide[2], wide[3][0], True)
    assert y.dtype == final.dtype == torch.bfloat16
    assert ((y[0] - expected).norm() / expected.norm()) < 3e-3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation": "gelu"}, ValueError, "'gelu'"),
        ({"initial_state": torch.zeros(1, 6, 3)}, ValueError, r"\[1, 6, 4\], got \[1, 6, 3\]"),
        ({"cp_context": object()}, NotImplementedError, "cp_context"),
    ],
)
def test_misfits_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x, weight, *_ = make_inputs(1, 7, 1)
    with pytest.raises(error, match=message):
        CONV(x, weight, **change)
