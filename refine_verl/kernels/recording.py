"""Keep what the CPU kernels compute anyway, so that the state after any token of a pass can be had afterwards.

A chunked scan knows the state before every chunk and what each token wrote; fla's kernels give out the final state
only. `record_states` makes the stand-ins remember the rest, and `Recorder.at` looks it up by the final state it
belongs to: whatever a model's layers do with that tensor, it is the one in their cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch

from refine_verl.kernels.chunking import ChunkPlan


class History(Protocol):
    """The states one kernel call went through."""

    def at(self, sequences: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """State of sequence ``sequences[r]`` (int64 ``[R]``) after its token ``positions[r]``: ``[R, ...]``."""
        ...


@dataclass(frozen=True)
class ScanHistory:
    """Of the (gated) delta rule; ``M = chunks * heads`` as in `scan`.

    Attributes:
        plan: the layout.
        heads: number of value heads H.
        k: ``[M, C, K]`` keys.
        writes: ``[M, C, V]``, U.
        states: ``[M, K, V]`` before each chunk.
        decay: ``[M, C, 1]``, b, or ``None`` for the plain rule.
    """

    plan: ChunkPlan
    heads: int
    k: torch.Tensor
    writes: torch.Tensor
    states: torch.Tensor
    decay: torch.Tensor | None

    def at(self, sequences: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """``S_t = exp(b_t) S + sum_{i <= t} exp(b_t - b_i) k_i u_i^T`` over the tokens i of t's chunk."""
        size = self.plan.chunk
        active = torch.tensor(self.plan.active)
        column = sequences if self.plan.inverse is None else self.plan.inverse[sequences]
        chunk = (active.cumsum(0) - active)[positions // size] + column
        rows = (chunk[:, None] * self.heads + torch.arange(self.heads)).flatten()
        last = (positions % size).repeat_interleave(self.heads)
        written = (torch.arange(size) <= last[:, None]).unsqueeze(-1)
        # not x[rows]: the gradient of that is accumulated element by element
        keys, state = self.k.index_select(0, rows) * written, self.states.index_select(0, rows)
        if self.decay is not None:
            b = self.decay.index_select(0, rows)
            reached = b[torch.arange(len(rows)), last].unsqueeze(1)
            keys = keys * (reached - b).clamp_(max=0).exp_()
            state = state * reached.exp()
        state = torch.baddbmm(state, keys.mT, self.writes.index_select(0, rows))
        return state.view(len(sequences), self.heads, *state.shape[1:])


@dataclass(frozen=True, kw_only=True)
class ConvHistory:
    """Of the short convolution.

    Attributes:
        inputs: ``[rows, D]``: of each sequence its W state rows, then its tokens.
        start: int64 ``[n]``, first row of each sequence.
        width: W.
    """

    inputs: torch.Tensor
    start: torch.Tensor
    width: int

    def at(self, sequences: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The last W inputs, ``[R, D, W]``."""
        rows = (self.start[sequences] + positions + 1)[:, None] + torch.arange(self.width)
        return self.inputs.index_select(0, rows.flatten()).view(*rows.shape, -1).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class _Transposed:
    """A history whose states are kept with their last two dimensions swapped."""

    history: History

    def at(self, sequences: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.history.at(sequences, positions).transpose(-1, -2).contiguous()


class Recorder:
    """Histories of the kernel calls of one pass; see `record_states`."""

    def __init__(self) -> None:
        self._histories: dict[int, tuple[torch.Tensor, History]] = {}

    def add(self, final: torch.Tensor, history: History) -> None:
        """Remember the history that ended in the state ``final``."""
        # holding the tensor keeps its id its own
        self._histories[id(final)] = (final, history)

    def add_transposed(self, transposed: torch.Tensor, final: torch.Tensor) -> None:
        """Remember that ``transposed`` is ``final`` with its last two dimensions swapped."""
        self.add(transposed, _Transposed(self._histories[id(final)][1]))

    def covers(self, final: torch.Tensor) -> bool:
        """Whether ``final`` came out of a recorded call."""
        return id(final) in self._histories

    def at(self, final: torch.Tensor, sequences: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """States on the way to ``final``; see `History.at`.

        Raises:
            KeyError: ``final`` did not come out of a recorded call.
        """
        return self._histories[id(final)][1].at(sequences, positions)


_recorder: ContextVar[Recorder | None] = ContextVar("refine_verl_recorder", default=None)


def active_recorder() -> Recorder | None:
    """The recorder in use: for the kernels."""
    return _recorder.get()


@contextlib.contextmanager
def record_states() -> Iterator[Recorder]:
    """Record the calls that return a final state; what `Recorder.at` gives back is differentiable like the state.

    Costs memory, less than 8 T d per layer without gradients and 2 T d more with them, and hardly any time.
    """
    recorder = Recorder()
    token = _recorder.set(recorder)
    try:
        yield recorder
    finally:
        _recorder.reset(token)
