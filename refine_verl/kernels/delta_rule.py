"""CPU stand-ins for ``fla.ops.delta_rule``: DeltaNet's recurrence, with fla's signatures."""

from __future__ import annotations

from typing import Any

import torch

from refine_verl.kernels.chunking import chunk_plan, sequence_lengths
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
        plan=chunk_plan(lengths, chunk=chunk_size, head_dim=k.shape[3]),
        scale=k.shape[3] ** -0.5 if scale is None else scale,
        l2norm=use_qk_l2norm_in_kernel,
        dtype=torch.float64 if v.dtype == torch.float64 else torch.float32,
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
