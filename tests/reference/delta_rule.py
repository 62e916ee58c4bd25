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

    g may also be ``[B, T, HV, K]``, a decay for every entry of a key.

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
            decay = g[:, t].exp()
            state = state * (decay[..., None] if g.dim() == 4 else decay[..., None, None])
        recalled = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        correction = beta[:, t, :, None] * (v[:, t] - recalled)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], correction)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    out = torch.stack(outputs, 1) if outputs else v.new_zeros(v.shape)
    return out, state


def write_norms_reference(
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None = None,
    *,
    l2norm: bool = False,
    cu_seqlens: list[int] | None = None,
) -> torch.Tensor:
    """How much further than its decay each token moves the states of all heads, ``[B * T]``: a loop over tokens."""
    batch, total = k.shape[:2]
    firsts = [0] if cu_seqlens is None else cu_seqlens[:-1]
    state = k.new_zeros(batch, v.shape[2], k.shape[3], v.shape[3])
    norms = []
    for t in range(total):
        before = state.zero_() if t in firsts else state
        one = [None if x is None else x[:, t : t + 1] for x in (k, k, v, beta, g)]
        _, state = delta_rule_reference(*one, initial_state=before, l2norm=l2norm)
        decayed = before if g is None else before * g[:, t].exp()[..., None, None]
        norms.append((state - decayed).square().sum(dim=(1, 2, 3)).sqrt())
    return torch.stack(norms, dim=1).flatten()
