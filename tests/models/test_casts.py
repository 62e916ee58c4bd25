"""Weights are cast once for all passes that are made together, and their gradients are summed in float32."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from models.conftest import make_config
from reference.hybrid import hybrid_actor
from reference.toy import NSP, documents_of, draws_for
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from refine_verl.config import LoraSettings
from refine_verl.models import Branches, FastWeightActor, load_model, make_actor, passes
from refine_verl.models import casts as casts_module
from refine_verl.models.casts import shared_casts, weight_in_autocast_dtype
from refine_verl.models.lact import LaCTConfig
from refine_verl.models.lora import add_adapters
from refine_verl.models.replaced import replaced_forward

DOCUMENTS = documents_of((40, 33))
LACT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attn_heads": 4, "num_lact_heads": 2, "lact_chunk_size": 8,
    "window_size": 6, "intermediate_size": 24, "vocab_size": 61,
}  # fmt: skip
FAMILIES = ("delta_net", "gated_deltanet", "lact", "experts", "qwen3_next")


def build(family: str, **kwargs: Any) -> FastWeightActor:
    """The same actor every time, float32 with matmuls in bf16 unless told otherwise."""
    kwargs = {"autocast_dtype": torch.bfloat16, **kwargs}
    if family in ("experts", "qwen3_next"):
        return hybrid_actor(family, **kwargs).float()
    config = LaCTConfig(**LACT) if family == "lact" else make_config(family)
    return make_actor(load_model(None, config=config, dtype=torch.float32, seed=1), **kwargs)


def gradients(actor: FastWeightActor, mode: str) -> dict[str, Tensor]:
    """Of all parameters, after one pass that trains."""
    if mode == "on_policy":
        _, output = actor(mode="on_policy", documents=DOCUMENTS, nsp=NSP, draws=draws_for((0, 1)), snapshots=4)
    else:
        shape = (2, NSP.chunks, NSP.rollouts_per_position, NSP.longest_rollout)
        tokens = torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(4))
        positions = torch.tensor([[5, 17, 30], [0, 9, 28]])
        output = actor(mode="update", documents=DOCUMENTS, branches=Branches(positions, tokens), nsp=NSP)
    (output["ntp_loss_sum"] + 3 * output["log_probs"].sum()).backward()
    return {name: parameter.grad for name, parameter in actor.named_parameters() if parameter.grad is not None}


@pytest.fixture
def without_sharing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(passes, "shared_casts", lambda modules: contextlib.nullcontext())


class Casts(TorchDispatchMode):
    """Counts casts to bf16 of what layers multiply by, but for LaCT's first fast weights, by their storage."""

    def __init__(self, actor: FastWeightActor) -> None:
        super().__init__()
        parameters = actor.base_model.layers.named_parameters()
        matrices = [(name, parameter) for name, parameter in parameters if not re.search(r"attn\.w[012]$", name)]
        self.names = {parameter.untyped_storage().data_ptr(): name for name, parameter in matrices}
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            name = self.names.get(args[0].untyped_storage().data_ptr())
            if name is not None:
                self.counts[name] += 1
        return result


@pytest.mark.parametrize("mode", ["update", "on_policy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_casts_apart(family: str, mode: str, without_sharing: Callable[[], None]) -> None:
    """To the last bit: two passes give two gradients, and a sum of two has one order."""
    shared = gradients(build(family), mode)
    without_sharing()
    apart = gradients(build(family), mode)
    assert shared.keys() == apart.keys() and len(shared) > 10
    for name, gradient in apart.items():
        assert torch.equal(shared[name], gradient), name
        assert shared[name].dtype == torch.float32


def test_summing_in_bf16_would_show(monkeypatch: pytest.MonkeyPatch, without_sharing: Callable[[], None]) -> None:
    """Negative control: autocast's own cache."""
    shared = gradients(build("delta_net"), "update")
    without_sharing()
    honest = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: honest(*args, **{**kwargs, "cache_enabled": True}))
    cached = gradients(build("delta_net"), "update")
    assert any(not torch.equal(shared[name], cached[name]) for name in cached if name.endswith("proj.weight"))


@pytest.mark.parametrize("mode", ["update", "on_policy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_weight_is_cast_once(family: str, mode: str) -> None:
    """For S, the tokens that are written and the branches together, in the backward pass too."""
    actor = build(family)
    with Casts(actor) as casts:
        gradients(actor, mode)
    assert casts.counts and set(casts.counts.values()) == {1}
    assert any(name.endswith("down_proj.weight") or "experts" in name for name in casts.counts)


def test_without_sharing_they_are_cast_more_often(without_sharing: Callable[[], None]) -> None:
    """Negative control."""
    without_sharing()
    actor = build("delta_net")
    with Casts(actor) as casts:
        gradients(actor, "update")
    assert max(casts.counts.values()) >= 2


def test_frozen_weights_are_cast_once_when_rollouts_are_written() -> None:
    """Autocast's cache, which serves passes without gradients, leaves them out."""
    actor = build("delta_net")
    add_adapters(actor, LoraSettings(lora_rank=2, lora_alpha=4, target_modules="all-linear"), seed=0, base="tiny")
    with Casts(actor) as casts:
        actor(mode="rollout", documents=DOCUMENTS, nsp=NSP, draws=draws_for((0, 1)), snapshots=4)
    assert set(casts.counts.values()) == {1} and any("base_layer" in name for name in casts.counts)


@pytest.mark.parametrize("mode", ["update", "on_policy"])
@pytest.mark.parametrize("checkpointing", ["layer", "segment"])
@pytest.mark.parametrize("family", ["delta_net", "experts"])
def test_what_is_computed_again_casts_again(
    family: str, checkpointing: str, mode: str, without_sharing: Callable[[], None]
) -> None:
    """A copy that waits for the backward pass is what it does without. Tokens that are written share."""
    actor = build(family, activation_checkpointing=checkpointing)
    with Casts(actor) as casts:
        found = gradients(actor, mode)
    without_sharing()
    actor = build(family, activation_checkpointing=checkpointing)
    with Casts(actor) as apart:
        wanted = gradients(actor, mode)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert min(casts.counts.values()) >= 2
    if mode == "update" or family == "delta_net":  # autocast's own cache serves what is without gradients
        assert casts.counts == apart.counts
    else:  # it leaves experts out
        assert casts.counts.total() < apart.counts.total()


def test_pieces_of_rollouts_that_are_computed_again(without_sharing: Callable[[], None], monkeypatch: Any) -> None:
    monkeypatch.setitem(globals(), "NSP", dataclasses.replace(NSP, rollouts_together=2))
    shared = gradients(build("delta_net"), "update")
    without_sharing()
    apart = gradients(build("delta_net"), "update")
    for name, gradient in apart.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.fixture
def layer() -> Iterator[nn.Linear]:
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        yield nn.Linear(3, 2)


def test_many_passes_sum_in_float32(layer: nn.Linear) -> None:
    x, times = torch.ones(1, 3), 600
    with shared_casts([layer]):
        total = sum(layer(x).float() for _ in range(times))
    total.sum().backward()
    assert torch.equal(layer.weight.grad, torch.full((2, 3), float(times)))
    assert torch.equal(layer.bias.grad, torch.full((2,), float(times)))


def test_gradients_of_many_passes_wait_in_one_tensor(layer: nn.Linear) -> None:
    x, kept = torch.ones(1, 3), []
    with shared_casts([layer]):
        total = sum(layer(x).float() for _ in range(5)).sum()
        shared = next(iter(casts_module._casts.get().values()))
    honest = casts_module._SumOfGradients.backward
    with mock.patch.object(
        casts_module._SumOfGradients, "backward", lambda ctx, g: (kept.append(len(ctx.left)), honest(ctx, g))[1]
    ):
        total.backward()
    assert max(kept) == 1 and not shared.left


def test_a_module_that_is_there_twice(layer: nn.Linear) -> None:
    model = nn.Sequential(layer, nn.Linear(2, 3), layer)
    for _ in range(3):
        with shared_casts([*model, layer]):
            model(torch.ones(1, 3)).sum().backward()
    assert "forward" not in layer.__dict__
    with replaced_forward([layer, layer], lambda forward, _, x: forward(x)):
        model(torch.ones(1, 3))
    assert "forward" not in layer.__dict__


def test_float64_is_left_alone_as_by_autocast(layer: nn.Linear) -> None:
    precise, x = nn.Linear(3, 2).double(), torch.ones(1, 3, dtype=torch.float64)
    with shared_casts([precise]):
        assert precise(input=x).dtype == torch.float64


def test_a_forward_function_of_the_modules_own_is_kept(layer: nn.Linear) -> None:
    layer.forward = lambda x: x + 1  # type: ignore[method-assign, assignment]
    with shared_casts([layer]):
        assert torch.equal(layer(torch.ones(2)), torch.full((2,), 2.0))


def test_one_of_several_losses(layer: nn.Linear) -> None:
    """What is asked about one loss is not told about another, and may be asked again."""
    x = torch.ones(1, 3)
    with shared_casts([layer]):
        first, second = layer(x).float().sum(), 5 * layer(x).float().sum()
    for loss, factor in ((second, 5), (first, 1), (second, 5), (first + second, 6)):
        (gradient,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
        assert torch.equal(gradient, torch.full((2, 3), float(factor)))


def test_nothing_stays(layer: nn.Linear) -> None:
    with shared_casts([layer]):
        with shared_casts([layer]):  # shares with the one around it
            first = weight_in_autocast_dtype(layer.weight)
        assert first.data_ptr() == weight_in_autocast_dtype(layer.weight).data_ptr()
    assert "forward" not in layer.__dict__
    assert first.data_ptr() != weight_in_autocast_dtype(layer.weight).data_ptr()
    with pytest.raises(ZeroDivisionError), shared_casts([layer]):
        1 / 0  # noqa: B018
    assert "forward" not in layer.__dict__


def test_without_autocast_nothing_is_cast() -> None:
    layer, x = nn.Linear(3, 2), torch.ones(1, 3)
    with shared_casts([layer]):
        assert layer(x).dtype == torch.float32
        assert weight_in_autocast_dtype(layer.weight) is layer.weight
