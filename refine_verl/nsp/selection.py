"""Which positions of a document get a rollout: one per chunk (paper, Sec. 3.2, Eq. 6 and Tab. 7).

Positions are 0-based. Position t has the prefix `x_0 ... x_t` and the continuation `x_{t+1} ... x_{t+k}`,
so the valid positions of a document of T tokens are `0 <= t <= T-1-k`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from refine_verl.config import NSPSettings
from refine_verl.nsp.entropy import accumulation_dtype, smooth_token_entropy
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
        window: width of the average that makes `smoothed` of `entropy`.
        offset: 1 where a position is weighed by the token after it, 0 where by its own (`ANCHORS`).
        question: index of the first token of the question, if the document is a prompt with one; at least 1.
        hidden: `[T, d]` after the final norm, on the model's device; None where a caller has entropies only.
        tokens: int64 `[T]`; None like `hidden`.
        write_norms: float64 `[layers, T]` on the CPU, how far each token moved the fast weights of each layer; None
            for strategies that do not ask for it (`needs_writes`).
    """

    entropy: Tensor
    smoothed: Tensor
    weights: Tensor
    chunks: list[tuple[int, int]]
    uniforms: Tensor
    temperature: float
    rollout_length: int
    window: int
    offset: int
    question: int
    hidden: Tensor | None = None
    tokens: Tensor | None = None
    write_norms: Tensor | None = None


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

Score = Callable[[SelectionInputs], Tensor]
"""From what is known of a document to a number for each of its tokens: float64 `[T]` on the CPU."""


def surprise(inputs: SelectionInputs) -> Tensor:
    """How strongly each token rewrote the fast weights: the mean over layers of the norm of its write.

    Each layer counts in units of its own mean over the document, so that none outweighs the others by its scale.

    Raises:
        ValueError: the caller gave no norms of writes.
    """
    if inputs.write_norms is None:
        raise ValueError("selection 'surprise' needs the norms of what each token writes into the fast weights")
    means = inputs.write_norms[:, 1:].mean(dim=1, keepdim=True)
    return (inputs.write_norms / means.clamp_min(torch.finfo(means.dtype).tiny)).mean(dim=0)


def resemblance(inputs: SelectionInputs) -> Tensor:
    """How much each token resembles the question: the cosine of its hidden state with the nearest of the question's.

    The mean over the document is taken off the hidden states first: what all of them share says nothing. The question's
    own tokens, which resemble themselves, get the lowest score of the others.

    Raises:
        ValueError: the caller gave no hidden states.
    """
    if inputs.hidden is None:
        raise ValueError("selection 'query' needs hidden states")
    hidden = inputs.hidden.detach().to(accumulation_dtype(inputs.hidden))
    directions = F.normalize(hidden - hidden.mean(dim=0), dim=-1)
    similar = (directions @ directions[inputs.question :].mT).amax(dim=1)
    similar[inputs.question :] = similar[1 : inputs.question].amin() if inputs.question > 1 else similar[0]
    return similar.to("cpu", torch.float64)


SCORES: dict[str, Score] = {"surprise": surprise, "query": resemblance}
"""Strategies that draw by something else than entropy; it takes the place of H in Eq. 6."""

_NOISE = 1e-6
"""Scores whose standard deviation is less are all the same but for rounding: 1 is the scale of both."""


def drawn_by(name: str, inputs: SelectionInputs) -> Tensor:
    """What the strategy `name` weighs tokens by: the smoothed entropy, or its score, standardised and smoothed.

    Scores have units of their own, so their mean over the document is taken off and their standard deviation is 1
    before they are smoothed: a temperature then means the same for all of them. Entry 0, which nothing predicts, is not
    looked at, as that of entropies.

    Returns:
        float64 `[T]` on the CPU.
    """
    if name not in SCORES:
        return inputs.smoothed
    score = SCORES[name](inputs)
    spread = score[1:].std(correction=0).clamp_min(_NOISE)
    return smooth_token_entropy((score - score[1:].mean()) / spread, inputs.window)


def _by_score(name: str) -> SelectionFunction:
    draw = _in_each_chunk(_softmax_draw)

    def select(inputs: SelectionInputs) -> Tensor | Sequence[int]:
        return draw(dataclasses.replace(inputs, weights=weights_of(drawn_by(name, inputs), inputs)))

    return select


def weights_of(values: Tensor, inputs: SelectionInputs) -> Tensor:
    """The value `[T-k]` that each valid position is weighed by, always finite, from those of tokens `[T]`."""
    valid = len(values) - inputs.rollout_length
    return values[inputs.offset : inputs.offset + valid].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


for _name in SCORES:
    register_selection(_name)(_by_score(_name))


def needs_writes(strategy: SelectionFunction) -> SelectionFunction:
    """Decorator: a strategy that looks at `SelectionInputs.write_norms`, which cost a little and are not there else."""
    strategy.needs_writes = True  # type: ignore[attr-defined]
    return strategy


needs_writes(SELECTIONS.functions["surprise"])


def looks_at_writes(nsp: NSPSettings) -> bool:
    """Whether the strategy of `nsp` asks for the norms of writes.

    Raises:
        ValueError: there is no such strategy.
    """
    return bool(getattr(SELECTIONS.find(nsp.selection), "needs_writes", False))


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
    write_norms: Tensor | None = None,
) -> Tensor:
    """Choose one position in each chunk of a document (Eq. 6); a strategy of your own may disregard the chunks.

    The paper's strategies look at the *smoothed* entropy. The work is done in float64 on the CPU, where sums have
    one fixed order: the same entropies give the same positions on every device. An entropy that is NaN or
    infinite counts as 0; the loss of such a document carries the NaN on to whoever decides about the update.

    Args:
        entropy: `[T]`, aligned (`H[j]` is about token j; `H[0]` is ignored), any floating dtype and device.
        nsp: chunks, rollout length, strategy, anchor (position t is weighed by H[t+1] or H[t]), temperature, window.
        uniforms: `[c]` numbers in [0, 1), one per chunk (`sampling.position_uniforms`).
        hidden, tokens, write_norms: `[T, d]`, `[T]` and `[layers, T]`, for strategies that look at them.

    Returns:
        positions: int64 `[c]` on the CPU, increasing.

    Raises:
        ValueError: an unknown strategy, T < c + k, one that looks at something that is not given, or the strategy
            returned something else than c valid positions in increasing order.
    """
    inputs = selection_inputs(entropy, nsp, uniforms, hidden=hidden, tokens=tokens, write_norms=write_norms)
    choose = SELECTIONS.find(nsp.selection)
    return _checked_positions(choose(inputs), inputs, f"selection strategy {nsp.selection!r} ({path_of(choose)})")


TRIED_TOKENS = 1024
"""Of the made-up document that `try_selection` shows a strategy; more where c positions and k tokens need more."""


def try_selection(nsp: NSPSettings, hidden_size: int | None, layers: int = 2) -> None:
    """Let the strategy of `nsp` choose positions in a made-up document, with all that a run would show it.

    Args:
        nsp: whose strategy, c and k are tried.
        hidden_size: d of the model; None: unknown. Then 8 is taken, and what the function itself raises is not its
            fault.
        layers: of the model's fast weights.

    Raises:
        ValueError: there is no such strategy, it raised an exception, or it returned something else than c valid
            positions in increasing order.
    """
    length = max(TRIED_TOKENS, 4 * nsp.shortest_document)
    generator = torch.Generator().manual_seed(0)
    entropy = 4 * torch.rand(length, generator=generator)
    uniforms = torch.rand(nsp.chunks, generator=generator, dtype=torch.float64)
    about = {
        "hidden": torch.randn(length, hidden_size or 8, generator=generator),
        "tokens": torch.arange(length),
        "write_norms": torch.rand(layers, length, generator=generator) if looks_at_writes(nsp) else None,
    }
    inputs = selection_inputs(entropy, nsp, uniforms, **about)
    choose = SELECTIONS.find(nsp.selection)
    where = f"selection strategy {nsp.selection!r} ({path_of(choose)})"
    try:
        chosen = choose(inputs)
    except Exception as error:  # a user's function may fail in any way
        if hidden_size is None:
            return
        raise ValueError(f"{where} raised {type(error).__name__}: {error}") from error
    _checked_positions(chosen, inputs, where)


def selection_inputs(
    entropy: Tensor,
    nsp: NSPSettings,
    uniforms: Tensor | np.ndarray | Sequence[float],
    *,
    hidden: Tensor | None = None,
    tokens: Tensor | None = None,
    write_norms: Tensor | None = None,
) -> SelectionInputs:
    """What a strategy gets to see; arguments as of `select_positions`.

    Raises:
        ValueError: T < c + k, or numbers that are no uniforms.
    """
    length, num_valid = entropy.shape[0], entropy.shape[0] - nsp.longest_rollout
    if length < nsp.shortest_document:
        raise ValueError(
            f"a document of {length} tokens is too short: at least {nsp.shortest_document} are needed (chunks + "
            f"rollout_length), one position in each of {nsp.chunks} chunks plus {nsp.longest_rollout} tokens after "
            "the last one"
        )
    raw = entropy.detach().to("cpu", torch.float64)
    smoothed, offset = smooth_token_entropy(raw, nsp.pooling_window), ANCHORS[nsp.anchor]
    return SelectionInputs(
        entropy=raw,
        smoothed=smoothed,
        weights=smoothed[offset : offset + num_valid].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0),
        chunks=chunk_bounds(num_valid, nsp.chunks),
        uniforms=_as_uniforms(uniforms, nsp.chunks),
        temperature=nsp.entropy_temperature,
        rollout_length=nsp.longest_rollout,
        window=nsp.pooling_window,
        offset=offset,
        question=length - min(nsp.question_tokens, length // 2),
        hidden=hidden,
        tokens=tokens,
        write_norms=None if write_norms is None else write_norms.detach().to("cpu", torch.float64),
    )


def _checked_positions(chosen: object, inputs: SelectionInputs, where: str) -> Tensor:
    """Positions int64 `[c]` on the CPU.

    Raises:
        ValueError: they are none, or not as many, or not increasing and valid.
    """
    chunks, num_valid = len(inputs.chunks), len(inputs.weights)
    try:
        positions = torch.as_tensor(chosen).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{where} returned a {type(chosen).__name__} that is no tensor of numbers ({error}); expected [{chunks}] "
            "positions"
        ) from error
    no_index = positions.is_floating_point() or positions.is_complex() or positions.dtype is torch.bool
    if positions.shape != (chunks,) or no_index:
        raise ValueError(
            f"{where} returned {positions.dtype} of shape {list(positions.shape)}; expected [{chunks}] positions"
        )
    bounded = [-1, *positions.tolist(), num_valid]
    if any(first >= second for first, second in zip(bounded, bounded[1:], strict=False)):
        raise ValueError(
            f"{where} returned {positions.tolist()}; expected increasing positions in 0 ... {num_valid - 1}"
        )
    return positions.to(torch.int64)
