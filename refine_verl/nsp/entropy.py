"""Uncertainty of the policy at every token of a document (paper, Eq. 5) and its smoothing.

Convention, used everywhere in `refine_verl.nsp`: `H[j]` is the entropy of the distribution that predicts
token `x_j`, that is, of the logits at position j-1. Nothing predicts `x_0`, so `H[0]` does not exist:
whatever number stands there takes no part in smoothing or selection.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for everything else: bf16 logits are never reduced in bf16."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@torch.no_grad()
def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy in nats of `softmax(logits)` over the last dimension (Eq. 5).

    Args:
        logits: `[..., V]`, any floating dtype. `-inf` (a forbidden token) contributes nothing.

    Returns:
        `[...]`, float32, or float64 for float64 logits. Never requires grad: it only chooses positions.
    """
    return _entropy_(logits.to(accumulation_dtype(logits), copy=True))


def _entropy_(logits: Tensor) -> Tensor:
    """`entropy_from_logits` of logits in the accumulation dtype, which are overwritten."""
    # H = log Z - E[l] with l = logits - max: one exp and two reductions, a third of the time of sum(-p log p)
    # a finite bound instead of -inf: 0 * -inf is NaN, and to look for that the host would have to wait
    logits.sub_(logits.amax(dim=-1, keepdim=True)).clamp_(min=torch.finfo(logits.dtype).min)
    weights = logits.exp()
    total = weights.sum(dim=-1)
    return total.log() - torch.linalg.vecdot(weights, logits) / total


@torch.no_grad()
def chunked_entropy(hidden: Tensor, project: Callable[[Tensor], Tensor], chunk_size: int = 1024) -> Tensor:
    """Entropy of the prediction made from each hidden state, `chunk_size` rows of logits at a time (Eq. 5).

    The full `[L, V]` logits never exist: peak memory is a few times `chunk_size * V` floats.

    Args:
        hidden: `[L, d]`, hidden states after the final norm.
        project: the LM head, `[m, d] -> [m, V]`; what it returns is overwritten.
        chunk_size: rows per call of `project`.

    Returns:
        `[L]`, float32 (float64 for float64 logits). Entry i is the entropy of the distribution of the token
        *after* i; `align_entropy` turns it into `H`.

    Raises:
        ValueError: `hidden` is not 2-D or `chunk_size < 1`.
    """
    if hidden.dim() != 2:
        raise ValueError(f"hidden must have shape [L, d], got {list(hidden.shape)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if hidden.shape[0] == 0:
        return hidden.new_empty(0, dtype=accumulation_dtype(hidden))
    parts = []
    for rows in hidden.split(chunk_size):
        logits = project(rows)
        parts.append(_entropy_(logits.to(accumulation_dtype(logits))))
    return torch.cat(parts)


def align_entropy(next_token_entropy: Tensor) -> Tensor:
    """Shift the entropies of one document from "predicted by i" to "about token j": `H[j] = E[j-1]`.

    Args:
        next_token_entropy: `[T]`, entry i belongs to the logits at position i (see `chunked_entropy`).

    Returns:
        `[T]`, same dtype; `H[0]`, which does not exist, is 0.
    """
    return torch.cat([next_token_entropy.new_zeros(1), next_token_entropy[:-1]])


def smooth_entropy(entropy: Tensor, window: int) -> Tensor:
    """1-D average pooling, centred, stride 1, averaging only the neighbours that exist (paper, Sec. 3.2).

    Entry i averages entries `i - window // 2 ... i + (window - 1) // 2`: an even window takes its extra
    neighbour from the *earlier* side. Near the ends the divisor is the number of entries that exist.

    Args:
        entropy: `[T]`, one sequence, every entry valid.
        window: number of entries, at least 1 (1 changes nothing).

    Returns:
        `[T]`, same dtype and device, computed in float64.

    Raises:
        ValueError: `entropy` is not 1-D or `window < 1`.
    """
    if entropy.dim() != 1:
        raise ValueError(f"entropy must have shape [T], got {list(entropy.shape)}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if window == 1 or entropy.numel() == 0:
        return entropy.clone()
    # Direct sums per window, not differences of a running sum: a value outside the window has no influence.
    pooled = F.avg_pool1d(
        entropy.to(torch.float64)[None], window, stride=1, padding=window // 2, count_include_pad=False
    )[0]
    return pooled[: entropy.shape[0]].to(entropy.dtype)


def smooth_token_entropy(entropy: Tensor, window: int) -> Tensor:
    """`smooth_entropy` of `H[1:]`, which exist, with a value for `H[0]`, which does not.

    Entry 0 is the mean of its existing neighbours in the window, or `H[1]` where the window holds none.

    Args:
        entropy: `[T]` with T >= 2, aligned (`align_entropy`). Entry 0 is ignored, NaN included.
        window: as in `smooth_entropy`.

    Returns:
        `[T]`, same dtype and device.

    Raises:
        ValueError: T < 2, or as `smooth_entropy`.
    """
    if entropy.dim() != 1 or entropy.shape[0] < 2:
        raise ValueError(f"entropy must have shape [T] with T >= 2, got {list(entropy.shape)}")
    smoothed = smooth_entropy(entropy[1:], window)
    neighbours = max((window - 1) // 2, 1)
    first = entropy[1 : 1 + neighbours].to(torch.float64).mean().to(entropy.dtype)
    return torch.cat([first[None], smoothed])
