"""Chunked (gated) delta rule in plain PyTorch, forward and backward.

Per head, with a state ``S`` of shape ``[K, V]``, log-decay ``g_t <= 0`` and step size ``beta_t``:

    S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T,      o_t = scale * S_t^T q_t

A chunk of C tokens that starts from state ``S`` is solved at once (the WY form). With ``b`` the running sum
of ``g`` in the chunk, ``D_ij = exp(b_i - b_j)``, ``L = tril(K K^T * D, -1)`` and
``P = scale * tril(Q K^T * D)``:

    U  = (I + diag(beta) L)^{-1} diag(beta) (V - exp(b) K S)       the C rank-one writes
    O  = scale * exp(b) Q S + P U
    S' = exp(b_C) S + (exp(b_C - b) K)^T U

Everything inside the chunks is batched over all chunks of all sequences; only ``U`` and ``S'`` are
sequential, over the chunks of the longest sequence. ``g = None`` (plain delta rule) skips all factors
``exp(...)``.

The backward pass is written by hand: autograd would keep about a dozen chunk-sized tensors per layer, this
keeps normalised q and k, v, the chunk states and the inverse, and recomputes the rest. The sequential part
then runs from the last chunk to the first with two small products per chunk and gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from refine_verl.kernels.chunking import ChunkPlan, from_chunks
from refine_verl.kernels.recording import Kept, RowGradients, ScanHistory, active_recorder

L2_EPS = 1e-6
"""``x / sqrt(sum(x^2) + eps)``, the constant of fla's fused normalisation."""


@dataclass(frozen=True, kw_only=True)
class ScanSettings:
    """What one call of the scan needs besides tensors."""

    plan: ChunkPlan
    scale: float
    l2norm: bool
    dtype: torch.dtype


@dataclass(kw_only=True)
class _Chunks:
    """Inputs in chunk layout: ``M = chunks * heads`` independent matrices, in the compute dtype."""

    q: torch.Tensor  # [M, C, K], times scale (and normalised)
    k: torch.Tensor  # [M, C, K]
    v: torch.Tensor  # [M, C, V]
    beta: torch.Tensor  # [M, C, 1]
    decay: torch.Tensor | None  # [M, C, 1], running sum of g inside the chunk
    q_rstd: torch.Tensor | None  # [M, C, 1], factor from the caller's q to the stored one
    k_rstd: torch.Tensor | None

    def read_keys(self) -> torch.Tensor:
        """``exp(b) K``: what reads the chunk's initial state."""
        return self.k if self.decay is None else self.k * self.decay.exp()

    def write_keys(self) -> torch.Tensor:
        """``exp(b_C - b) K``: what writes into the chunk's final state."""
        return self.k if self.decay is None else self.k * (self.decay[:, -1:] - self.decay).exp_()

    def read_queries(self) -> torch.Tensor:
        """``exp(b) Q``."""
        return self.q if self.decay is None else self.q * self.decay.exp()

    def pair_decay(self) -> torch.Tensor | None:
        """``D_ij = exp(b_i - b_j)`` for i >= j, 1 elsewhere: those are masked by whoever uses it."""
        return None if self.decay is None else (self.decay - self.decay.mT).clamp_(max=0).exp_()

    def chunk_decay(self) -> torch.Tensor | None:
        """``exp(b_C)``, ``[M, 1, 1]``."""
        return None if self.decay is None else self.decay[:, -1:].exp()


def _rows(x: torch.Tensor, plan: ChunkPlan) -> torch.Tensor:
    """Bring ``[B, T, H, D]`` rows into slot order; ragged plans give one row with one slot per entry."""
    return x if plan.gather is None else x.flatten(0, 1).index_select(0, plan.gather).unsqueeze(0)


def _layout(x: torch.Tensor, chunk: int) -> torch.Tensor:
    """View ``[B, T, H, D]`` as ``[T / chunk, B, H, chunk, D]``."""
    rows, tokens, heads, width = x.shape
    return x.reshape(rows, tokens // chunk, chunk, heads, width).permute(1, 0, 3, 2, 4)


def _to_chunks(x: torch.Tensor, chunk: int, dtype: torch.dtype, groups: int = 1) -> torch.Tensor:
    """Copy ``[B, T, H, D]`` rows into contiguous ``[M, chunk, D]``, each head repeated ``groups`` times."""
    source = _layout(x, chunk).unsqueeze(3)
    steps, batch, heads, _, _, width = source.shape
    out = x.new_empty((steps, batch, heads, groups, chunk, width), dtype=dtype)
    return out.copy_(source).view(-1, chunk, width)


def _scaled_to_chunks(
    x: torch.Tensor, settings: ScanSettings, scale: float, groups: int, keep: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Normalise and scale ``[B, T, H, K]`` rows into ``[M, chunk, K]``; ``keep`` the factors, too."""
    chunk = settings.plan.chunk
    if not settings.l2norm:
        out = _to_chunks(x, chunk, settings.dtype, groups)
        return (out if scale == 1.0 else out.mul_(scale)), None
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=settings.dtype)
    # scale / sqrt(norm^2 + eps), with the scale under the root: two small operations instead of four.
    rstd = torch.addcmul(norm.new_full((), L2_EPS / scale**2), norm, norm, value=scale**-2).rsqrt_()
    source, factor = _layout(x, chunk).unsqueeze(3), _layout(rstd, chunk).unsqueeze(3)
    steps, batch, heads, _, _, width = source.shape
    out = x.new_empty((steps, batch, heads, groups, chunk, width), dtype=settings.dtype)
    torch.mul(source if groups == 1 else source.expand_as(out), factor, out=out)
    return out.view(-1, chunk, width), (_to_chunks(rstd, chunk, settings.dtype, groups) if keep else None)


def _scalar_chunks(x: torch.Tensor, settings: ScanSettings) -> torch.Tensor:
    """Bring ``[B, T, H]`` scalars into ``[M, chunk, 1]``, zero at padding slots."""
    rows = _rows(x.unsqueeze(-1), settings.plan)
    if settings.plan.padding is not None:
        # beta = 0 makes a padding token write nothing, g = 0 makes it decay nothing.
        rows = rows.masked_fill(settings.plan.padding.view(1, -1, 1, 1), 0)
    return _to_chunks(rows, settings.plan.chunk, settings.dtype)


def _prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    settings: ScanSettings,
    keep: bool,
) -> _Chunks:
    """Lay the inputs out in chunks; ``keep`` says whether a backward pass will follow."""
    plan, groups = settings.plan, v.shape[2] // k.shape[2]
    q_chunks, q_rstd = _scaled_to_chunks(_rows(q, plan), settings, settings.scale, groups, keep)
    k_chunks, k_rstd = _scaled_to_chunks(_rows(k, plan), settings, 1.0, groups, keep)
    return _Chunks(
        q=q_chunks,
        k=k_chunks,
        v=_to_chunks(_rows(v, plan), plan.chunk, settings.dtype),
        beta=_scalar_chunks(beta, settings),
        decay=None if g is None else _scalar_chunks(g, settings).cumsum_(1),
        q_rstd=q_rstd,
        k_rstd=k_rstd,
    )


def _lower(products: torch.Tensor, pair_decay: torch.Tensor | None, diagonal: int) -> torch.Tensor:
    """``tril(products * D, diagonal)`` in place."""
    if pair_decay is not None:
        products.mul_(pair_decay)
    return products.tril_(diagonal)


def _solve(keys: torch.Tensor, beta: torch.Tensor, pair_decay: torch.Tensor | None) -> torch.Tensor:
    """``(I + diag(beta) L)^{-1}``, ``[M, C, C]``."""
    if keys.shape[1] == 1:
        return torch.ones_like(beta)
    lower = torch.bmm(keys, keys.mT).mul_(beta)
    if pair_decay is not None:
        lower.mul_(pair_decay)
    eye = torch.eye(keys.shape[1], dtype=keys.dtype, device=keys.device)
    # unitriangular: the diagonal and what lies above are never read.
    return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False, unitriangular=True)


def _forward(
    x: _Chunks, state: torch.Tensor, plan: ChunkPlan, want_final: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the scan.

    Args:
        x: inputs in chunk layout.
        state: ``[n, H, K, V]`` initial states in plan order.
        plan: the layout.
        want_final: whether the final states are needed.

    Returns:
        Outputs ``[M, C, V]``; final states ``[n, H, K, V]`` in plan order or ``None``; the state before every
        chunk ``[M, K, V]``; the inverse ``[M, C, C]``; the writes U ``[M, C, V]``.
    """
    pair_decay = x.pair_decay()
    inverse = _solve(x.k, x.beta, pair_decay)
    solve = inverse * x.beta.mT
    run = _one_step if plan.active == (len(state),) else _all_steps
    writes, states, final = run(x, solve, state, plan, want_final)
    # Here and in the backward pass, chunk-sized buffers are used again where they can be: a fresh one costs a
    # page fault per 4 KiB, often more than the arithmetic that fills it.
    scores = _lower(torch.bmm(x.q, x.k.mT, out=solve), pair_decay, 0)
    out = torch.bmm(scores, writes).baddbmm_(x.read_queries(), states)
    return out, final, states, inverse, writes


def _one_step(
    x: _Chunks, solve: torch.Tensor, state: torch.Tensor, plan: ChunkPlan, want_final: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`_all_steps` where every sequence is one chunk (short segments, decoding): no copies of the state."""
    states, gamma = state.flatten(0, 1), x.chunk_decay()
    writes = torch.bmm(solve, torch.baddbmm(x.v, x.read_keys(), states, alpha=-1))
    if not want_final:
        return writes, states, None
    decayed = states if gamma is None else states * gamma
    return writes, states, torch.baddbmm(decayed, x.write_keys().mT, writes).view_as(state)


def _all_steps(
    x: _Chunks, solve: torch.Tensor, state: torch.Tensor, plan: ChunkPlan, want_final: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the writes U ``[M, C, V]``, the state before each chunk ``[M, K, V]`` and the final states."""
    heads, active, gamma = state.shape[1], plan.active, x.chunk_decay()
    read, write = x.read_keys(), x.write_keys().mT
    writes = torch.empty_like(x.v)
    states = x.v.new_empty(x.v.shape[0], *state.shape[2:])
    final = state.clone() if want_final else None
    sizes = [count * heads for count in active]
    views = [t.split(sizes) for t in (states, writes, solve, x.v, read, write)]
    decays = gamma.split(sizes) if gamma is not None else None
    if sizes:
        views[0][0].copy_(state[: active[0]].flatten(0, 1))
    for i, (before, write_i, solve_i, v_i, read_i, keys_i) in enumerate(zip(*views, strict=True)):
        torch.bmm(solve_i, torch.baddbmm(v_i, read_i, before, alpha=-1), out=write_i)
        following = active[i + 1] if i + 1 < len(sizes) else 0
        if following == 0 and final is None:
            break
        decayed = before if decays is None else before * decays[i]
        if following == active[i]:
            torch.baddbmm(decayed, keys_i, write_i, out=views[0][i + 1])
            continue
        after = torch.baddbmm(decayed, keys_i, write_i)
        if following:
            views[0][i + 1].copy_(after[: following * heads])
        if final is not None:
            final[following : active[i]] = after[following * heads :].view(-1, *state.shape[1:])
    return writes, states, final


def _backward_states(
    x: _Chunks,
    inverse: torch.Tensor,
    d_writes: torch.Tensor,
    d_read: torch.Tensor,
    d_final: torch.Tensor | None,
    plan: ChunkPlan,
    shape: torch.Size,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the sequential part of the backward pass, last chunk first.

    Args:
        x: inputs in chunk layout.
        inverse: ``(I + diag(beta) L)^{-1}``, ``[M, C, C]``.
        d_writes: ``[M, C, V]``, the part of the gradient of ``U`` that came through ``O``. Completed in
        place.
        d_read: ``[M, K, V]``, the part of the gradient of each chunk's initial state that came through ``O``.
        d_final: ``[n, H, K, V]`` gradient of the final states in plan order, or ``None``.
        plan: the layout.
        shape: shape ``[n, H, K, V]`` of the initial states.

    Returns:
        ``d_after`` ``[M, K, V]``: gradient of the state after each chunk. ``d_rhs`` ``[M, C, V]``: inverse^T
        dU. ``d_state`` ``[n, H, K, V]``: gradient of the initial states.
    """
    heads, active = shape[1], plan.active
    d_after, d_rhs = torch.empty_like(d_read), torch.empty_like(d_writes)
    d_state = d_writes.new_zeros(shape) if d_final is None else d_final.clone()
    read, write, gamma = x.read_keys().mT, x.write_keys(), x.chunk_decay()
    sizes = [count * heads for count in active]
    tensors = (d_after, d_rhs, d_writes, d_read, inverse.mT, x.beta, read, write)
    views = [t.split(sizes) for t in tensors]
    decays = gamma.split(sizes) if gamma is not None else None
    for i in reversed(range(len(sizes))):
        after, rhs, dw_i, dr_i, inv_i, beta_i, read_i, write_i = (view[i] for view in views)
        # Rows beyond those of step i + 1 hold the gradient of their sequence's final state.
        after.copy_(d_state[: active[i]].flatten(0, 1))
        torch.bmm(inv_i, dw_i.baddbmm_(write_i, after), out=rhs)
        before = after if decays is None else after * decays[i]
        current = torch.baddbmm(dr_i, read_i, rhs * beta_i, alpha=-1).add_(before)
        d_state[: active[i]] = current.view(-1, *shape[1:])
    return d_after, d_rhs, d_state


def _backward(
    x: _Chunks,
    states: torch.Tensor,
    inverse: torch.Tensor,
    d_out: torch.Tensor,
    d_final: torch.Tensor | None,
    plan: ChunkPlan,
    shape: torch.Size,
    waiting: RowGradients,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Return the gradients of q, k, v, beta, g (stored ones, chunk layout) and of the initial states.

    ``waiting`` holds the gradients that came through a `ScanHistory`.
    """
    pair_decay = x.pair_decay()
    lower = _lower(torch.bmm(x.k, x.k.mT), pair_decay, -1)
    residual = torch.baddbmm(x.v, x.read_keys(), states, alpha=-1)
    d_writes = residual * x.beta
    writes = torch.bmm(inverse, d_writes)
    scores = _lower(torch.bmm(x.q, x.k.mT), pair_decay, 0)
    torch.bmm(scores.mT, d_out, out=d_writes)
    d_before = torch.bmm(x.read_queries().mT, d_out)
    waiting.add_to(d_writes, "writes")
    waiting.add_to(d_before, "states")
    d_after, d_rhs, d_state = _backward_states(x, inverse, d_writes, d_before, d_final, plan, shape)
    del d_writes
    d_lower = torch.bmm(d_rhs, writes.mT)  # up to the factor -beta
    d_beta = residual.mul_(d_rhs).sum(-1, keepdim=True).sub_(lower.mul_(d_lower).sum(-1, keepdim=True))
    del residual
    d_v = d_rhs.mul_(x.beta)
    d_lower = _lower(d_lower.mul_(-x.beta), pair_decay, -1)
    d_scores = _lower(torch.bmm(d_out, writes.mT, out=scores), pair_decay, 0)
    d_write = torch.bmm(writes, d_after.mT)
    d_q, d_read = torch.bmm(d_out, states.mT), torch.bmm(d_v, states.mT)
    if x.decay is None:
        d_q.baddbmm_(d_scores, x.k)
        symmetric = lower.copy_(d_lower.mT).add_(d_lower)
        d_k = d_write.sub_(d_read).baddbmm_(d_scores.mT, x.q).baddbmm_(symmetric, x.k)
        return d_q, waiting.add_to(d_k, "k"), d_v, d_beta, None, d_state
    growth = x.decay.exp()
    d_write.mul_((x.decay[:, -1:] - x.decay).exp_())
    d_chunk = (states * d_after).sum((1, 2), keepdim=True).mul_(growth[:, -1:])
    d_chunk.add_((x.k * d_write).sum((1, 2), keepdim=True))
    d_q.mul_(growth).baddbmm_(d_scores, x.k)
    # Keys act in two roles, with decay exp(b) when they read and exp(-b) when they write; hence the gradient
    # of b.
    d_read.mul_(growth.neg_()).baddbmm_(d_lower, x.k)
    d_write.baddbmm_(d_scores.mT, x.q).baddbmm_(d_lower.mT, x.k)
    d_decay = (x.q * d_q).sum(-1, keepdim=True).add_((x.k * (d_read - d_write)).sum(-1, keepdim=True))
    d_decay[:, -1:] += d_chunk
    d_g = waiting.add_to(d_decay, "decay").flip(1).cumsum(1).flip(1)  # b is a running sum of g
    return d_q, waiting.add_to(d_write.add_(d_read), "k"), d_v, d_beta, d_g, d_state


def _undo_norm(d: torch.Tensor, stored: torch.Tensor, rstd: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Gradient of the caller's q or k from that of ``scale * x / |x|`` (or ``scale * x``), in place."""
    if rstd is None:
        return d if scale == 1.0 else d.mul_(scale)
    along = (stored * d).sum(-1, keepdim=True).div_(-scale * scale)
    return d.addcmul_(stored, along).mul_(rstd)


class _Scan(torch.autograd.Function):
    """Autograd wrapper; see `delta_scan`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        beta: torch.Tensor,
        g: torch.Tensor | None,
        state: torch.Tensor,
        settings: ScanSettings,
        want_final: bool,
        kept: dict[str, torch.Tensor] | None,
        waiting: RowGradients,
    ) -> tuple[torch.Tensor | None, ...]:
        with torch.autocast(q.device.type, enabled=False):
            x = _prepare(q, k, v, beta, g, settings, True)
            out, final, states, inverse, writes = _forward(x, state, settings.plan, want_final)
            rows = from_chunks(out, v.shape, settings.plan).to(v.dtype)
        ctx.settings, ctx.state_shape, ctx.waiting = settings, state.shape, waiting
        ctx.shapes = [(t.shape, t.dtype) for t in (q, k, v, beta)] + [None if g is None else (g.shape, g.dtype)]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x.q, x.k, x.v, x.beta, x.decay, x.q_rstd, x.k_rstd, states, inverse)
        if kept is None:
            return rows, final, None
        kept.update(_kept(x, writes, states))
        return rows, final, rows.new_empty(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, d_rows: torch.Tensor | None, d_final: torch.Tensor | None, d_handle: torch.Tensor | None
    ) -> tuple[Any, ...]:
        # what came through the handle waits in ctx.waiting
        settings, plan = ctx.settings, ctx.settings.plan
        *fields, states, inverse = ctx.saved_tensors
        x = _Chunks(**dict(zip(("q", "k", "v", "beta", "decay", "q_rstd", "k_rstd"), fields, strict=True)))
        with torch.autocast(x.q.device.type, enabled=False):
            if d_rows is None:
                d_out = torch.zeros_like(x.v)
            else:
                d_out = _to_chunks(_rows(d_rows, plan), plan.chunk, settings.dtype)
                if plan.padding is not None:
                    d_out.view(-1, ctx.state_shape[1], plan.chunk, d_out.shape[-1]).masked_fill_(
                        plan.padding.view(-1, 1, plan.chunk, 1), 0
                    )
            d_q, d_k, d_v, d_beta, d_g, d_state = _backward(
                x, states, inverse, d_out, d_final, plan, ctx.state_shape, ctx.waiting
            )
            d_q = _undo_norm(d_q, x.q, x.q_rstd, settings.scale)
            d_k = _undo_norm(d_k, x.k, x.k_rstd, 1.0)
        grads = [
            None if d is None else _restore(d, shape_dtype, plan, ctx.state_shape[1])
            for d, shape_dtype in zip((d_q, d_k, d_v, d_beta, d_g), ctx.shapes, strict=True)
        ]
        return *grads, d_state, None, None, None, None


def _kept(x: _Chunks, writes: torch.Tensor, states: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a `ScanHistory` needs."""
    return {"k": x.k, "writes": writes, "states": states} | ({} if x.decay is None else {"decay": x.decay})


def _restore(d: torch.Tensor, like: tuple[torch.Size, torch.dtype], plan: ChunkPlan, heads: int) -> torch.Tensor:
    """Bring a gradient from chunk layout to the shape and dtype of its input."""
    shape, dtype = like
    full = shape if len(shape) == 4 else torch.Size((*shape, 1))
    return from_chunks(d, full, plan, heads // shape[2]).view(shape).to(dtype)


def delta_scan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    state: torch.Tensor | None,
    settings: ScanSettings,
    want_final: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the (gated) delta rule over whole sequences.

    Args:
        q, k: ``[B, T, H, K]``.
        v: ``[B, T, HV, V]`` with ``HV`` a multiple of ``H``; each group of ``HV / H`` value heads shares a
        key head.
        beta: ``[B, T, HV]``.
        g: ``[B, T, HV]`` log-decay, at most 0, or ``None`` for the plain delta rule.
        state: ``[n, HV, K, V]`` initial states, one per sequence of the plan, or ``None`` for zeros.
        settings: plan, scale, normalisation and compute dtype.
        want_final: whether to return the final states.

    Returns:
        Outputs ``[B, T, HV, V]`` in v's dtype; final states ``[n, HV, K, V]`` in the compute dtype, or
        ``None``. Both are differentiable (once) with respect to every tensor argument.
    """
    plan = settings.plan
    if state is None:
        state = v.new_zeros((plan.sequences, v.shape[2], k.shape[3], v.shape[3]), dtype=settings.dtype)
    else:
        state = state.to(settings.dtype)
        if plan.order is not None:
            state = state.index_select(0, plan.order)
    tensors = (q, k, v, beta, g, state)
    recorder = active_recorder() if want_final else None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        waiting = RowGradients()
        tensors_kept: dict[str, torch.Tensor] | None = None if recorder is None else {}
        out, final, handle = _Scan.apply(*tensors, settings, want_final, tensors_kept, waiting)
        kept = Kept(tensors_kept or {}, handle, waiting)
    else:
        with torch.autocast(q.device.type, enabled=False):
            x = _prepare(q, k, v, beta, g, settings, False)
            chunks, final, states, _, writes = _forward(x, state, plan, want_final)
            out = from_chunks(chunks, v.shape, plan).to(v.dtype)
        kept = Kept(_kept(x, writes, states))
    if final is not None and plan.inverse is not None:
        final = final.index_select(0, plan.inverse)
    if recorder is not None and final is not None:
        recorder.add(final, ScanHistory(plan, v.shape[:3], kept))
    return out, final
