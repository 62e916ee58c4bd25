"""Which positions of a document get a rollout: one per chunk (paper, Sec. 3.2, Eq. 6 and Tab. 7).

Positions are 0-based. Position t has the prefix `x_0 ... x_t` and the continuation `x_{t+1} ... x_{t+k}`,
so the valid positions of a document of T tokens are `0 <= t <= T-1-k`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from refine_verl.config import NSPSettings
from refine_verl.nsp.entropy import smooth_token_entropy
from refine_verl.nsp.registry import Registry, path_of


@dataclass(frozen=True, kw_only=True, eq=False)
class SelectionInputs:
    """What a selection strategy may look at, for one document of T tokens.

    Attributes:
        entropy: float64 `[T]` on the CPU, H; entry 0, which nothing predicts, means nothing.
        smoothed: float64 `[T]` on the CPU, the average of H over neighbours.
        weights: float64 `[T-k]` on the CPU, always finite: the smoothed entropy that each valid position is weighed
            by, that of the token the anchor names.
        chunks: c half-open ranges of valid positions.
        uniforms: float64 `[c]` on the CPU, a random number in [0, 1) per chunk: all the randomness there may be.
        temperature: tau of Eq. 6.
        rollout_length: k; a position t needs t <= T-1-k.
        hidden: `[T, d]` after the final norm, on the model's device; None where a caller has entropies only.
        tokens: int64 `[T]`; None like `hidden`.
    """

    entropy: Tensor
    smoothed: Tensor
    weights: Tensor
    chunks: list[tuple[int, int]]
    uniforms: Tensor
    temperature: float
    rollout_length: int
    hidden: Tensor | None = None
    tokens: Tensor | None = None


SelectionFunction = Callable[[SelectionInputs], "Tensor | Sequence[int]"]
"""From what is known of a document to c valid positions, strictly increasing."""

SELECTIONS: Registry[SelectionFunction] = Registry("selection strategy")
register_selection = SELECTIONS.register

Strategy = Callable[[np.ndarray, float, float], int]
"""(entropies [m] of one chunk's positions, temperature, uniform in [0, 1)) -> index in 0..m-1."""


def _softmax_draw(entropy: np.ndarray, temperature: float, uniform: float) -> int:
    """Draw from softmax(H / tau) by inverting the CDF at one uniform number (Eq. 6)."""
    cdf = np.cumsum(np.exp((entropy - entropy.max()) / temperature))
    # A float64 below 1 times the total is below the total, also after rounding: the index exists.
    return int(np.searchsorted(cdf, uniform * cdf[-1], side="right"))


STRATEGIES: dict[str, Strategy] = {
    "entropy": _softmax_draw,
    "uniform": lambda entropy, temperature, uniform: min(int(uniform * len(entropy)), len(entropy) - 1),
    "max_entropy": lambda entropy, temperature, uniform: int(np.argmax(entropy)),
    "min_entropy": lambda entropy, temperature, uniform: int(np.argmin(entropy)),
}
"""The paper's selection strategies (Tab. 7). Ties of `max_entropy` and `min_entropy` go to the lowest index."""


def _in_each_chunk(choose: Strategy) -> SelectionFunction:
    def select(inputs: SelectionInputs) -> list[int]:
        weights = inputs.weights.numpy()
        draws = inputs.uniforms.tolist()
        return [
            start + choose(weights[start:stop], inputs.temperature, draw)
            for (start, stop), draw in zip(inputs.chunks, draws, strict=True)
        ]

    return select


for _name, _choose in STRATEGIES.items():
    register_selection(_name)(_in_each_chunk(_choose))

ANCHORS: dict[str, int] = {"prediction": 1, "token": 0}
"""Anchor -> offset: position t is weighed by H[t + offset].

`prediction`: the first token to be predicted is the uncertain one. `token`: the uncertain token ends the
prefix.
"""


def chunk_bounds(num_valid: int, chunks: int) -> list[tuple[int, int]]:
    """Split the positions `0 ... num_valid-1` into contiguous half-open ranges, equal up to one position.

    Args:
        num_valid: number of valid positions, T - k.
        chunks: number of ranges, c.

    Returns:
        c pairs (start, stop), none empty, covering every position once.

    Raises:
        ValueError: `chunks < 1` or fewer positions than chunks.
    """
    if chunks < 1:
        raise ValueError(f"chunks must be at least 1, got {chunks}")
    if num_valid < chunks:
        raise ValueError(f"{num_valid} valid positions cannot be split into {chunks} non-empty chunks")
    return [(i * num_valid // chunks, (i + 1) * num_valid // chunks) for i in range(chunks)]


def _as_uniforms(uniforms: Tensor | np.ndarray | Sequence[float], chunks: int) -> Tensor:
    values = torch.as_tensor(uniforms, dtype=torch.float64, device="cpu").detach()
    if values.shape != (chunks,):
        raise ValueError(f"uniforms must have shape [{chunks}], one per chunk, got {list(values.shape)}")
    if not ((values >= 0) & (values < 1)).all():
        raise ValueError("uniforms must lie in [0, 1)")
    return values


def select_positions(
    entropy: Tensor,
    nsp: NSPSettings,
    uniforms: Tensor | np.ndarray | Sequence[float],
    *,
    hidden: Tensor | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """Choose one position in each chunk of a document (Eq. 6); a strategy of your own may disregard the chunks.

    The paper's strategies look at the *smoothed* entropy. The work is done in float64 on the CPU, where sums have
    one fixed order: the same entropies give the same positions on every device. An entropy that is NaN or
    infinite counts as 0; the loss of such a document carries the NaN on to whoever decides about the update.

    Args:
        entropy: `[T]`, aligned (`H[j]` is about token j; `H[0]` is ignored), any floating dtype and device.
        nsp: chunks, rollout length, strategy, anchor (position t is weighed by H[t+1] or H[t]), temperature, window.
        uniforms: `[c]` numbers in [0, 1), one per chunk (`sampling.position_uniforms`).
        hidden, tokens: `[T, d]` and `[T]`, for strategies that look at them.

    Returns:
        positions: int64 `[c]` on the CPU, increasing.

    Raises:
        ValueError: an unknown strategy, T < c + k, or the strategy returned something else than c valid positions in
            increasing order.
    """
    length, num_valid = entropy.shape[0], entropy.shape[0] - nsp.rollout_length
    if length < nsp.shortest_document:
        raise ValueError(
            f"a document of {length} tokens is too short: at least {nsp.shortest_document} are needed (chunks + "
            f"rollout_length), one position in each of {nsp.chunks} chunks plus {nsp.rollout_length} tokens after "
            "the last one"
        )
    raw = entropy.detach().to("cpu", torch.float64)
    smoothed, offset = smooth_token_entropy(raw, nsp.pooling_window), ANCHORS[nsp.anchor]
    inputs = SelectionInputs(
        entropy=raw,
        smoothed=smoothed,
        weights=smoothed[offset : offset + num_valid].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0),
        chunks=chunk_bounds(num_valid, nsp.chunks),
        uniforms=_as_uniforms(uniforms, nsp.chunks),
        temperature=nsp.entropy_temperature,
        rollout_length=nsp.rollout_length,
        hidden=hidden,
        tokens=tokens,
    )
    choose = SELECTIONS.find(nsp.selection)
    positions = torch.as_tensor(choose(inputs)).cpu()
    _check_positions(positions, inputs, f"selection strategy {nsp.selection!r} ({path_of(choose)})")
    return positions.to(torch.int64)


def _check_positions(positions: Tensor, inputs: SelectionInputs, where: str) -> None:
    chunks, num_valid = len(inputs.chunks), len(inputs.weights)
    if positions.shape != (chunks,) or positions.is_floating_point():
        raise ValueError(
            f"{where} returned {positions.dtype} of shape {list(positions.shape)}; expected [{chunks}] positions"
        )
    bounded = [-1, *positions.tolist(), num_valid]
    if any(first >= second for first, second in zip(bounded, bounded[1:], strict=False)):
        raise ValueError(
            f"{where} returned {positions.tolist()}; expected increasing positions in 0 ... {num_valid - 1}"
        )
