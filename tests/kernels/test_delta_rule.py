"""The chunked (gated) delta rule against a token loop, and against fla's own naive functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference.delta_rule import delta_rule_reference, l2_normalise
from reference.kernel_coverage import compares

from refine_verl.kernels.chunking import choose_chunk, chunk_plan
from refine_verl.kernels.delta_rule import log_decay
from refine_verl.kernels.patch import TARGETS

CHUNK = TARGETS["fla.layers.delta_net:chunk_delta_rule"]
RECURRENT = TARGETS["fla.layers.delta_net:fused_recurrent_delta_rule"]
GATED_CHUNK = TARGETS["fla.layers.gated_deltanet:chunk_gated_delta_rule"]
GATED_RECURRENT = TARGETS["fla.layers.gated_deltanet:fused_recurrent_gated_delta_rule"]

LENGTHS = (1, 2, 3, 4, 63, 64, 65, 100, 130)
RAGGED = (
    [0, 1, 3, 70, 71, 100],
    [0, 0, 5, 5, 135, 135],
    [0, 1, 4, 8, 12],
    [0, 64, 192],
    [0, 200, 203, 205, 206],
)
TOLERANCE = 1e-12

Inputs = dict[str, torch.Tensor | None]


def make_inputs(
    batch: int,
    tokens: int,
    *,
    sequences: int | None = None,
    heads: int = 2,
    value_heads: int | None = None,
    gated: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Inputs:
    """Random inputs of the scan, all requiring grad."""
    gen = torch.Generator().manual_seed(seed)
    value_heads, keys, values = value_heads or heads, 8, 6

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    inputs: Inputs = {
        "q": normal(batch, tokens, heads, keys),
        "k": normal(batch, tokens, heads, keys),
        "v": normal(batch, tokens, value_heads, values),
        "beta": normal(batch, tokens, value_heads).sigmoid(),
        "g": -normal(batch, tokens, value_heads).abs() * 0.3 if gated else None,
        "initial_state": normal(sequences or batch, value_heads, keys, values),
    }
    return {name: None if x is None else x.to(dtype).requires_grad_() for name, x in inputs.items()}


def run(function: Any, inputs: Inputs, cu: list[int] | None = None, **kwargs: Any) -> list[torch.Tensor]:
    """Outputs, final state and the gradient of every input for a fixed random linear loss."""
    given = {name: x for name, x in inputs.items() if x is not None}
    if function is delta_rule_reference:
        out, state = function(**given, l2norm=True, cu_seqlens=cu, **kwargs)
    else:
        bounds = None if cu is None else torch.tensor(cu)
        out, state = function(
            **given, output_final_state=True, use_qk_l2norm_in_kernel=True, cu_seqlens=bounds, **kwargs
        )
    gen = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=gen, dtype=torch.float64)).sum() for x in (out, state))
    return [out, state, *torch.autograd.grad(loss, list(given.values()))]


def errors(expected: list[torch.Tensor], actual: list[torch.Tensor]) -> list[float]:
    """Relative RMS difference of each pair."""
    pairs = zip(expected, actual, strict=True)
    return [((a.double() - e.double()).norm() / e.double().norm()).item() for e, a in pairs]


@compares("fla.layers.delta_net:chunk_delta_rule", "fla.layers.gated_deltanet:chunk_gated_delta_rule")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_equal_rows_match_token_loop(tokens: int, gated: bool) -> None:
    inputs = make_inputs(2, tokens, gated=gated)
    function = GATED_CHUNK if gated else CHUNK
    assert max(errors(run(delta_rule_reference, inputs), run(function, inputs))) < TOLERANCE


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("cu", RAGGED, ids=str)
def test_packed_sequences_match_token_loop(cu: list[int], gated: bool) -> None:
    inputs = make_inputs(1, cu[-1], sequences=len(cu) - 1, gated=gated)
    function = GATED_CHUNK if gated else CHUNK
    assert max(errors(run(delta_rule_reference, inputs, cu), run(function, inputs, cu))) < TOLERANCE


@compares(
    "fla.layers.delta_net:fused_recurrent_delta_rule",
    "fla.layers.gated_deltanet:fused_recurrent_gated_delta_rule",
)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 64, 70])
def test_recurrent_names_match_token_loop(tokens: int, gated: bool) -> None:
    inputs = make_inputs(2, tokens, gated=gated)
    function = GATED_RECURRENT if gated else RECURRENT
    assert max(errors(run(delta_rule_reference, inputs), run(function, inputs))) < TOLERANCE


@pytest.mark.parametrize("chunk", [1, 7, 16, 32, 128])
def test_any_chunk_size_gives_the_same(chunk: int) -> None:
    inputs = make_inputs(1, 100, sequences=3, gated=True)
    cu = [0, 30, 37, 100]
    expected = run(delta_rule_reference, inputs, cu)
    assert max(errors(expected, run(GATED_CHUNK, inputs, cu, chunk_size=chunk))) < TOLERANCE


def test_grouped_value_heads() -> None:
    inputs = make_inputs(2, 70, value_heads=4, gated=True)
    assert max(errors(run(delta_rule_reference, inputs), run(GATED_CHUNK, inputs))) < TOLERANCE


@pytest.mark.parametrize("damage", ["beta", "token", "state", "decay"])
def test_comparison_notices_a_wrong_input(damage: str) -> None:
    """Negative control: the tolerance of the comparisons above is far below any real mistake."""
    inputs = make_inputs(2, 65, gated=True)
    wrong = {name: None if x is None else x.detach().clone() for name, x in inputs.items()}
    if damage == "beta":
        wrong["beta"] = torch.ones_like(wrong["beta"])
    elif damage == "token":
        wrong["k"] = wrong["k"].roll(1, dims=1)
    elif damage == "state":
        wrong["initial_state"] = torch.zeros_like(wrong["initial_state"])
    else:
        wrong["g"] = torch.zeros_like(wrong["g"])
    with torch.no_grad():
        kwargs = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
        out, state = GATED_CHUNK(**wrong, **kwargs)
        expected, expected_state = delta_rule_reference(**inputs, l2norm=True)
    assert errors([expected], [out])[0] > 1e-3
    assert damage == "token" or errors([expected_state], [state])[0] > 1e-9


def test_only_part_of_the_outputs_used() -> None:
    inputs = make_inputs(1, 70)
    given = {name: x for name, x in inputs.items() if x is not None}
    for pick in (0, 1):
        actual = CHUNK(**given, output_final_state=True)[pick].sum()
        expected = delta_rule_reference(**given)[pick].sum()
        grads = [torch.autograd.grad(loss, given["k"])[0] for loss in (expected, actual)]
        assert errors(grads[:1], grads[1:])[0] < TOLERANCE


def test_zero_beta_has_a_finite_and_right_gradient() -> None:
    inputs = make_inputs(1, 20)
    inputs["beta"] = torch.zeros(1, 20, 2, dtype=torch.float64, requires_grad=True)
    for expected, actual in zip(run(delta_rule_reference, inputs), run(CHUNK, inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_state_carries_over_segments() -> None:
    inputs = make_inputs(1, 130, gated=True)
    whole = run(GATED_CHUNK, inputs)[0]
    state, parts = inputs["initial_state"], []
    for start, end in ((0, 1), (1, 3), (3, 70), (70, 130)):
        cut = {n: x[:, start:end] for n, x in inputs.items() if x is not None and n != "initial_state"}
        part, state = GATED_CHUNK(**cut, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-13)


def test_gate_and_beta_inside_the_kernel() -> None:
    inputs = make_inputs(2, 20, value_heads=4, gated=True)
    a_log = torch.linspace(-1, 1, 4, dtype=torch.float64, requires_grad=True)
    dt_bias = torch.linspace(0.5, 2, 4, dtype=torch.float64, requires_grad=True)
    raw = torch.randn(2, 20, 4, dtype=torch.float64)
    logits = torch.randn(2, 20, 4, dtype=torch.float64)
    rest = {name: inputs[name] for name in ("q", "k", "v")}
    state = inputs["initial_state"]
    for factor in (1.0, 2.0):
        decay = -a_log.exp() * torch.log1p((raw + dt_bias).exp())
        expected = delta_rule_reference(
            **rest, beta=factor * torch.sigmoid(logits), g=decay, l2norm=True, initial_state=state
        )
        for function in (GATED_CHUNK, GATED_RECURRENT):
            out, final = function(
                **rest,
                g=raw,
                beta=logits,
                initial_state=state.transpose(-1, -2),
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
                use_gate_in_kernel=True,
                A_log=a_log,
                dt_bias=dt_bias,
                use_beta_sigmoid_in_kernel=True,
                allow_neg_eigval=factor == 2.0,
                state_v_first=True,
            )
            actual = [out, final.transpose(-1, -2)]
            assert max(errors(list(expected), actual)) < TOLERANCE
            grads = [
                torch.autograd.grad(o.square().sum(), (a_log, dt_bias), retain_graph=True) for o in (expected[0], out)
            ]
            assert max(errors(list(grads[0]), list(grads[1]))) < 1e-10


def test_matches_fla_naive_delta_rule() -> None:
    from fla.ops.delta_rule.naive import delta_rule_chunkwise, delta_rule_recurrence

    inputs = make_inputs(2, 128, dtype=torch.float32)
    q, k = l2_normalise(inputs["q"]), l2_normalise(inputs["k"])
    heads_first = [x.transpose(1, 2) for x in (q, k, inputs["v"], inputs["beta"])]
    state = inputs["initial_state"]
    expected, expected_state = delta_rule_recurrence(*heads_first, initial_state=state)
    out, final = CHUNK(q, k, inputs["v"], inputs["beta"], initial_state=state, output_final_state=True)
    assert max(errors([expected.transpose(1, 2), expected_state], [out, final])) < 1e-5
    expected, expected_state = delta_rule_chunkwise(*heads_first)
    out, final = CHUNK(q, k, inputs["v"], inputs["beta"], output_final_state=True)
    assert max(errors([expected.transpose(1, 2), expected_state], [out, final])) < 1e-5


def test_matches_fla_naive_gated_delta_rule() -> None:
    from fla.ops.gated_delta_rule.gate import naive_gdn_gate
    from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule, naive_recurrent_gated_delta_rule

    inputs = make_inputs(2, 100, gated=True, dtype=torch.float32)
    q, k, v, beta, g, state = (inputs[n] for n in ("q", "k", "v", "beta", "g", "initial_state"))
    q, k = l2_normalise(q), l2_normalise(k)
    actual = list(GATED_CHUNK(q, k, v, g, beta, initial_state=state, output_final_state=True))
    options = {"initial_state": state, "output_final_state": True}
    assert max(errors(list(naive_recurrent_gated_delta_rule(q, k, v, beta, g, **options)), actual)) < 1e-5
    assert max(errors(list(naive_chunk_gated_delta_rule(q, k, v, g, beta, **options)), actual)) < 1e-5
    raw, a_log, bias = torch.randn(2, 5, 3), torch.randn(3), torch.randn(3)
    torch.testing.assert_close(log_decay(raw, a_log, bias), naive_gdn_gate(raw, a_log, bias))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
def test_lower_precision_stays_close(dtype: torch.dtype, bound: float) -> None:
    inputs = make_inputs(2, 130, gated=True, dtype=dtype)
    exact = {n: None if x is None else x.detach().double().requires_grad_() for n, x in inputs.items()}
    actual = run(GATED_CHUNK, inputs)
    assert actual[0].dtype == dtype
    assert actual[1].dtype == torch.float32
    assert [g.dtype for g in actual[2:]] == [dtype] * 6
    assert max(errors(run(delta_rule_reference, exact), actual)) < bound


def test_repeated_keys_stay_accurate_in_float32() -> None:
    """Identical keys with beta = 1 are the worst case of the triangular inverse."""
    inputs = make_inputs(1, 128, dtype=torch.float32)
    inputs["k"] = inputs["k"].detach()[:, :1].expand(-1, 128, -1, -1).clone().requires_grad_()
    inputs["beta"] = torch.ones(1, 128, 2, requires_grad=True)
    exact = {n: None if x is None else x.detach().double().requires_grad_() for n, x in inputs.items()}
    with torch.no_grad():
        kwargs = {n: x for n, x in inputs.items() if x is not None}
        out, _ = CHUNK(**kwargs, use_qk_l2norm_in_kernel=True)
        expected, _ = delta_rule_reference(**exact, l2norm=True)
    assert errors([expected], [out])[0] < 1e-5


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_documents_do_not_change_a_bit(dtype: torch.dtype, gated: bool) -> None:
    cu, kept = [0, 5, 70, 71, 300, 364], [0, 2, 4]
    inputs = make_inputs(1, 364, sequences=5, gated=gated, dtype=dtype)
    changed = make_inputs(1, 364, sequences=5, gated=gated, dtype=dtype, seed=7)
    rows = torch.cat([torch.arange(cu[n], cu[n + 1]) for n in kept])
    mixed = {}
    for name, x in inputs.items():
        if x is not None:
            index = torch.tensor(kept) if name == "initial_state" else rows
            axis = 0 if name == "initial_state" else 1
            mixed[name] = changed[name].detach().index_copy(axis, index, x.detach().index_select(axis, index))
            mixed[name].requires_grad_()
    function = GATED_CHUNK if gated else CHUNK
    first, second = run(function, inputs, cu), run(function, mixed, cu)
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        is_state = i in (1, len(first) - 1)
        index, axis = (torch.tensor(kept), 0) if is_state else (rows, 1)
        assert torch.equal(a.index_select(axis, index), b.index_select(axis, index))
        assert not torch.equal(a, b)


def test_a_broken_document_does_not_spread() -> None:
    inputs = make_inputs(1, 100, sequences=2, dtype=torch.float32)
    with torch.no_grad():
        given = {n: x.clone() for n, x in inputs.items() if x is not None}
        options = {"output_final_state": True, "cu_seqlens": torch.tensor([0, 30, 100])}
        clean, _ = CHUNK(**given, **options)
        given["v"][:, :30] = float("nan")
        broken, state = CHUNK(**given, **options)
    assert torch.equal(broken[:, 30:], clean[:, 30:])
    assert broken[:, :30].isnan().any()
    assert not state[1].isnan().any()


def test_batch_rows_do_not_change_each_other() -> None:
    inputs = make_inputs(3, 65, dtype=torch.float32)
    with torch.no_grad():
        given = {n: x.clone() for n, x in inputs.items() if x is not None}
        before, _ = CHUNK(**given)
        given["k"][0] = 1.0
        after, _ = CHUNK(**given)
    assert torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0], after[0])


def test_under_autocast_the_scan_stays_in_float32() -> None:
    inputs = {n: x for n, x in make_inputs(1, 70, dtype=torch.float32).items() if x is not None}
    with torch.no_grad():
        plain, _ = CHUNK(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            cast, _ = CHUNK(**inputs)
    assert torch.equal(plain, cast)


def test_inputs_are_left_alone() -> None:
    inputs = make_inputs(1, 1, gated=True)
    copies = {n: x.detach().clone() for n, x in inputs.items() if x is not None}
    run(GATED_CHUNK, inputs)
    assert all(torch.equal(copies[n], inputs[n]) for n in copies)


def test_plan_pads_to_chunks_only() -> None:
    plan = chunk_plan((5, 130, 64), chunk=64)
    assert plan.active == (3, 1, 1)
    assert plan.order.tolist() == [1, 0, 2]
    assert plan.padding.sum() == 5 * 64 - 199
    assert chunk_plan((128, 128), chunk=64).gather is None


def test_short_sequences_get_short_chunks() -> None:
    assert choose_chunk((4096,)) == 64
    assert choose_chunk((5,)) == 5
    assert choose_chunk((1,) * 64) == 1
    assert choose_chunk(tuple(1 + i % 5 for i in range(64))) == 5
    assert choose_chunk((40, *[3] * 100)) < 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 5])}, "rise from 0 to the row length 10"),
        ({"cu_seqlens": torch.tensor([0, 6, 4, 10])}, "rise from 0"),
        ({"initial_state": torch.zeros(1, 2, 6, 8)}, r"\[1, 2, 8, 6\], got \[1, 2, 6, 8\]"),
        ({"beta": torch.zeros(1, 10)}, "beta must be"),
    ],
)
def test_misfits_are_named(change: dict[str, Any], message: str) -> None:
    inputs: dict[str, Any] = {n: x for n, x in make_inputs(1, 10, dtype=torch.float32).items() if x is not None}
    with pytest.raises(ValueError, match=message):
        CHUNK(**{**inputs, **change})


def test_unsupported_arguments_are_refused() -> None:
    inputs = {n: x for n, x in make_inputs(1, 10, gated=True).items() if x is not None}
    with pytest.raises(NotImplementedError, match="cp_context"):
        GATED_CHUNK(**inputs, cp_context=object())
    with pytest.raises(NotImplementedError, match="gk"):
        GATED_RECURRENT(**inputs, gk=torch.zeros(1))
    GATED_CHUNK(**inputs, cp_context=None)
