"""What the operators of fla's layers compute, said by token loops; called as the layers call them.

An entry of `OPERATORS` names an operator where a layer looks it up. Its inputs are random, with a state before the
first token; its flags are the layer's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from reference.delta_rule import delta_rule_reference
from reference.gla import gla_reference
from torch import Tensor

HEADS, KEYS, VALUES = 2, 16, 16
HOUSEHOLDERS = 2

Inputs = dict[str, Tensor]
Reference = Callable[[Inputs, "list[int] | None"], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """An operator and what it has to compute.

    Attributes:
        target: ``module:attribute``.
        make: ``(generator, batch, tokens, sequences)`` to inputs that are named as the operator's arguments.
        reference: outputs and final states from the same inputs and cumulative lengths.
        flags: the layer's other arguments.
        steps: entries of ``cu_seqlens`` for each token.
        backward: whether fla has one.
    """

    target: str
    make: Callable[..., Inputs]
    reference: Reference
    flags: dict[str, Any] = field(default_factory=dict)
    steps: int = 1
    backward: bool = True


def _normal(gen: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=gen)


def _common(gen: torch.Generator, batch: int, tokens: int, steps: int = 1, heads: int = HEADS) -> Inputs:
    return {
        "q": _normal(gen, batch, tokens, HEADS, KEYS),
        "k": _normal(gen, batch, tokens * steps, HEADS, KEYS),
        "v": _normal(gen, batch, tokens * steps, heads, VALUES),
    }


def _plain(gen: torch.Generator, batch: int, tokens: int, sequences: int) -> Inputs:
    return {
        **_common(gen, batch, tokens),
        "beta": _normal(gen, batch, tokens, HEADS).sigmoid(),
        "initial_state": _normal(gen, sequences, HEADS, KEYS, VALUES),
    }


def _gated(gen: torch.Generator, batch: int, tokens: int, sequences: int) -> Inputs:
    """Gate and beta before their functions; twice as many heads of values."""
    heads = 2 * HEADS
    return {
        **_common(gen, batch, tokens, heads=heads),
        "g": _normal(gen, batch, tokens, heads),
        "beta": _normal(gen, batch, tokens, heads),
        "A_log": _normal(gen, heads) - 1,
        "dt_bias": _normal(gen, heads) - 1,
        "initial_state": _normal(gen, sequences, heads, VALUES, KEYS),
    }


def _kda(gen: torch.Generator, batch: int, tokens: int, sequences: int) -> Inputs:
    """A gate for every entry of a key."""
    return {
        **_common(gen, batch, tokens),
        "g": _normal(gen, batch, tokens, HEADS, KEYS),
        "beta": _normal(gen, batch, tokens, HEADS),
        "A_log": _normal(gen, HEADS) - 1,
        "dt_bias": _normal(gen, HEADS * KEYS) - 1,
        "initial_state": _normal(gen, sequences, HEADS, VALUES, KEYS),
    }


def _gla(gate: str) -> Callable[..., Inputs]:
    def make(gen: torch.Generator, batch: int, tokens: int, sequences: int) -> Inputs:
        return {
            **_common(gen, batch, tokens),
            gate: F.logsigmoid(_normal(gen, batch, tokens, HEADS, KEYS)),
            "initial_state": _normal(gen, sequences, HEADS, VALUES, KEYS),
        }

    return make


def _product(gen: torch.Generator, batch: int, tokens: int, sequences: int) -> Inputs:
    return {
        **_common(gen, batch, tokens, HOUSEHOLDERS),
        "g": F.logsigmoid(_normal(gen, batch, tokens, HEADS)),
        "beta": _normal(gen, batch, tokens * HOUSEHOLDERS, HEADS).sigmoid(),
        "initial_state": _normal(gen, sequences, HEADS, KEYS, VALUES),
    }


def _delta_rule(inputs: Inputs, cu: list[int] | None) -> tuple[Tensor, Tensor]:
    return delta_rule_reference(**inputs, l2norm=True, cu_seqlens=cu)


def _gated_rule(factor: float) -> Reference:
    """The gate ``-exp(A) softplus(g + dt)`` and ``factor * sigmoid(beta)``; states ``[N, HV, V, K]``."""

    def reference(inputs: Inputs, cu: list[int] | None) -> tuple[Tensor, Tensor]:
        given = dict(inputs)
        a, dt, state = given.pop("A_log").exp(), given.pop("dt_bias"), given.pop("initial_state")
        g = given.pop("g")
        a = a[:, None] if g.dim() == 4 else a
        decay = -a * F.softplus(g + dt.view(g.shape[2:]))
        beta = factor * given.pop("beta").sigmoid()
        out, final = delta_rule_reference(
            **given, g=decay, beta=beta, initial_state=state.mT, l2norm=True, cu_seqlens=cu
        )
        return out, final.mT

    return reference


def _linear(gate: str) -> Reference:
    def reference(inputs: Inputs, cu: list[int] | None) -> tuple[Tensor, Tensor]:
        q, k, v, g, state = (inputs[name] for name in ("q", "k", "v", gate, "initial_state"))
        out, final = gla_reference(q, k, v, g, initial_state=state.mT, cu_seqlens=cu)
        return out, final.mT

    return reference


def _delta_product(inputs: Inputs, cu: list[int] | None) -> tuple[Tensor, Tensor]:
    """The delta rule with several keys a token: the decay before the first, the output after the last."""
    q, g = inputs["q"], inputs["g"]
    steps = torch.zeros(HOUSEHOLDERS, dtype=q.dtype)
    last, first = steps.clone(), steps.clone()
    last[-1], first[0] = 1, 1
    out, final = delta_rule_reference(
        torch.einsum("bthk,n->btnhk", q, last).flatten(1, 2),
        inputs["k"],
        inputs["v"],
        inputs["beta"],
        torch.einsum("bth,n->btnh", g, first).flatten(1, 2),
        initial_state=inputs["initial_state"],
        l2norm=True,
        cu_seqlens=None if cu is None else [HOUSEHOLDERS * place for place in cu],
    )
    return out[:, HOUSEHOLDERS - 1 :: HOUSEHOLDERS], final


def _gated_by_hand(gen: torch.Generator, batch: int, tokens: int, sequences: int) -> Inputs:
    """As the layer of `gated_deltaproduct` calls the recurrent operator: everything for every step."""
    return {
        **_plain(gen, batch, tokens, sequences),
        "g": F.logsigmoid(_normal(gen, batch, tokens, HEADS)),
    }


def told_of_writes(inputs: Inputs, flags: dict[str, Any]) -> Inputs:
    """Keys, values, steps and log-decays of a delta rule, from what its operator is given."""
    told = {name: inputs[name] for name in ("k", "v", "beta")}
    if flags.get("use_beta_sigmoid_in_kernel"):
        told["beta"] = (2 if flags["allow_neg_eigval"] else 1) * told["beta"].sigmoid()
    if flags.get("use_gate_in_kernel"):
        told["g"] = -inputs["A_log"].exp() * F.softplus(inputs["g"] + inputs["dt_bias"])
    elif "g" in inputs:
        told["g"] = inputs["g"]
    return told


_L2 = {"use_qk_l2norm_in_kernel": True}
_IN_KERNEL = {
    **_L2,
    "use_gate_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
    "allow_neg_eigval": False,
    "state_v_first": True,
}
_NEGATIVE = {**_IN_KERNEL, "allow_neg_eigval": True}
_KDA = {**_IN_KERNEL, "lower_bound": None}
_V_FIRST = {"state_v_first": True}

OPERATORS = {
    "delta_net chunk": Case("fla.layers.delta_net:chunk_delta_rule", _plain, _delta_rule, _L2),
    "delta_net recurrent": Case("fla.layers.delta_net:fused_recurrent_delta_rule", _plain, _delta_rule, _L2),
    "gated_deltanet chunk": Case(
        "fla.layers.gated_deltanet:chunk_gated_delta_rule", _gated, _gated_rule(1), _IN_KERNEL
    ),
    "gated_deltanet chunk, negative eigenvalues": Case(
        "fla.layers.gated_deltanet:chunk_gated_delta_rule", _gated, _gated_rule(2), _NEGATIVE
    ),
    "gated_deltanet recurrent": Case(
        "fla.layers.gated_deltanet:fused_recurrent_gated_delta_rule",
        _gated,
        _gated_rule(1),
        _IN_KERNEL,
        backward=False,
    ),
    "gla chunk": Case("fla.layers.gla:chunk_gla", _gla("g"), _linear("g"), _V_FIRST),
    "gla recurrent": Case("fla.layers.gla:fused_recurrent_gla", _gla("gk"), _linear("gk"), _V_FIRST),
    "hgrn2 chunk": Case("fla.layers.hgrn2:chunk_gla", _gla("g"), _linear("g"), _V_FIRST),
    "hgrn2 recurrent": Case("fla.layers.hgrn2:fused_recurrent_gla", _gla("gk"), _linear("gk"), _V_FIRST),
    "kda chunk": Case("fla.layers.kda:chunk_kda", _kda, _gated_rule(1), {**_KDA, "safe_gate": False}),
    "kda recurrent": Case("fla.layers.kda:fused_recurrent_kda", _kda, _gated_rule(1), _KDA, backward=False),
    "gated_deltaproduct chunk": Case(
        "fla.layers.gated_deltaproduct:chunk_gated_delta_product",
        _product,
        _delta_product,
        {**_L2, "num_householder": HOUSEHOLDERS},
    ),
    "gated_deltaproduct recurrent": Case(
        "fla.layers.gated_deltaproduct:fused_recurrent_gated_delta_rule",
        _gated_by_hand,
        _delta_rule,
        _L2,
        backward=False,
    ),
}
