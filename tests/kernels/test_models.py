"""fla's own model classes on the CPU: one pass, segments, decoding, packing and batching all agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from refine_verl.kernels import cpu_kernels

VOCABULARY, TOKENS = 40, 90
CUTS = ([64, 26], [1, 1, 2, 3, 70, 13], [89, 1], [1] * 6 + [84])


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with cpu_kernels():
        yield


def make_model(family: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A two-layer model in evaluation mode (fla's layers have no dropout)."""
    from fla.models import DeltaNetConfig, DeltaNetForCausalLM, GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    torch.manual_seed(0)
    common = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "vocab_size": VOCABULARY,
        "hidden_ratio": 2,
        "initializer_range": 0.3,
        **options,
    }
    if family == "delta_net":
        model = DeltaNetForCausalLM(DeltaNetConfig(**common))
    else:
        model = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(head_dim=8, expand_v=1, num_v_heads=4, **common))
    return model.to(dtype).eval()


def make_tokens(rows: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, TOKENS), generator=torch.Generator().manual_seed(1))


def gradients(model: Any, logits: torch.Tensor) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(2)
    loss = (logits.log_softmax(-1) * torch.randn(logits.shape, generator=gen, dtype=logits.dtype)).sum()
    return list(torch.autograd.grad(loss, list(model.parameters())))


FAMILIES = pytest.mark.parametrize("family", ["delta_net", "gated_deltanet"])
FUSED = pytest.mark.parametrize("fused", [True, False])


@FAMILIES
@FUSED
@pytest.mark.parametrize("grad", [True, False])
def test_segments_with_a_cache_equal_one_pass(family: str, fused: bool, grad: bool) -> None:
    model = make_model(family, fuse_norm=fused, fuse_swiglu=fused)
    tokens = make_tokens(2)
    whole = model(tokens, use_cache=False).logits
    expected = gradients(model, whole)
    for cuts in CUTS:
        cache, parts, start = None, [], 0
        with torch.set_grad_enabled(grad):
            for length in cuts:
                out = model(tokens[:, start : start + length], past_key_values=cache, use_cache=True)
                cache, start = out.past_key_values, start + length
                parts.append(out.logits)
        logits = torch.cat(parts, 1)
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-12)
        if grad:
            for e, a in zip(expected, gradients(model, logits), strict=True):
                assert (a - e).norm() <= 1e-10 * e.norm()


@FAMILIES
def test_a_snapshot_survives_decoding(family: str) -> None:
    from fla.models.utils import Cache

    model, tokens = make_model(family), make_tokens()
    with torch.no_grad():
        cache = model(tokens[:, :50], use_cache=True).past_key_values
        forks = [Cache.from_legacy_cache(cache.to_legacy_cache(), seen_tokens=50) for _ in range(2)]
        first, second = (model(tokens[:, 50:51], past_key_values=f, use_cache=True).logits for f in forks)
    assert torch.equal(first, second)


@FAMILIES
@FUSED
def test_packed_documents_equal_separate_ones(family: str, fused: bool) -> None:
    model, tokens = make_model(family, fuse_norm=fused, fuse_swiglu=fused), make_tokens()
    bounds = [0, 1, 4, 70, TOKENS]
    packed = model(tokens, cu_seqlens=torch.tensor(bounds), use_cache=False).logits
    parts = [model(tokens[:, a:b], use_cache=False).logits for a, b in zip(bounds, bounds[1:], strict=False)]
    separate = torch.cat(parts, 1)
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-12)
    for e, a in zip(gradients(model, separate), gradients(model, packed), strict=True):
        assert (a - e).norm() <= 1e-10 * e.norm()
    joined = model(tokens, use_cache=False).logits
    assert (joined - separate).abs().max() > 1e-3


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_document_does_not_change_another_by_a_bit(family: str, dtype: torch.dtype) -> None:
    model, tokens = make_model(family, dtype), make_tokens()
    options = {"cu_seqlens": torch.tensor([0, 30, 33, TOKENS]), "use_cache": True}
    changed = tokens.clone()
    changed[:, 30:33] = (changed[:, 30:33] + 1) % VOCABULARY
    with torch.no_grad():
        a, b = (model(ids, **options) for ids in (tokens, changed))
    assert torch.equal(a.logits[:, :30], b.logits[:, :30])
    assert torch.equal(a.logits[:, 33:], b.logits[:, 33:])
    assert not torch.equal(a.logits[:, 30:33], b.logits[:, 30:33])
    states = [cache.past_key_values[0]["recurrent_state"] for cache in (a, b)]
    assert torch.equal(states[0][::2], states[1][::2])
    assert not torch.equal(states[0][1], states[1][1])


@FAMILIES
def test_left_padding_equals_no_padding(family: str) -> None:
    model, tokens = make_model(family), make_tokens(2)
    mask = torch.ones_like(tokens)
    mask[1, :20] = 0
    with torch.no_grad():
        padded = model(tokens, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(padded[:1], model(tokens[:1], use_cache=False).logits)
        torch.testing.assert_close(padded[1:, 20:], model(tokens[1:, 20:], use_cache=False).logits)


@FAMILIES
@pytest.mark.parametrize("loss", ["fuse_cross_entropy", "fuse_linear_cross_entropy", None])
def test_losses_agree(family: str, loss: str | None) -> None:
    flags = {name: name == loss for name in ("fuse_cross_entropy", "fuse_linear_cross_entropy")}
    model, tokens = make_model(family, **flags), make_tokens(2)
    labels = tokens.clone()
    labels[0, :10] = -100
    value = model(tokens, labels=labels, use_cache=False).loss
    logits = model(tokens, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(value, expected)
    for name, grad in zip(
        dict(model.named_parameters()), torch.autograd.grad(value, list(model.parameters())), strict=True
    ):
        assert grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "options",
    [{"use_gate": True}, {"use_beta": False}, {"allow_neg_eigval": True}, {"qk_norm": "sum"}],
    ids=str,
)
def test_delta_net_variants_decode_as_they_train(options: dict[str, Any]) -> None:
    model, tokens = make_model("delta_net", **options), make_tokens()
    whole = model(tokens, use_cache=False).logits
    first = model(tokens[:, :40], use_cache=True)
    second = model(tokens[:, 40:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=0, atol=1e-12)


@FAMILIES
def test_training_mode_and_autocast(family: str) -> None:
    model, tokens = make_model(family, torch.float32).train(), make_tokens()
    exact = model(tokens).logits
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        logits = model(tokens).logits
        logits.float().square().mean().backward()
    assert ((logits.float() - exact).norm() / exact.norm()) < 0.05
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
