"""The (gated) delta rule one token at a time, written from its definition and nothing else."""

from __future__ import annotations

import torch


def l2_normalise(x: torch.Tensor) -> torch.Tensor:
    """``x / sqrt(sum(x^2) + 1e-6)`` over the last axis."""
    return x / torch.sqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)


def delta_rule_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    l2norm: bool = False,
    cu_seqlens: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token loop over ``[B, T, H, K]`` q and k, ``[B, T, HV, V]`` v, ``[B, T, HV]`` beta and log-decay g.

    Returns the outputs ``[B, T, HV, V]`` and the final states ``[N, HV, K, V]``. With ``cu_seqlens`` the one
    row holds N sequences, each starting from its own row of ``initial_state``.
    """
    if cu_seqlens is not None:
        parts = []
        for n, (start, end) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False)):
            cut = [None if x is None else x[:, start:end] for x in (q, k, v, beta, g)]
            state = None if initial_state is None else initial_state[n : n + 1]
            parts.append(delta_rule_reference(*cut, scale=scale, initial_state=state, l2norm=l2norm))
        return torch.cat([o for o, _ in parts], 1), torch.cat([s for _, s in parts], 0)
    groups = v.shape[2] // k.shape[2]
    q, k = q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2)
    if l2norm:
        q, k = l2_normalise(q), l2_normalise(k)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    state = q.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3]) if initial_state is None else initial_state
    outputs = []
    for t in range(v.shape[1]):
        if g is not None:
            state = state * g[:, t].exp()[..., None, None]
        recalled = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        correction = beta[:, t, :, None] * (v[:, t] - recalled)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], correction)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    out = torch.stack(outputs, 1) if outputs else v.new_zeros(v.shape)
    return out, state
