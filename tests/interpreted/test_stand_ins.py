"""Every stand-in of `refine_verl.kernels.patch.TARGETS` against the Triton kernel that it stands in for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference.fla_operators import OPERATORS
from torch import Tensor

from refine_verl.kernels.patch import TARGETS

TOLERANCE = 3e-5
"""Relative, of each tensor as a whole. The kernels compute in float32, the stand-ins are given float64."""
WRONG = 1e-3
"""Thirty times as much, and less than any of the mistakes below changes."""

CONV = "fla.modules.causal_conv1d.ops:causal_conv1d"
UPDATE = "fla.modules.causal_conv1d.ops:causal_conv1d_update"
LINEAR_LOSS = "fla.modules.fused_linear_cross_entropy.ops:fused_linear_cross_entropy_loss"
TARGET = torch.tensor([3, 0, -100, 8, 1, 1, 30, 2, -100, 5, 7, 7])
CU = [0, 1, 3, 40, 64]

Real = Callable[[str], Any]


def normal(*shapes: tuple[int, ...]) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=gen).requires_grad_() for shape in shapes]


def measured(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """All outputs, and the gradient of a random linear loss for every input."""
    outputs = function(*inputs)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(x, Tensor)]
    gen = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=gen).to(x.dtype)).sum() for x in outputs)
    return [x.detach() for x in (*outputs, *torch.autograd.grad(loss, inputs))]


def compare(real: Callable[..., Any], stand_in: Callable[..., Any], inputs: list[Tensor]) -> None:
    """The same from both; and not the same if the first input is a little larger for one of them."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    got, wanted = measured(real, inputs), measured(stand_in, wide)
    errors = [relative(*pair) for pair in zip(got, wanted, strict=True)]
    assert max(errors) < TOLERANCE, errors
    wrong = [(1.1 * wide[0]).detach().requires_grad_(), *wide[1:]]
    assert max(relative(*pair) for pair in zip(got, measured(stand_in, wrong), strict=True)) > WRONG


def relative(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def convolution(function: Callable[..., Any], cu: list[int] | None, activation: str | None) -> Callable[..., Any]:
    """The oldest of the W inputs of a state is never read, and fla's backward pass has no gradient for it."""
    bounds = None if cu is None else torch.tensor(cu)

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        y, final = function(x, weight, bias, residual, state, True, activation, cu_seqlens=bounds)
        return y, final[..., 1:], final[..., 0].detach()

    return call


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("tokens, cu", [(70, None), (2, None), (64, CU)], ids=["rows", "short", "packed"])
def test_convolution(tokens: int, cu: list[int] | None, activation: str | None, real: Real) -> None:
    rows, sequences = (2, 2) if cu is None else (1, len(cu) - 1)
    inputs = normal((rows, tokens, 16), (16, 4), (16,), (rows, tokens, 16), (sequences, 16, 4))
    compare(convolution(real(CONV), cu, activation), convolution(TARGETS[CONV], cu, activation), inputs)


def test_the_oldest_input_of_a_state_is_not_read(real: Real) -> None:
    x, weight, state = (t.detach() for t in normal((2, 70, 16), (16, 4), (2, 16, 4)))
    for function in (real(CONV), TARGETS[CONV]):
        outputs = [function(x, weight, initial_state=state)[0]]
        for place in (0, 1):
            other = state.clone()
            other[..., place] += 1
            outputs.append(function(x, weight, initial_state=other)[0])
        assert torch.equal(outputs[1], outputs[0]) and not torch.equal(outputs[2], outputs[0])


def test_convolution_without_a_state_before(real: Real) -> None:
    """As the layer of Gated DeltaNet calls it when nothing is cached."""
    name = "fla.layers.gated_deltanet:causal_conv1d"
    inputs = normal((2, 70, 16), (16, 4))
    backend = {"activation": "silu", "backend": "triton"}
    compare(
        lambda x, weight: real(name)(x=x, weight=weight, bias=None, **backend),
        lambda x, weight: TARGETS[name](x=x, weight=weight, bias=None, **backend),
        inputs,
    )


@pytest.mark.parametrize("shape", [(3, 1, 16), (1, 3, 16), (3, 16)], ids=str)
def test_convolution_of_one_token(shape: tuple[int, ...], real: Real) -> None:
    """fla's kernel writes into the state that it is given, which is why adapters hand it a copy."""
    x, state, residual, weight, bias = (t.detach() for t in normal(shape, (3, 16, 4), shape, (16, 4), (16,)))
    wanted = TARGETS[UPDATE](*(t.double() for t in (x, state, residual, weight, bias)), "silu")
    given = state.clone()
    got = real(UPDATE)(x, given, residual, weight, bias, "silu")
    assert [relative(*pair) < TOLERANCE for pair in zip(got, wanted, strict=True)] == [True, True]
    assert torch.equal(given, got[1]) and relative(state, wanted[1]) > WRONG


@pytest.mark.parametrize("prenorm", [False, True])
def test_rms_norm(prenorm: bool, real: Real) -> None:
    name = "fla.modules.norm.layernorm:rms_norm"
    inputs = normal((2, 35, 32), (32,), (32,), (2, 35, 32))
    for function in (real(name), TARGETS[name]):
        assert isinstance(function(*inputs, 1e-5, prenorm), tuple) is prenorm
    compare(
        lambda *given: real(name)(*given, 1e-5, prenorm), lambda *given: TARGETS[name](*given, 1e-5, prenorm), inputs
    )


@pytest.mark.parametrize("activation", ["swish", "silu", "sigmoid"])
def test_rms_norm_gated(activation: str, real: Real) -> None:
    name = "fla.modules.norm.fused_norm_gate:rms_norm_gated"
    inputs = normal((2, 35, 2, 16), (2, 35, 2, 16), (16,))
    compare(
        lambda x, g, weight: real(name)(x, g, weight, None, activation, eps=1e-5),
        lambda x, g, weight: TARGETS[name](x, g, weight, None, activation, eps=1e-5),
        inputs,
    )


def test_l2norm(real: Real) -> None:
    name = "fla.modules.norm.l2norm:l2norm"
    inputs = [0.01 * x.detach() for x in normal((2, 35, 2, 16))]
    compare(real(name), TARGETS[name], [x.requires_grad_() for x in inputs])  # so small that epsilon matters


def test_swiglu(real: Real) -> None:
    for name, more in (("swiglu", ()), ("swiglu_linear", ((8, 32), (8,)))):
        target = f"fla.modules.mlp:{name}"
        compare(real(target), TARGETS[target], normal((2, 35, 32), (2, 35, 32), *more))


def test_cross_entropy(real: Real) -> None:
    """Below the method that is replaced, which asserts that its tensors are on an accelerator."""
    from fla.modules import FusedCrossEntropyLoss

    kernel = real("fla.modules.fused_cross_entropy.ops:cross_entropy_loss")
    stand_in = TARGETS["fla.modules.fused_cross_entropy.ops:FusedCrossEntropyLoss.forward"]
    criterion = FusedCrossEntropyLoss(reduction="none", label_smoothing=0.1)
    compare(
        lambda logits: kernel(logits, TARGET, label_smoothing=0.1)[0],
        lambda logits: stand_in(criterion, logits, TARGET),
        normal((len(TARGET), 61)),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy(reduction: str, real: Real) -> None:
    def call(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, weight, bias: function(x, TARGET, weight, bias, reduction=reduction)

    compare(call(real(LINEAR_LOSS)), call(TARGETS[LINEAR_LOSS]), normal((len(TARGET), 16), (61, 16), (61,)))


@pytest.mark.parametrize("layout", [None, [0, 1, 71, 100]], ids=["rows", "packed"])
@pytest.mark.parametrize("name", [name for name, case in OPERATORS.items() if case.target in TARGETS])
def test_delta_rules(name: str, layout: list[int] | None, real: Real) -> None:
    case = OPERATORS[name]
    rows, sequences = (2, 2) if layout is None else (1, len(layout) - 1)
    inputs = case.make(torch.Generator().manual_seed(0), rows, 100, sequences)
    options = {**case.flags, "output_final_state": True, "cu_seqlens": None if layout is None else torch.tensor(layout)}
    with torch.no_grad():
        got = real(case.target)(**inputs, **options)
        wanted = TARGETS[case.target](**{name: x.double() for name, x in inputs.items()}, **options)
    assert max(relative(*pair) for pair in zip(got, wanted, strict=True)) < TOLERANCE


def test_none_is_left_out() -> None:
    """Each name that is replaced appears above."""
    with open(__file__) as source:
        text = source.read()
    operators = {case.target for case in OPERATORS.values()}
    missing = [name for name in TARGETS if name not in operators and name.split(":")[1].split(".")[0] not in text]
    assert missing == []
