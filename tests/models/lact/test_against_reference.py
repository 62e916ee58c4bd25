"""LaCT's fast path against the token loop of `reference.lact`: logits, hidden states and all gradients in float64."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from reference.lact import SequentialLaCT, newton_schulz, parameter_shapes
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import refine_verl.models  # noqa: F401  registers the model
from refine_verl.models.lact.fast_weights import newton_schulz as fast_newton_schulz

# float64 sums in another order, through up to four updates; seen: below 1e-11
RELATIVE = 1e-8
# what a mistake does at least, in the logits
VISIBLE = 1e-4
CHUNK, WINDOW = 4, 6
BASE: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attn_heads": 3,
    "num_lact_heads": 2,
    "lact_chunk_size": CHUNK,
    "window_size": WINDOW,
    "intermediate_size": 20,
    "vocab_size": 13,
    "rope_theta": 100.0,
}
LONG = 3 * CHUNK + 5
PAPER = {"use_muon": True, "ttt_nope": True, "w0_w2_low_rank": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "muon": {"use_muon": True},
    "muon without momentum": {"use_muon": True, "use_momentum": False},
    "no momentum": {"use_momentum": False},
    "pre-norm": {"ttt_prenorm": True},
    "pre-norm, muon": {"ttt_prenorm": True, "use_muon": True},
    "pre-norm, no momentum": {"ttt_prenorm": True, "use_momentum": False},
    "nope": {"ttt_nope": True},
    "low rank": {"w0_w2_low_rank": 3},
    "one head": {"num_lact_heads": 1},
    "three heads": {"num_lact_heads": 3},
    "four heads": {"num_lact_heads": 4},
    "q/k norm": {"attn_qk_norm": True},
    "bias": {"qkv_bias": True},
    "no scale": {"learnable_ttt_scale": False},
    "no silu": {"qkv_silu": False},
    "no silu on v": {"no_v_silu": True},
    "wide": {"inter_multi": 2},
    "narrow, muon": {"inter_multi": 0.5, "use_muon": True},
    "wide, muon, low rank": {"inter_multi": 1.5, "use_muon": True, "w0_w2_low_rank": 2},
    "rates per column": {"lr_dim": 12},
    "tied": {"tie_word_embeddings": True},
    "fused": {"use_fused_kernel": True},
    "fused, muon": {"use_fused_kernel": True, "use_muon": True},
    "fused, pre-norm, muon, wide": {
        "use_fused_kernel": True,
        "ttt_prenorm": True,
        "use_muon": True,
        "inter_multi": 1.5,
    },
    "the paper's, probably": PAPER,
    "everything": {
        **PAPER,
        "ttt_nope": False,
        "ttt_prenorm": True,
        "attn_qk_norm": True,
        "qkv_bias": True,
        "num_lact_heads": 3,
        "no_v_silu": True,
    },
}


def random_parameters(config: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """None at the value it is initialised with; rates so large that the updates matter."""
    made = {}
    for name, shape in parameter_shapes(config).items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))  # the same in every variant
        value = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        if "norm" in name or name.endswith("qk_scale"):
            value += 1
        if name.endswith("lr_proj.bias"):
            value += 6
        made[name] = value.to(dtype)
    return made


def tokens_of(length: int, config: Mapping[str, Any] = BASE) -> Tensor:
    return torch.randint(0, config["vocab_size"], (length,), generator=torch.Generator().manual_seed(length))


def model_of(config: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """The package's model with the random parameters."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("lact_swiglu", **config), dtype=dtype).eval()
    missing = model.load_state_dict(random_parameters(config, dtype), strict=not config.get("tie_word_embeddings"))
    assert set(missing.missing_keys) <= {"lm_head.weight"} and not missing.unexpected_keys
    return model


def run_model(model: torch.nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    output = model(input_ids=tokens[None], output_hidden_states=True)
    return output.logits[0], output.hidden_states[-1][0]


def gradients_of(outputs: tuple[Tensor, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a random combination of all logits and hidden states; zero where there is none."""
    generator = torch.Generator().manual_seed(6)
    weights = [torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part.dtype) for part in outputs]
    loss = sum((weight * part).sum() for weight, part in zip(weights, outputs, strict=True))
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
    }


def relative(got: Tensor, wanted: Tensor) -> float:
    if wanted.norm() == 0:  # the learning rates have no gradient where there is no update
        return 0.0 if got.norm() == 0 else math.inf
    return ((got - wanted).norm() / wanted.norm()).item()


def differences(
    config: Mapping[str, Any], length: int, kind: type[SequentialLaCT] = SequentialLaCT
) -> tuple[float, dict[str, float]]:
    """Relative difference of model and reference: logits and hidden states, and each parameter's gradient."""
    model, tokens = model_of(config), tokens_of(length)
    parameters = {name: value.requires_grad_() for name, value in random_parameters(config).items()}
    wanted = kind(config, parameters, rope_dtype=torch.float64)(tokens)
    got = run_model(model, tokens)
    mine = gradients_of(got, dict(model.named_parameters()))
    theirs = gradients_of(wanted, parameters)
    assert mine.keys() == theirs.keys()
    values = max(relative(a.detach(), b.detach()) for a, b in zip(got, wanted, strict=True))
    return values, {name: relative(mine[name], theirs[name]) for name in theirs}


def assert_equal(config: Mapping[str, Any], length: int) -> None:
    values, gradients = differences(config, length)
    assert values < RELATIVE
    assert max(gradients.values()) < RELATIVE, {name: x for name, x in gradients.items() if x >= RELATIVE}


@pytest.mark.parametrize("name", VARIANTS)
def test_names_and_shapes_are_the_published_ones(name: str) -> None:
    config = {**BASE, **VARIANTS[name]}
    shapes = {key: tuple(value.shape) for key, value in model_of(config).state_dict().items()}
    if config.get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)
    assert shapes == parameter_shapes(config)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant(name: str) -> None:
    assert_equal({**BASE, **VARIANTS[name]}, LONG)


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1])
@pytest.mark.parametrize("name", ["defaults", "pre-norm, muon", "the paper's, probably"])
def test_every_length(name: str, length: int) -> None:
    assert_equal({**BASE, **VARIANTS[name]}, length)


@pytest.mark.parametrize("window", [1, CHUNK - 1, CHUNK, 3 * CHUNK, 100, None])
def test_every_window(window: int | None) -> None:
    assert_equal({**BASE, "window_size": window}, LONG)


@pytest.mark.parametrize("chunk", [1, 2, 7, 100])
@pytest.mark.parametrize("name", ["defaults", "pre-norm, muon"])
def test_every_chunk(name: str, chunk: int) -> None:
    assert_equal({**BASE, **VARIANTS[name], "lact_chunk_size": chunk}, LONG)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "defaults"])
def test_every_variant_is_another_model(name: str) -> None:
    """No comparison above is of two models that both ignore a flag."""
    tokens, plain, changed = tokens_of(LONG), dict(BASE), {**BASE, **VARIANTS[name]}
    one = SequentialLaCT(plain, random_parameters(plain))(tokens)[0]
    other = SequentialLaCT(changed, random_parameters(changed))(tokens)[0]
    # the fused variant's other epsilon is the smallest of all differences
    assert relative(other, one) > 100 * RELATIVE


# Newton-Schulz: in the precision of the tests above, and in bf16 as published


@pytest.mark.parametrize("shape", [(5, 5), (5, 7), (7, 5)])
def test_newton_schulz_in_full_precision(shape: tuple[int, int]) -> None:
    matrices = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = fast_newton_schulz(matrices, torch.float64)
    for mine, matrix in zip(got.flatten(0, 1), matrices.flatten(0, 1), strict=True):
        assert relative(mine, newton_schulz(matrix)) < 1e-12
        before, after = torch.linalg.svdvals(matrix), torch.linalg.svdvals(mine)
        assert after.max() < 1.3  # towards orthogonal, though small ones get there slowly
        assert ((after - 1).abs() <= (before / before.norm() - 1).abs()).all()


@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (40, 24)])
def test_newton_schulz_in_bf16(shape: tuple[int, int]) -> None:
    """The same roundings at the same places: what is left is sums inside a product in another order."""
    matrices = torch.randn(6, *shape, generator=torch.Generator().manual_seed(0))
    got = fast_newton_schulz(matrices, torch.bfloat16)
    assert torch.equal(got, got.bfloat16().float())  # nothing below bf16 is in it
    for mine, matrix in zip(got.float(), matrices, strict=True):
        assert relative(mine, newton_schulz(matrix, torch.bfloat16).float()) < 2e-3
        assert 1e-2 < relative(mine, newton_schulz(matrix)) < 3e-2  # bf16 has 8 bits, five steps add up


@pytest.mark.parametrize("name", ["muon", "pre-norm, muon", "the paper's, probably"])
def test_a_float32_model_orthogonalises_in_bf16(name: str) -> None:
    config = {**BASE, **VARIANTS[name]}
    tokens, parameters = tokens_of(LONG), random_parameters(config, torch.float32)
    got = run_model(model_of(config, torch.float32), tokens)[0].detach()
    published = SequentialLaCT(config, parameters, ns_dtype=torch.bfloat16)(tokens)[0].detach()
    exact = SequentialLaCT(config, parameters)(tokens)[0].detach()
    # up to the second update every rounding falls the same way; later a last bit of float32 may turn one of bf16
    assert relative(got[: 2 * CHUNK], published[: 2 * CHUNK]) < 1e-5
    assert relative(got, published) < 5e-2
    # so it is not the float32 form: few tokens in a chunk make a step of low rank, and bf16 shows
    assert relative(got[: 2 * CHUNK], exact[: 2 * CHUNK]) > 1e-2 and relative(got, exact) > 0.1
    full = run_model(model_of({**config, "muon_dtype": "float32"}, torch.float32), tokens)[0].detach()
    assert relative(full, exact) < 1e-4


# Controls: mistakes that the comparison has to see


class UpdateLate(SequentialLaCT):
    def chunk_to_absorb(self, t: int) -> range:
        size = self.get("lact_chunk_size")
        return range(t - 2 * size, t - size) if t >= 2 * size and t % size == 0 else range(0)


class UpdateEarly(SequentialLaCT):
    """The chunk is absorbed before its last token is read."""

    def chunk_to_absorb(self, t: int) -> range:
        size = self.get("lact_chunk_size")
        return range(t - size + 1, t + 1) if t % size == size - 1 else range(0)


class NoMomentum(SequentialLaCT):
    def add_momentum(self, step: list[Tensor], buffer: list[Tensor] | None, momenta: list[Tensor]) -> list[Tensor]:
        return step


class MomentumOfTheLastToken(SequentialLaCT):
    def add_momentum(self, step: list[Tensor], buffer: list[Tensor] | None, momenta: list[Tensor]) -> list[Tensor]:
        return super().add_momentum(step, buffer, momenta[-1:])


class RatesSwapped(SequentialLaCT):
    def learning_rates(self, p: dict[str, Tensor], token: Tensor, head: int) -> tuple[Tensor, Tensor, Tensor]:
        lr0, lr1, lr2 = super().learning_rates(p, token, head)
        return lr0, lr2, lr1


class WindowTooWide(SequentialLaCT):
    def sees(self, t: int, s: int) -> bool:
        return s <= t and t - s <= self.get("window_size")


class PositionsStartAgain(SequentialLaCT):
    """The memory's rotation counts from the start of each chunk."""

    def fast_qk(self, x: Tensor, t: int) -> Tensor:
        return super().fast_qk(x, t % self.get("lact_chunk_size"))


class PositionsOffByOne(SequentialLaCT):
    """From the second chunk on, in memory and window alike; a shift of all positions would change nothing."""

    def rotary_position(self, t: int) -> int:
        return t if t < self.get("lact_chunk_size") else t + 1


MISTAKES = [
    UpdateLate,
    UpdateEarly,
    NoMomentum,
    MomentumOfTheLastToken,
    RatesSwapped,
    WindowTooWide,
    PositionsStartAgain,
    PositionsOffByOne,
]


@pytest.mark.parametrize("name", ["defaults", "pre-norm, muon"])
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda kind: kind.__name__)
def test_a_mistake_shows(mistake: type[SequentialLaCT], name: str) -> None:
    values, gradients = differences({**BASE, **VARIANTS[name]}, LONG, mistake)
    assert values > VISIBLE
    assert min(gradients.values()) > RELATIVE


def test_a_mistake_shows_in_the_first_token_it_concerns() -> None:
    """An update that comes late leaves the first chunk alone and nothing after it."""
    config, tokens = {**BASE, **PAPER}, tokens_of(LONG)
    got = run_model(model_of(config), tokens)[0].detach()
    late = UpdateLate(config, random_parameters(config), rope_dtype=torch.float64)(tokens)[0].detach()
    per_token = (got - late).norm(dim=-1) / got.norm(dim=-1)
    assert per_token[:CHUNK].max() < RELATIVE and per_token[CHUNK:].min() > 1e-6
