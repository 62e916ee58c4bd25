"""CPU stand-ins for ``fla.ops.gated_delta_rule``: Gated DeltaNet's recurrence, with fla's signatures."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from refine_verl.kernels.delta_rule import run_scan
from refine_verl.kernels.recording import active_recorder


def log_decay(g: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor | None) -> torch.Tensor:
    """Log-decay ``-exp(A_log) * softplus(g + dt_bias)``, ``[B, T, HV]``, from the raw gate."""
    dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
    raw = g.to(dtype) if dt_bias is None else g.to(dtype) + dt_bias.to(dtype)
    return -A_log.to(dtype).exp() * F.softplus(raw)


def _gated(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor | None,
    *,
    initial_state: torch.Tensor | None = None,
    use_gate_in_kernel: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    chunk_indices: torch.Tensor | None = None,
    **scan: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Apply gate, sigmoid and state layout around the shared scan."""
    del chunk_indices  # accepted for fla's signature and not needed here
    if v.shape[2] % k.shape[2]:
        raise ValueError(f"{name}: {v.shape[2]} value heads cannot be grouped over {k.shape[2]} key heads")
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise ValueError(f"{name}: allow_neg_eigval=True requires use_beta_sigmoid_in_kernel=True")
    if use_gate_in_kernel:
        if A_log is None or g is None:
            raise ValueError(f"{name}: use_gate_in_kernel=True requires g (the raw gate) and A_log")
        g = log_decay(g, A_log, dt_bias)
    beta = torch.ones_like(v[..., 0]) if beta is None else beta
    if use_beta_sigmoid_in_kernel:
        beta = beta.to(torch.promote_types(beta.dtype, torch.float32)).sigmoid()
        beta = beta * 2 if allow_neg_eigval else beta
    if initial_state is not None and state_v_first:
        initial_state = initial_state.transpose(-1, -2)
    out, final = run_scan(name, q, k, v, beta, g, initial_state=initial_state, **scan)
    if final is not None and state_v_first:
        as_stored = final.transpose(-1, -2).contiguous()
        if (recorder := active_recorder()) is not None:
            recorder.add_transposed(as_stored, final)
        final = as_stored
    return out, final


def chunk_gated_delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gated delta rule: `chunk_delta_rule` whose state first decays by ``exp(g_t)`` at every token.

    Args:
        q, k: ``[B, T, H, K]``.
        v: ``[B, T, HV, V]``, ``HV`` a multiple of ``H``: value heads ``j*HV/H ... (j+1)*HV/H - 1`` use key
        head j.
        g: ``[B, T, HV]`` log-decay, or the raw gate with ``use_gate_in_kernel``.
        beta: ``[B, T, HV]`` step sizes, or their logits with ``use_beta_sigmoid_in_kernel``.
        **options: those of `chunk_delta_rule`, and
            ``initial_state``: ``[N, HV, K, V]`` (``[N, HV, V, K]`` with ``state_v_first``), zeros by default;
            ``use_beta_sigmoid_in_kernel``: apply a sigmoid to beta; with ``allow_neg_eigval``, twice the sigmoid;
            ``state_v_first``: layout of both states;
            ``use_gate_in_kernel``: log-decay is ``-exp(A_log) * softplus(g + dt_bias)``, ``A_log`` and
            ``dt_bias`` being ``[HV]``.
            Others (fla's ``cp_context``, say) are refused unless ``None`` or ``False``.

    Returns:
        ``o`` ``[B, T, HV, V]`` in v's dtype and the final state (float32; float64 for float64 inputs) or
        ``None``. Both are differentiable with respect to every tensor argument.

    Raises:
        ValueError: if shapes or flags do not fit together.
        NotImplementedError: for an argument that has no CPU implementation.
    """
    return _gated("chunk_gated_delta_rule", q, k, v, g, beta, **options)


def fused_recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same rule under the name fla's layer calls for short inputs without grad; unlike there,
    differentiable.

    See `chunk_gated_delta_rule`. ``g`` may be ``None`` (no decay) and ``beta`` defaults to ones. The
    per-channel decays ``gk`` and ``gv`` have no CPU implementation.
    """
    return _gated("fused_recurrent_gated_delta_rule", q, k, v, g, beta, **options)
