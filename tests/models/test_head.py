"""The LM head in chunks against plain formulas over all logits at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refine_verl.models import FastWeightActor
from refine_verl.models import head as head_module
from refine_verl.models.head import FusedHead
from refine_verl.models.packing import IGNORED

ROWS, WIDTH, VOCABULARY = 23, 8, 13
CHUNKS = pytest.mark.parametrize("chunk_rows", [1, 4, ROWS - 1, ROWS, 1000])
BIAS = pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])


@pytest.fixture
def set_chunk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda rows: monkeypatch.setattr(head_module, "chunk_elements", lambda _: rows * VOCABULARY)


def a_head(bias: bool, dtype: torch.dtype = torch.float64) -> FusedHead:
    torch.manual_seed(0)
    return FusedHead(WIDTH, VOCABULARY, bias=bias, dtype=dtype)


def a_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = 2 * torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    targets[[0, 7, ROWS - 1]] = IGNORED
    return hidden, targets


@CHUNKS
@BIAS
def test_cross_entropy_and_its_gradients(set_chunk: Callable[[int], None], chunk_rows: int, bias: bool) -> None:
    set_chunk(chunk_rows)
    (hidden, targets), head = a_batch(), a_head(bias)
    leaves = [hidden.requires_grad_(), *head.parameters()]
    loss = head(hidden, "cross_entropy", targets=targets)
    got = torch.autograd.grad(3 * loss, leaves)
    plain = F.cross_entropy(F.linear(hidden, head.weight, head.bias), targets, ignore_index=IGNORED, reduction="sum")
    wanted = torch.autograd.grad(3 * plain, leaves)
    torch.testing.assert_close(loss, plain, rtol=1e-13, atol=0)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    assert got[0][[0, 7, ROWS - 1]].abs().max() == 0 and got[0][1].abs().max() > 0


def test_cross_entropy_where_only_one_side_learns() -> None:
    (hidden, targets), head = a_batch(), a_head(bias=True)
    for learns in (head.weight, head.bias):
        head.requires_grad_(False)
        learns.requires_grad_(True)
        (gradient,) = torch.autograd.grad(head(hidden, "cross_entropy", targets=targets), [learns])
        plain = F.cross_entropy(head(hidden), targets, ignore_index=IGNORED, reduction="sum")
        torch.testing.assert_close(gradient, torch.autograd.grad(plain, [learns])[0], rtol=1e-11, atol=1e-13)


def test_cross_entropy_without_any_target_is_zero() -> None:
    hidden, targets = a_batch()
    head = a_head(bias=False)
    loss = head(hidden.requires_grad_(), "cross_entropy", targets=torch.full_like(targets, IGNORED))
    loss.backward()
    assert loss.item() == 0 and head.weight.grad.abs().max() == 0 and hidden.grad.abs().max() == 0


@CHUNKS
@BIAS
def test_score_and_entropy(set_chunk: Callable[[int], None], chunk_rows: int, bias: bool) -> None:
    set_chunk(chunk_rows)
    (hidden, targets), head = a_batch(), a_head(bias)
    logits = F.linear(hidden, head.weight, head.bias)
    logs = logits - logits.exp().sum(-1, keepdim=True).log()
    losses, correct = head(hidden, "score", targets=targets)
    counted = targets != IGNORED
    rows = torch.arange(ROWS)[counted]
    torch.testing.assert_close(losses[counted], -logs[rows, targets[counted]], rtol=1e-12, atol=1e-14)
    assert (losses[~counted] == 0).all() and not correct[~counted].any()
    assert correct.tolist() == (logits.argmax(-1) == targets).tolist()
    entropy = head(hidden, "entropy")
    torch.testing.assert_close(entropy, -(logs.exp() * logs).sum(-1), rtol=1e-12, atol=1e-14)
    assert not losses.requires_grad and not entropy.requires_grad


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probs(temperature: float) -> None:
    (hidden, targets), head = a_batch(), a_head(bias=True)
    wanted_tokens = targets.clamp(min=0)
    leaves = [hidden.requires_grad_(), *head.parameters()]
    got = head(hidden, "log_probs", targets=wanted_tokens, temperature=temperature)
    wanted = torch.log_softmax(head(hidden) / temperature, dim=-1)[torch.arange(ROWS), wanted_tokens]
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)
    weights = torch.arange(ROWS, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(got @ weights, leaves), torch.autograd.grad(wanted @ weights, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_chunked_log_probs_keep_no_logits_and_change_nothing(set_chunk: Callable[[int], None]) -> None:
    """Values and gradients to the last digits; kept for the backward pass is no tensor with a row of V per token."""
    (hidden, targets), head = a_batch(), a_head(bias=True)
    targets = targets.clamp(min=0)
    leaves, kept = [hidden.requires_grad_(), *head.parameters()], []
    weights = torch.linspace(-1, 1, ROWS, dtype=torch.float64)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    found = []
    for chunked in (False, True):
        set_chunk(4)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            values = head(hidden, "log_probs", targets=targets, temperature=0.5, forbidden=(3,), chunked=chunked)
        assert any(shape[-1:] == (VOCABULARY,) and shape[0] > 1 for shape in kept) != chunked
        found.append((values, *torch.autograd.grad(values[targets != 3] @ weights[targets != 3], leaves)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def test_it_is_still_a_linear_layer() -> None:
    hidden, _ = a_batch()
    head = a_head(bias=True)
    assert torch.equal(head(hidden.view(1, ROWS, WIDTH)), F.linear(hidden, head.weight, head.bias)[None])
    assert set(head.state_dict()) == {"weight", "bias"}


def test_bf16_sums_the_weight_gradient_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """2048 gradients of exactly one half: a bf16 sum stops growing at 128."""
    monkeypatch.setattr(head_module, "chunk_elements", lambda _: 2)
    rows = 2048
    head = FusedHead(1, 2, bias=False)
    nn.init.zeros_(head.weight)
    hidden, targets = torch.ones(rows, 1), torch.ones(rows, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        head(hidden, "cross_entropy", targets=targets).backward()
    assert head.weight.grad.dtype == torch.float32
    assert head.weight.grad.flatten().tolist() == [rows / 2, -rows / 2]
    stuck = torch.zeros((), dtype=torch.bfloat16)  # the control
    for _ in range(rows):
        stuck = stuck + 0.5
    assert stuck.item() < rows / 4


def test_bf16_sums_the_gradients_of_several_passes_in_float32(make: Callable[..., FastWeightActor]) -> None:
    """The actor's autocast keeps no bf16 copy of a weight, whose gradient would collect in bf16."""
    actor = make(autocast_dtype=torch.bfloat16).float()
    uses, inputs = 512, torch.ones(1, 1)

    def gradient(context: object) -> float:
        layer = nn.Linear(1, 1, bias=False)
        with context:
            total = sum(layer(inputs).float() for _ in range(uses))
        total.backward()
        return layer.weight.grad.item()

    assert gradient(actor.autocast(trains=True)) == uses
    assert gradient(torch.autocast("cpu", dtype=torch.bfloat16)) < uses  # the control: with the cache
