"""The fast weights of LaCT: reading them, and the update they get from a chunk of tokens.

Per sequence and head there are three matrices, f_W(u) = W1 (silu(W0 u) * (W2 u)). A chunk of C tokens with keys k_t,
values v_t and learning rates makes them take a step on the inner loss L = -sum_t <f_W(k_t), v_t>:

    G_i = -dL/dW_i with the columns' rates inside the sum,   M_i <- G_i + mu M_i,   U_i = NS(M_i) or M_i,
    W_i <- n_i (W_i + U_i) / |W_i + U_i|   row by row, with n_i the row norms of the initial W_i.

Shapes: U sets of weights, A sequences that finish a chunk, h heads, M tokens, d features of a head, e inner features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from refine_verl.models.lact.configuration import LaCTConfig
from refine_verl.nsp.entropy import accumulation_dtype

Matrices: TypeAlias = tuple[Tensor, Tensor, Tensor]
EPSILON = 1e-5
NS_EPSILON = 1e-7
NS_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


class FastWeights(NamedTuple):
    """U sets of fast weights, at least float32.

    Attributes:
        used: W0, W2 [U, h, e, d] and W1 [U, h, d, e], in the order W0, W1, W2.
        main: the un-normalised weights of the pre-norm variant, else None.
        momentum: M_i, None before the first update or without momentum.
    """

    used: Matrices
    main: Matrices | None = None
    momentum: Matrices | None = None

    def select(self, rows: Sequence[int]) -> FastWeights:
        """The sets at ``rows``; itself if these are all of them in order."""
        if list(rows) == list(range(len(self.used[0]))):
            return self
        index = torch.tensor(list(rows)).to(self.used[0].device, non_blocking=True)
        return FastWeights(*pytree.tree_map_only(Tensor, lambda w: w.index_select(0, index), tuple(self)))

    @staticmethod
    def join(parts: Sequence[FastWeights]) -> FastWeights:
        """Several lots of sets joined into one; a missing momentum is zero."""
        if len(parts) == 1:
            return parts[0]
        momentum = None
        if any(part.momentum is not None for part in parts):
            momentum = _cat([part.momentum or _each(part.used, torch.zeros_like) for part in parts])
        mains = [part.main for part in parts if part.main is not None]
        return FastWeights(_cat([part.used for part in parts]), _cat(mains) if mains else None, momentum)


class ChunkTokens(NamedTuple):
    """What the update takes from the tokens of a chunk.

    Attributes:
        k, v: fast keys and values [..., h, d].
        rates: [..., h, 3 * lr_dim], those of W0, W1, W2 concatenated; at least float32.
        momentum: m in (0, 1) [..., h], None without momentum.
    """

    k: Tensor
    v: Tensor
    rates: Tensor
    momentum: Tensor | None


def _each(matrices: Matrices, function: Callable[[Tensor], Tensor]) -> Matrices:
    w0, w1, w2 = (function(matrix) for matrix in matrices)
    return w0, w1, w2


def _cat(parts: Sequence[Matrices]) -> Matrices:
    w0, w1, w2 = (torch.cat(column) for column in zip(*parts, strict=True))
    return w0, w1, w2


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """In the dtype of the tokens (that of autocast where it is on), which may be less than the weights'."""
    return torch.matmul(a, b.to(a.dtype)) if b.dtype != a.dtype else torch.matmul(a, b)


def read(weights: Matrices, u: Tensor) -> Tensor:
    """f_W(u): u [U, h, M, d] -> [U, h, M, d]."""
    w0, w1, w2 = weights
    hidden = F.silu(_matmul(u, w0.mT)) * _matmul(u, w2.mT)
    return _matmul(hidden, w1.mT)


def initial_weights(config: LaCTConfig, matrices: Matrices) -> tuple[FastWeights, Matrices]:
    """One set from the parameters [h, ..]: what every sequence starts with, and n_i, row lengths [1, h, rows, 1]."""
    used = _each(matrices, lambda w: w.to(accumulation_dtype(w)).unsqueeze(0))
    norms = _each(used, lambda w: w.norm(dim=-1, keepdim=True))
    return FastWeights(used, used if config.ttt_prenorm else None), norms


def update(config: LaCTConfig, weights: FastWeights, norms: Matrices, chunk: ChunkTokens) -> FastWeights:
    """The weights after a chunk.

    Args:
        config: of the model.
        weights: A sets.
        norms: n_i, [1, h, rows, 1].
        chunk: A chunks, tokens first: k, v [A, C, h, d] and so on.

    Returns:
        A sets; differentiable with respect to everything, the Newton-Schulz steps included.
    """
    step = _step(weights.used, chunk)
    if chunk.momentum is not None and weights.momentum is not None:
        mu = chunk.momentum.mean(dim=1)[..., None, None]
        step = _add(step, _each(weights.momentum, lambda m: mu * m))
    moved = _orthogonalised(config, step) if config.use_muon else step
    main = _add(weights.main if weights.main is not None else weights.used, moved)
    w0, w1, w2 = (_renormalise(config, w, n) for w, n in zip(main, norms, strict=True))
    return FastWeights(
        (w0, w1, w2),
        main if weights.main is not None else None,
        step if chunk.momentum is not None else None,
    )


def _add(a: Matrices, b: Matrices) -> Matrices:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def _step(weights: Matrices, chunk: ChunkTokens) -> Matrices:
    """G_i, in the dtype of the weights: minus the gradient of the inner loss, written out."""
    w0, w1, w2 = weights
    k, v, rates = (part.transpose(1, 2) for part in (chunk.k, chunk.v, chunk.rates))  # [A, h, C, ..]
    lr0, lr1, lr2 = rates.chunk(3, dim=-1)
    a, b = _matmul(k, w0.mT), _matmul(k, w2.mT)
    sigma = torch.sigmoid(a)
    silu = a * sigma
    back = _matmul(v, w1)  # gradient with respect to silu(a) * b
    towards_a = back * b * sigma * (1 + a * (1 - sigma))
    towards_b = back * silu
    g0 = _matmul(towards_a.mT, (lr0 * k).to(towards_a.dtype))
    g1 = _matmul(v.mT, (lr1 * (silu * b)).to(v.dtype))
    g2 = _matmul(towards_b.mT, (lr2 * k).to(towards_b.dtype))
    return g0.to(w0.dtype), g1.to(w1.dtype), g2.to(w2.dtype)


def _renormalise(config: LaCTConfig, w: Tensor, norm: Tensor) -> Tensor:
    if config.use_fused_kernel and not config.ttt_prenorm:
        return w * torch.rsqrt(w.square().sum(dim=-1, keepdim=True) + EPSILON) * norm
    return w / (w.norm(dim=-1, keepdim=True) + EPSILON) * norm


def muon_dtype(config: LaCTConfig, dtype: torch.dtype) -> torch.dtype:
    """Precision of the Newton-Schulz steps for fast weights of ``dtype``."""
    if config.muon_dtype == "float32" or (config.muon_dtype == "auto" and dtype == torch.float64):
        return dtype
    return torch.bfloat16


def _orthogonalised(config: LaCTConfig, step: Matrices) -> Matrices:
    dtype = muon_dtype(config, step[0].dtype)
    m0, m1, m2 = step
    if config.use_fused_kernel:
        both = newton_schulz(torch.cat([m0, m2], dim=-2), dtype)
        u0, u2 = both.chunk(2, dim=-2)
        return u0.to(m0.dtype), newton_schulz(m1, dtype).to(m1.dtype), u2.to(m2.dtype)
    # all three have the same shape once they lie on their long side
    lying = [m.mT if m.shape[-2] > m.shape[-1] else m for m in step]
    made = newton_schulz(torch.stack(lying), dtype).unbind(0)
    u0, u1, u2 = ((u.mT if m.shape[-2] > m.shape[-1] else u).to(m.dtype) for u, m in zip(made, step, strict=True))
    return u0, u1, u2


def newton_schulz(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Five steps towards the nearest orthogonal matrices: [.., rows, columns] -> the same, no rescaling.

    Args:
        x: matrices.
        dtype: of the matmuls. Between them the iterate is kept in it too, but in float32 under autocast, where the
            published code gets there by dividing by a float32 norm.
    """
    tall = x.shape[-2] > x.shape[-1]
    carried = torch.float32 if dtype == torch.bfloat16 and torch.is_autocast_enabled(x.device.type) else dtype
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(dtype).to(carried)
        x = x.mT if tall else x
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + NS_EPSILON)
        for a, b, c in NS_COEFFICIENTS:
            low = x.to(dtype)
            gram = low @ low.mT
            mixed = (b * gram + (c * gram) @ gram).to(dtype)  # rounded where the published code rounds
            x = a * x + (mixed @ low).to(carried)
    return x.mT if tall else x


@cache
def updater(compiled: bool) -> Callable[[LaCTConfig, FastWeights, Matrices, ChunkTokens], FastWeights]:
    """``update``, compiled once if ``compiled``."""
    return torch.compile(update, dynamic=False) if compiled else update
