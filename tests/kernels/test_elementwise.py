"""Norms, SwiGLU and losses against their definitions, written with plain autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from reference.kernel_coverage import compares

from refine_verl.kernels.patch import TARGETS

RMS_NORM = TARGETS["fla.modules.norm.layernorm:rms_norm"]
RMS_NORM_GATED = TARGETS["fla.modules.norm.fused_norm_gate:rms_norm_gated"]
L2_NORM = TARGETS["fla.modules.norm.l2norm:l2norm"]
SWIGLU = TARGETS["fla.modules.mlp:swiglu"]
SWIGLU_LINEAR = TARGETS["fla.modules.mlp:swiglu_linear"]
LINEAR_CE = TARGETS["fla.modules.fused_linear_cross_entropy.ops:fused_linear_cross_entropy_loss"]


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    gen = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype).requires_grad_()


def compare(expected: object, actual: object, inputs: list[torch.Tensor], tolerance: float = 1e-12) -> None:
    """Check every output and the gradient of a random linear loss with respect to every input."""
    pairs = [list(x) if isinstance(x, tuple) else [x] for x in (expected, actual)]
    assert len(pairs[0]) == len(pairs[1])
    grads = []
    for outputs in pairs:
        gen = torch.Generator().manual_seed(1)
        loss = sum((o * torch.randn(o.shape, generator=gen, dtype=o.dtype)).sum() for o in outputs)
        grads.append(torch.autograd.grad(loss, inputs, retain_graph=True))
    for e, a in zip([*pairs[0], *grads[0]], [*pairs[1], *grads[1]], strict=True):
        assert e.dtype == a.dtype
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps)


@compares("fla.modules.norm.layernorm:rms_norm")
def test_rms_norm() -> None:
    x, w, b, r = normal(2, 5, 8), normal(8), normal(8), normal(2, 5, 8)
    compare(rms(x, 0.1) * w + b, RMS_NORM(x, w, b, eps=0.1), [x, w, b])
    compare(rms(x, 1e-5), RMS_NORM(x, None, None), [x])
    total = x + r
    compare((rms(total, 0.1) * w, total), RMS_NORM(x, w, None, r, 0.1, True), [x, w, r])
    with pytest.raises(AssertionError):
        compare(rms(x, 0.1) * w, RMS_NORM(x, w, None, eps=0.11), [x, w])


def test_rms_norm_of_bfloat16_is_computed_in_float32() -> None:
    x, w, r = normal(4, 64, dtype=torch.bfloat16), normal(64, dtype=torch.float32), normal(64, 4).T.bfloat16()
    y, total = RMS_NORM(x, w, None, r, prenorm=True)
    assert y.dtype == total.dtype == torch.bfloat16
    expected = rms(x.double() + r.double(), 1e-5) * w.double()
    assert ((y.double() - expected).norm() / expected.norm()) < 3e-3
    assert RMS_NORM(x, w, None, prenorm=True, residual_in_fp32=True)[1].dtype == torch.float32


def test_rms_norm_agrees_with_fla_reference() -> None:
    from fla.modules.norm.layernorm import rms_norm_ref

    x, w, r = normal(3, 16), normal(16), normal(3, 16).detach()
    compare(rms_norm_ref(x, w, None, r, prenorm=True), RMS_NORM(x, w, None, r, prenorm=True), [x, w])


@compares("fla.modules.norm.fused_norm_gate:rms_norm_gated")
@pytest.mark.parametrize("activation", ["swish", "silu", "sigmoid"])
def test_rms_norm_gated(activation: str) -> None:
    x, g, w = normal(2, 3, 4, 8), normal(2, 3, 8, 4).transpose(2, 3), normal(8)
    act = torch.sigmoid(g) * (1 if activation == "sigmoid" else g)
    compare(rms(x, 1e-5) * w * act, RMS_NORM_GATED(x, g, w, None, activation, eps=1e-5), [x, g, w])


@compares("fla.modules.norm.l2norm:l2norm")
def test_l2norm() -> None:
    x = normal(2, 3, 8)
    compare(x / torch.sqrt(x.pow(2).sum(-1, keepdim=True) + 0.5), L2_NORM(x, eps=0.5), [x])
    assert L2_NORM(x, output_dtype=torch.float32).dtype == torch.float32


@compares("fla.modules.mlp:swiglu", "fla.modules.mlp:swiglu_linear")
def test_swiglu() -> None:
    x, y, w, b = normal(2, 5, 8), normal(2, 8, 5).transpose(1, 2), normal(3, 8), normal(3)
    product = x * torch.sigmoid(x) * y
    compare(product, SWIGLU(x, y), [x, y])
    compare(product @ w.T, SWIGLU_LINEAR(x, y, w, None), [x, y, w])
    compare(product @ w.T + b, SWIGLU_LINEAR(x, y, w, b), [x, y, w, b])


def test_swiglu_linear_under_autocast() -> None:
    x, y, w = (normal(6, 8, dtype=torch.bfloat16) for _ in range(3))
    weight = w.detach().float()[:, :8].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = SWIGLU_LINEAR(x, y, weight, None)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32


def cross_entropy(logits: torch.Tensor, target: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Loss of the rows whose target is not -100."""
    log_p = logits - logits.exp().sum(-1, keepdim=True).log()
    rows = [i for i, t in enumerate(target.tolist()) if t != -100]
    picked = [(1 - smoothing) * log_p[i, target[i]] + smoothing * log_p[i].mean() for i in rows]
    return -torch.stack(picked)


@compares("fla.modules.fused_cross_entropy.ops:FusedCrossEntropyLoss.forward")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(reduction: str) -> None:
    from fla.modules import FusedCrossEntropyLoss

    forward = TARGETS["fla.modules.fused_cross_entropy.ops:FusedCrossEntropyLoss.forward"]
    logits, target = normal(6, 9), torch.tensor([3, 0, -100, 8, 1, 1])
    rows = cross_entropy(logits, target)
    criterion = FusedCrossEntropyLoss(reduction=reduction, inplace_backward=True)
    reduce: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "mean": torch.mean,
        "sum": torch.sum,
        "none": lambda x: torch.cat([x[:2], x.new_zeros(1), x[2:]]),
    }
    compare(reduce[reduction](rows), forward(criterion, logits, target), [logits])


def test_cross_entropy_options() -> None:
    from fla.modules import FusedCrossEntropyLoss

    forward = TARGETS["fla.modules.fused_cross_entropy.ops:FusedCrossEntropyLoss.forward"]
    logits, target = normal(6, 9), torch.tensor([3, 0, -100, 8, 1, 1])
    compare(
        cross_entropy(logits, target, 0.1).mean(),
        forward(FusedCrossEntropyLoss(label_smoothing=0.1), logits, target),
        [logits],
    )
    assert forward(FusedCrossEntropyLoss(), logits.bfloat16(), target).dtype == torch.float32
    options = {"logit_scale": 0.7, "lse_square_scale": 0.2, "logit_softcapping": 3.0, "return_z_loss": True}
    for name, value in options.items():
        with pytest.raises(NotImplementedError, match=name):
            forward(FusedCrossEntropyLoss(**{name: value}), logits, target)


@compares("fla.modules.fused_linear_cross_entropy.ops:fused_linear_cross_entropy_loss")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy(reduction: str) -> None:
    x, w, b = normal(10, 5), normal(9, 5), normal(9)
    target = torch.tensor([3, 0, -100, 8, 1, 1, 2, -100, 0, 7])
    rows = cross_entropy(F.linear(x, w, b), target, 0.1)
    expected = rows.mean() if reduction == "mean" else rows.sum()
    actual = LINEAR_CE(x, target, w, b, label_smoothing=0.1, reduction=reduction)
    compare(expected, actual, [x, w, b])


def test_linear_cross_entropy_l2_pull_has_a_gradient_and_no_value() -> None:
    x, w = normal(4, 5), normal(9, 5)
    target = torch.tensor([3, 0, 8, 1])
    plain = LINEAR_CE(x, target, w)
    pulled = LINEAR_CE(x, target, w, use_l2warp=True, l2_penalty_factor=0.5)
    assert torch.equal(plain, pulled)
    logits = F.linear(x, w)
    penalty = 0.5 * logits.max(-1).values.square().sum() * 0.5 / 4
    compare(plain + penalty - penalty.detach(), pulled, [x, w])


def test_sharded_vocabulary_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="process_group"):
        LINEAR_CE(normal(4, 5), torch.zeros(4, dtype=torch.long), normal(9, 5), process_group=object())
