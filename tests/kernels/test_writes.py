"""How strongly each token rewrites a state: what the stand-ins keep, and what operators are asked, against a loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference.delta_rule import write_norms_reference
from torch import Tensor

from refine_verl.kernels import conv as conv_kernels
from refine_verl.kernels import cpu_kernels, delta_rule
from refine_verl.kernels.cuts import Cuts
from refine_verl.kernels.operators import recorded, recorded_convolution
from refine_verl.kernels.recording import record_states

HEADS, KEYS, VALUES = 2, 5, 3
LENGTHS = {"one": [75], "equal": [66, 66], "unequal": [70, 1, 20]}
EXACT = 1e-11
"""Relative; both sides are float64."""


@pytest.fixture(autouse=True)
def stand_ins() -> Iterator[None]:
    with cpu_kernels():
        yield


def inputs(kind: str, lengths: list[int]) -> tuple[Any, dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """An operator, its tokens, its other arguments, and what the loop is told."""
    rows = len(set(lengths)) == 1
    shape = (len(lengths), lengths[0]) if rows else (1, sum(lengths))
    gen = torch.Generator().manual_seed(3)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, dtype=torch.float64)

    heads = HEADS if kind == "plain" else 2 * HEADS
    tokens = {"q": normal(*shape, HEADS, KEYS), "k": normal(*shape, HEADS, KEYS), "v": normal(*shape, heads, VALUES)}
    tokens["beta"] = normal(*shape, heads)
    bounds = None if rows else torch.tensor([0, *lengths]).cumsum(0)
    told = {"k": tokens["k"], "v": tokens["v"], "l2norm": True, "cu_seqlens": None if rows else bounds.tolist()}
    options: dict[str, Any] = {"use_qk_l2norm_in_kernel": True, "cu_seqlens": bounds}
    if kind == "plain":
        tokens["beta"] = tokens["beta"].sigmoid()
        return delta_rule.chunk_delta_rule, tokens, options, {**told, "beta": tokens["beta"]}
    if kind == "keys as they are":
        tokens["k"] = tokens["k"] / 3
        given = {**options, "use_qk_l2norm_in_kernel": False}
        tokens["g"], beta = F.logsigmoid(normal(*shape, heads)), tokens["beta"].sigmoid()
        tokens["beta"] = beta
        told |= {"k": tokens["k"], "beta": beta, "g": tokens["g"], "l2norm": False}
        return delta_rule.chunk_gated_delta_rule, tokens, given, told
    tokens["g"], A_log, dt_bias = normal(*shape, heads), normal(heads), normal(heads)
    options |= {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias, "state_v_first": True}
    options |= {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True}
    decay = -A_log.exp() * F.softplus(tokens["g"] + dt_bias)
    return (
        delta_rule.fused_recurrent_gated_delta_rule,
        tokens,
        options,
        {**told, "beta": 2 * tokens["beta"].sigmoid(), "g": decay},
    )


def distance(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("kind", ["plain", "gated", "keys as they are"])
@pytest.mark.parametrize("pieces", [0, 1, 2], ids=["kept", "asked", "asked of pieces"])
def test_norms_of_writes_are_those_of_the_loop(kind: str, lengths: list[int], pieces: int) -> None:
    operator, tokens, options, told = inputs(kind, lengths)
    wanted = write_norms_reference(**told)
    cuts = Cuts.even(lengths, pieces, torch.device("cpu")) if pieces else None
    with record_states(cuts) as recorder:
        recorded(operator)(**tokens, **options, output_final_state=True)
    got = recorder.write_norms()
    assert got.shape == (1, sum(lengths))
    assert distance(got[0], wanted) < EXACT
    # a decay or a step that is left out, or the token before, would show
    assert distance(got[0], write_norms_reference(**{**told, "beta": told["beta"] * 0.99})) > 1e-3
    assert distance(got[0, 1:], wanted[:-1]) > 1e-3


def test_a_convolution_writes_nothing() -> None:
    operator, tokens, options, _ = inputs("plain", [70])
    with record_states() as recorder:
        recorded(operator)(**tokens, **options, output_final_state=True)
        x, weight = torch.randn(1, 70, 6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
        recorded_convolution(conv_kernels.causal_conv1d)(x, weight, output_final_state=True)
    assert recorder.write_norms().shape == (1, 70)


def test_an_operator_whose_writes_are_not_known_is_refused() -> None:
    def chunk_other(
        q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, output_final_state: bool
    ) -> tuple[Tensor, Tensor]:
        return v, v[:, -1]

    _, tokens, _, _ = inputs("plain", [70])
    with record_states(Cuts.even([70], 1, torch.device("cpu"))) as recorder:
        recorded(chunk_other)(q=tokens["q"], k=tokens["k"], v=tokens["v"], output_final_state=True)
    with pytest.raises(NotImplementedError, match="chunk_other write is known of chunk_delta_rule"):
        recorder.write_norms()
