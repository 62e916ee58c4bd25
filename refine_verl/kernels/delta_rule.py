"""CPU stand-ins for ``fla.ops.delta_rule`` and ``fla.ops.gated_delta_rule``: the recurrences of DeltaNet and Gated
DeltaNet, with fla's signatures."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from refine_verl.kernels.chunking import chunk_plan, sequence_lengths
from refine_verl.kernels.recording import active_recorder
from refine_verl.kernels.scan import ScanSettings, delta_scan


def check_unknown(name: str, unknown: dict[str, Any]) -> None:
    """Refuse keyword arguments that would change the result; ``None`` and ``False`` cannot.

    Raises:
        NotImplementedError: naming the operator and the arguments.
    """
    refused = sorted(key for key, value in unknown.items() if value is not None and value is not False)
    if refused:
        raise NotImplementedError(f"{name} on the CPU does not support the argument(s) {', '.join(refused)}")


def run_scan(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor | None,
    g: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool | None = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    chunk_size: int | None = None,
    **unknown: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Check shapes, plan the chunks and run `delta_scan`; shared by the plain and the gated rule.

    Raises:
        ValueError: for shapes that do not fit together, with the shapes.
        NotImplementedError: for an argument that has no CPU implementation.
    """
    del cu_seqlens_cpu  # accepted for fla's signature: everything is on the CPU
    check_unknown(name, unknown)
    beta = torch.ones_like(v[..., 0]) if beta is None else beta
    if beta.shape != v.shape[:3]:
        raise ValueError(f"{name}: beta must be [B, T, heads] = {list(v.shape[:3])}, got {list(beta.shape)}")
    lengths = sequence_lengths(q.shape[0], q.shape[1], cu_seqlens)
    expected = (len(lengths), v.shape[2], k.shape[3], v.shape[3])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(
            f"{name}: initial_state must hold one [K, V] state per sequence and head, {list(expected)}, "
            f"got {list(initial_state.shape)}"
        )
    settings = ScanSettings(
        plan=chunk_plan(lengths, chunk=chunk_size, head_dim=k.shape[3], device=k.device),
        scale=k.shape[3] ** -0.5 if scale is None else scale,
        l2norm=use_qk_l2norm_in_kernel,
        dtype=torch.promote_types(v.dtype, torch.float32),
    )
    return delta_scan(q, k, v, beta, g, initial_state, settings, bool(output_final_state))


def chunk_delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Delta rule ``S_t = S_{t-1} + k_t (beta_t (v_t - S_{t-1}^T k_t))^T``, ``o_t = scale * S_t^T q_t``.

    Args:
        q, k: ``[B, T, H, K]``, float32, float64 or bfloat16. Unlike fla's Triton kernel, float32 is welcome.
        v: ``[B, T, H, V]``.
        beta: ``[B, T, H]`` step sizes.
        **options: fla's other arguments, by name:
            ``scale``: factor on the output, ``K ** -0.5`` by default;
            ``initial_state``: ``[N, H, K, V]``, zeros by default;
            ``output_final_state``: whether to return the states after the last tokens;
            ``use_qk_l2norm_in_kernel``: normalise q and k to unit length first;
            ``cu_seqlens``: ``[N + 1]`` bounds of the sequences packed into the one row (B = 1);
            ``chunk_size``: tokens per chunk, chosen from the lengths by default.
            Others are refused unless ``None`` or ``False``.

    Returns:
        ``o`` ``[B, T, H, V]`` in v's dtype and the final state ``[N, H, K, V]`` (float32; float64 for float64
        inputs) or ``None``. Both are differentiable with respect to q, k, v, beta and the initial state.

    Raises:
        ValueError: if shapes do not fit together.
        NotImplementedError: for an argument that has no CPU implementation.
    """
    return run_scan("chunk_delta_rule", q, k, v, beta, **options)


def fused_recurrent_delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor | None = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same rule under the name fla's layer calls for 64 tokens or fewer; ``beta`` defaults to ones.

    See `chunk_delta_rule`. On the CPU both names run the same chunked code, so switching between them does
    not change the result, and neither needs a contiguous state or one that requires grad.
    """
    return run_scan("fused_recurrent_delta_rule", q, k, v, beta, **options)


def log_decay(g: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor | None) -> torch.Tensor:
    """Log-decay ``-exp(A_log) * softplus(g + dt_bias)``, ``[B, T, HV]``, from the raw gate."""
    dtype = torch.promote_types(g.dtype, torch.float32)
    raw = g.to(dtype) if dt_bias is None else g.to(dtype) + dt_bias.to(dtype)
    return -A_log.to(dtype).exp() * F.softplus(raw)


def step_size(beta: torch.Tensor, sigmoid: bool, allow_neg_eigval: bool) -> torch.Tensor:
    """Step sizes ``[B, T, HV]`` from an operator's argument ``beta``; with ``sigmoid`` that holds their logits."""
    if not sigmoid:
        return beta
    size = beta.to(torch.promote_types(beta.dtype, torch.float32)).sigmoid()
    return size * 2 if allow_neg_eigval else size


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
    beta = step_size(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
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
