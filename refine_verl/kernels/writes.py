"""How strongly each token rewrites the state of the (gated) delta rule, from operators that do not say so.

A token's write is ``k_t u_t^T`` with ``u_t = beta_t (v_t - r_t)``, and ``r_t = exp(g_t) S_{t-1}^T k_t`` is what the
decayed state recalls for its key. An operator's output is what the state *after* a token answers to its query; asked
for the key of the *next* token, it gives ``S_{t-1}^T k_t`` for all t in one call. (Asked for a token's own key, it
gives ``r_t + u_t |k_t|^2``; to get ``u_t`` from that one has to divide by ``1 - beta_t``, which may be 0.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from refine_verl.kernels.delta_rule import log_decay, step_size
from refine_verl.kernels.scan import L2_EPS

DELTA_RULES = (
    "chunk_delta_rule",
    "fused_recurrent_delta_rule",
    "chunk_gated_delta_rule",
    "fused_recurrent_gated_delta_rule",
)
"""Names of the operators, fla's and their stand-ins, that this is true of."""


def write_norms(
    operator: Callable[..., tuple[Tensor, Tensor | None]],
    tokens: Mapping[str, Tensor],
    options: Mapping[str, Any],
    state: Tensor | None,
) -> Tensor:
    """Frobenius norm of what each token writes, all heads together.

    Args:
        operator: one of `DELTA_RULES`.
        tokens: its arguments k ``[B, T, H, K]``, v ``[B, T, HV, V]``, maybe beta and g ``[B, T, HV]``.
        options: its other arguments but for q, ``cu_seqlens`` of packed sequences among them.
        state: before the first token, which nobody asked before: there must be none.

    Returns:
        ``[B * T]``, float32 or better.

    Raises:
        NotImplementedError: another operator, or a state before the first token.
    """
    if operator.__name__ not in DELTA_RULES or tokens.get("gk") is not None or state is not None:
        raise NotImplementedError(
            f"what the tokens of {operator.__module__}.{operator.__name__} write is known of "
            f"{', '.join(DELTA_RULES)} from the first token on only"
        )
    k, v, g, beta = tokens["k"], tokens["v"], tokens.get("g"), tokens.get("beta")
    asked = torch.cat([k[:, 1:], k[:, :1]], dim=1)  # the next token's key; nobody hears the last answer
    answers, _ = operator(**{**tokens, **options, "q": asked, "scale": 1.0}, output_final_state=False)
    dtype = torch.promote_types(v.dtype, torch.float32)
    recalled = answers.to(dtype).roll(1, dims=1)
    recalled.flatten(0, 1).index_fill_(0, _first_tokens(v, options.get("cu_seqlens")), 0)
    if g is not None:
        gated = options.get("use_gate_in_kernel")
        decay = log_decay(g, options["A_log"], options.get("dt_bias")) if gated else g.to(dtype)
        recalled = recalled * decay.exp().unsqueeze(-1)
    norms = torch.linalg.vector_norm(v.to(dtype) - recalled, dim=-1)
    if beta is not None:
        flags = (bool(options.get(name)) for name in ("use_beta_sigmoid_in_kernel", "allow_neg_eigval"))
        norms = norms * step_size(beta, *flags).abs()
    lengths = torch.linalg.vector_norm(k, dim=-1, dtype=dtype)
    if options.get("use_qk_l2norm_in_kernel"):
        lengths = lengths * (lengths * lengths + L2_EPS).rsqrt()
    return torch.linalg.vector_norm(norms * lengths.repeat_interleave(v.shape[2] // k.shape[2], dim=2), dim=2).flatten()


def _first_tokens(v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Where sequences begin, among all tokens: int64."""
    if cu_seqlens is not None:
        return cu_seqlens[:-1].long()
    return torch.arange(v.shape[0], device=v.device) * v.shape[1]
