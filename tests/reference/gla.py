"""Gated linear attention one token at a time, written from its definition and nothing else."""

from __future__ import annotations

import torch


def gla_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    initial_state: torch.Tensor,
    cu_seqlens: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T``, ``o_t = S_t^T q_t / sqrt(K)``.

    q, k and the log-decay g are ``[B, T, H, K]``, v is ``[B, T, H, V]``. Returns the outputs ``[B, T, H, V]`` and the
    final states ``[N, H, K, V]``. With ``cu_seqlens`` the one row holds N sequences.
    """
    if cu_seqlens is not None:
        parts = [
            gla_reference(*(x[:, start:end] for x in (q, k, v, g)), initial_state=initial_state[n : n + 1])
            for n, (start, end) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False))
        ]
        return torch.cat([o for o, _ in parts], 1), torch.cat([s for _, s in parts], 0)
    state, outputs = initial_state, []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None] + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, 1), state
