"""Names and shapes of the published model; what a batch may look like; precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference.toy import documents_of, relative
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from refine_verl.models import ModelError, inspect_model, known_model_types, pack
from refine_verl.models.lact import LaCTConfig, LaCTForCausalLM, LaCTModel
from refine_verl.models.lact import fast_weights as fast
from refine_verl.models.lact.adapter import LaCTAdapter

Build = Callable[..., LaCTForCausalLM]
PUBLISHED_760M = {
    "hidden_size": 1536,
    "num_attn_heads": 24,
    "w0_w2_low_rank": 32,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "use_muon": True,
}


def names_and_shapes(**fields: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = LaCTForCausalLM(LaCTConfig(**{**PUBLISHED_760M, **fields}))
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_the_published_760m() -> None:
    shapes = names_and_shapes()
    assert len(shapes) == 507
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 797_625_312
    wanted = {
        "model.embeddings.weight": (32000, 1536),
        "model.norm.weight": (1536,),
        "lm_head.weight": (32000, 1536),
        "model.layers.0.attn_norm.weight": (1536,),
        "model.layers.23.mlp.gate_proj.weight": (4096, 1536),
        "model.layers.23.mlp.down_proj.weight": (1536, 4096),
        "model.layers.3.attn.qkv.weight": (4608, 1536),
        "model.layers.3.attn.o_proj.weight": (1536, 1536),
        "model.layers.3.attn.w0.w_left": (4, 384, 32),
        "model.layers.3.attn.w2.w_right": (4, 32, 384),
        "model.layers.3.attn.w1": (4, 384, 384),
        "model.layers.3.attn.qk_scale": (1536, 2),
        "model.layers.3.attn.qk_offset": (1536, 2),
        "model.layers.3.attn.lr_proj.weight": (12, 1536),
        "model.layers.3.attn.lr_proj.bias": (12,),
        "model.layers.3.attn.ttt_scale_proj.weight": (4, 1536),
        "model.layers.3.attn.momentum_proj.0.bias": (4,),
        "model.layers.3.attn.ttt_norm.weight": (384,),
    }
    assert wanted.items() <= shapes.items()


def test_two_fast_weight_heads() -> None:
    shapes = names_and_shapes(num_lact_heads=2, ttt_nope=True)
    assert len(shapes) == 507
    assert shapes["model.layers.0.attn.w1"] == (2, 768, 768)
    assert shapes["model.layers.0.attn.w0.w_right"] == (2, 32, 768)
    assert shapes["model.layers.0.attn.lr_proj.weight"] == (6, 1536)


def test_fields_and_defaults_are_the_published_ones() -> None:
    config = LaCTConfig(some_later_field=3)
    assert (config.hidden_size, config.num_attn_heads, config.num_lact_heads) == (2048, 32, 4)
    assert (config.window_size, config.lact_chunk_size, config.w0_w2_low_rank) == (2048, 2048, -1)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)
    assert config.mlp_dim == 5632 and config.tie_word_embeddings is False
    again = LaCTConfig.from_dict(config.to_dict())
    assert again.some_later_field == 3 and again.rope_theta == 1e4
    assert LaCTConfig(rope_theta=1e6).to_dict()["rope_theta"] == 1e6


def test_transformers_and_refine_know_it() -> None:
    config = AutoConfig.for_model("lact_swiglu", hidden_size=24, num_hidden_layers=1, num_attn_heads=2, vocab_size=7)
    assert isinstance(config, LaCTConfig) and "lact_swiglu" in known_model_types()
    assert type(AutoModel.from_config(config)) is LaCTModel
    assert type(AutoModelForCausalLM.from_config(config)) is LaCTForCausalLM
    info = inspect_model(None, {"model_type": "lact_swiglu", "hidden_size": 24, "num_attn_heads": 2, "vocab_size": 7})
    assert info.config.architectures == ["LaCTForCausalLM"] and info.vocab_size == 7


REFUSED = [
    ({"num_attn_heads": 25}, "num_attn_heads=25 does not divide hidden_size=2048"),
    ({"num_lact_heads": 3}, "num_lact_heads=3 does not divide"),
    ({"hidden_size": 96}, "heads of 3 features"),
    ({"lact_chunk_size": 0}, "lact_chunk_size=0: at least 1 token"),
    ({"window_size": 0}, "window_size=0: at least 1, or null"),
    ({"lr_dim": 5}, "lr_dim=5: 1, or one rate per column .* 512 columns"),
    ({"lr_dim": 512, "inter_multi": 2}, "512 and 1024 columns"),
    ({"lr_parameterization": "direct"}, "lr_parameterization='direct'; allowed: mamba"),
    ({"muon_dtype": "float16"}, "muon_dtype='float16'; allowed: auto, bfloat16, float32"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_impossible_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LaCTConfig(**fields)
    with pytest.raises(ModelError, match=message):
        inspect_model(None, {"model_type": "lact_swiglu", **fields})


def test_initial_values(lact: Build) -> None:
    torch.manual_seed(0)
    model = LaCTForCausalLM(
        LaCTConfig(hidden_size=256, num_hidden_layers=1, num_attn_heads=4, num_lact_heads=2, w0_w2_low_rank=16)
    )
    attn = model.model.layers[0].attn
    assert torch.equal(attn.qk_scale, torch.ones(256, 2)) and not attn.qk_offset.any()
    assert not attn.lr_proj.bias.any() and torch.equal(attn.ttt_norm.weight, torch.ones(128))
    for tensor, std in (
        (attn.w1, 128**-0.5),
        (attn.w0.w_left, 0.5 / 4),
        (attn.w2.w_right, 0.5 * 128**-0.5),
        (attn.qkv.weight, 0.006),
        (model.lm_head.weight, 0.006),
    ):
        assert tensor.std().item() == pytest.approx(std, rel=0.1)


# Batches


def alone(model: LaCTForCausalLM, row: Tensor) -> Tensor:
    return model(input_ids=row[None], use_cache=False).logits[0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [(40, 33, 8), (3, 17, 1)], ids=str)
def test_padding_changes_nothing(lact: Build, side: str, lengths: tuple[int, ...]) -> None:
    model, documents = lact(), documents_of(lengths)
    rows = [documents.tokens[b, :length] for b, length in enumerate(lengths)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=5, padding_side=side)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True, padding_side=side)
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        for logits, real, row in zip(output.logits, mask.bool(), rows, strict=True):
            assert relative(logits[real], alone(model, row)) < 1e-11
        # control: without the mask, padding on the left does change the rest
        if side == "left":
            assert relative(model(input_ids=ids).logits[-1][mask[-1].bool()], alone(model, rows[-1])) > 1e-3
    assert len(output.hidden_states) == 3 and not output.hidden_states[-1][~mask.bool()].any()


def test_packed_sequences_do_not_see_each_other(lact: Build) -> None:
    model, lengths = lact(), (17, 1, 24, 8)
    documents = documents_of(lengths)
    rows = [documents.tokens[b, :length] for b, length in enumerate(lengths)]
    borders = torch.tensor((0, *lengths)).cumsum(0)
    packed = torch.cat(rows)[None]
    with torch.no_grad():
        logits = model(input_ids=packed, cu_seqlens=borders).logits[0]
        for mine, row in zip(logits.split(lengths), rows, strict=True):
            assert relative(mine, alone(model, row)) < 1e-11
        changed = packed.clone()
        changed[0, :17] = (changed[0, :17] + 1) % 61
        again = model(input_ids=changed, cu_seqlens=borders).logits[0]
    assert torch.equal(again[17:], logits[17:]) and not torch.equal(again[:17], logits[:17])


@pytest.mark.parametrize(
    ("borders", "mask", "message"),
    [
        ([0, 4, 7], None, r"cu_seqlens \[0, 4, 7\] does not cut a batch of shape \[1, 8\]"),
        ([0, 8], torch.ones(1, 8), "not both"),
        (None, torch.ones(1, 5), r"attention_mask of shape \[1, 5\] for a batch of shape \[1, 8\]"),
    ],
)
def test_layouts_that_do_not_fit(lact: Build, borders: list[int] | None, mask: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lact()(
            input_ids=torch.zeros(1, 8, dtype=torch.int64),
            cu_seqlens=None if borders is None else torch.tensor(borders),
            attention_mask=mask,
        )


def test_loss_embeddings_and_kept_logits(lact: Build) -> None:
    model, ids = lact(), documents_of([20, 20]).tokens
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids), logits_to_keep=1, return_dict=False)
    wanted = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss.double(), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(embedded[0], output.logits[:, -1:])
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


# Precision


@pytest.mark.parametrize("fields", [{}, {"window_size": 1, "attn_qk_norm": True}], ids=str)
def test_every_parameter_has_a_gradient_without_any_update(lact: Build, fields: dict[str, Any]) -> None:
    """Under FSDP, ranks with short documents reduce the same gradients as those with long ones."""
    model = lact(**fields)
    alone(model, documents_of([5]).tokens[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not model.model.layers[0].attn.lr_proj.weight.grad.any()


@pytest.mark.parametrize("prenorm", [False, True])
def test_autocast_keeps_the_state_in_float32(lact: Build, prenorm: bool) -> None:
    model = lact(torch.float32, use_muon=True, w0_w2_low_rank=3, ttt_prenorm=prenorm)
    tokens = documents_of([30]).tokens
    exact = alone(model, tokens[0]).detach()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        output = model(input_ids=tokens, use_cache=True)
    layer = output.past_key_values.state.layers[0]
    for matrices in layer.fast[0]:
        assert matrices is None or all(w.dtype == torch.float32 for w in matrices)
    assert layer.open[0].rates.dtype == layer.open[0].momentum.dtype == torch.float32
    assert layer.open[0].k.dtype == layer.window[0][0].dtype == torch.bfloat16
    got = output.logits[0].float().detach()
    assert 1e-4 < relative(got[:8], exact[:8]) < 0.05  # later, orthogonalising enlarges what rounding did
    assert relative(got, exact) < 0.4
    output.logits.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_a_model_in_bfloat16(lact: Build) -> None:
    tokens = documents_of([30]).tokens
    model = lact(torch.float32, use_muon=True)
    exact = alone(model, tokens[0])
    output = model.to(torch.bfloat16)(input_ids=tokens, use_cache=True)
    assert output.logits.dtype == torch.bfloat16
    assert output.past_key_values.state.layers[0].fast[0].used[0].dtype == torch.float32
    assert relative(output.logits[0, :8].float(), exact[:8]) < 0.05


def test_low_rank_products_in_float32_under_autocast(lact: Build) -> None:
    made = {}
    for precise in (False, True):
        attn = lact(torch.float32, w0_w2_low_rank=3, fp32_states=precise).model.layers[0].attn
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            made[precise] = attn._initial()[0].used[0]
        exact = attn._initial()[0].used[0]
    assert torch.equal(made[True], exact) and not torch.equal(made[False], exact)


@pytest.mark.parametrize(
    ("chosen", "dtype", "wanted"),
    [
        ("auto", torch.float64, torch.float64),
        ("auto", torch.float32, torch.bfloat16),
        ("bfloat16", torch.float64, torch.bfloat16),
        ("float32", torch.float32, torch.float32),
        ("float32", torch.float64, torch.float64),
    ],
)
def test_precision_of_newton_schulz(chosen: str, dtype: torch.dtype, wanted: torch.dtype) -> None:
    assert fast.muon_dtype(LaCTConfig(muon_dtype=chosen), dtype) == wanted
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact, got = fast.newton_schulz(x, torch.float64), fast.newton_schulz(x.to(dtype), wanted)
    assert got.dtype == wanted
    bound = {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 0.1}[wanted]
    assert relative(got.double(), exact) < bound
    assert (relative(got.double(), exact) > 1e-3) == (wanted == torch.bfloat16)


def test_newton_schulz_approaches_the_nearest_orthogonal_matrix() -> None:
    x = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, v = torch.linalg.svd(x)
    got = fast.newton_schulz(x, torch.float64)
    # the singular vectors stay, the singular values go towards 1
    diagonal = (u.mT @ got @ v.mT).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(got, u @ torch.diag_embed(diagonal) @ v, rtol=1e-9, atol=1e-9)
    assert ((diagonal > 0.7) & (diagonal < 1.3))[s / s.norm(dim=-1, keepdim=True) > 0.05].all()
    torch.testing.assert_close(fast.newton_schulz(x.mT, torch.float64), got.mT)


def test_the_fused_variant_normalises_and_orthogonalises_differently(lact: Build) -> None:
    fields = {"use_muon": True, "no_v_silu": True}
    plain, fused = lact(**fields), lact(**fields, use_fused_kernel=True)
    x, norms = torch.randn(1, 2, 12, 12, dtype=torch.float64), torch.ones(1, 2, 12, 1, dtype=torch.float64)
    row = fast._renormalise(fused.config, 1e-3 * x, norms).norm(dim=-1)
    wanted = (1e-3 * x.norm(dim=-1)) / (1e-6 * x.square().sum(-1) + 1e-5).sqrt()
    torch.testing.assert_close(row, wanted)
    u0, _, u2 = fast._orthogonalised(fused.config, (x, x, 2 * x))
    torch.testing.assert_close(u2, 2 * u0)  # one matrix of twice the rows
    tokens = documents_of([20]).tokens[0]
    assert relative(alone(fused, tokens)[:8], alone(plain, tokens)[:8]) < 1e-12
    assert relative(alone(fused, tokens)[8:], alone(plain, tokens)[8:]) > 1e-6


@pytest.mark.slow
def test_compiled_updates_are_the_same(lact: Build) -> None:
    tokens = documents_of([20]).tokens[0]
    made = []
    for compiled in (False, True):
        model = lact(use_muon=True, num_hidden_layers=1, compile_fast_weights=compiled)
        logits = alone(model, tokens)
        logits.square().sum().backward()
        made.append([logits.detach(), *(p.grad for p in model.parameters())])
    assert all(relative(a, b) < 1e-9 for a, b in zip(*made, strict=True) if b.norm() > 0)


def test_memory_grows_with_the_window_not_with_the_square(lact: Build) -> None:
    """No tensor of a pass has more than a few windows per token."""
    model, tokens = lact(window_size=8, num_hidden_layers=1), documents_of([2000]).tokens[0]
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for leaf in torch.utils._pytree.tree_leaves(out):
                largest = max(largest, leaf.numel() if isinstance(leaf, Tensor) else 0)
            return out

    with torch.no_grad(), Watch():
        LaCTAdapter().run(model, pack([tokens]), None, True)
    assert largest <= 2000 * 4 * 3 * 8
