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
from typing import Any, Protocol

import torch

from refine_verl.kernels.chunking import ChunkPlan


class History(Protocol):
    """The states one kernel call went through."""

    def at(self, sequences: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """State of sequence ``sequences[r]`` (int64 ``[R]``) after its token ``positions[r]``: ``[R, ...]``."""
        ...


class RowGradients:
    """Gradients of a few rows of a kernel's tensors, on their way to the backward pass of the call that made them.

    What autograd would send there is as large as the tensors and zero but for these rows. They wait here instead, by
    the tensor's name, until that pass collects them.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def add(self, name: str, rows: torch.Tensor, gradient: torch.Tensor) -> None:
        """Leave the gradient ``[R, ...]`` of the rows ``rows`` (int64 ``[R]``) of a tensor."""
        self._waiting.setdefault(name, []).append((rows, gradient))

    def add_to(self, dense: torch.Tensor, name: str) -> torch.Tensor:
        """Add what waits for a tensor to its gradient, in place; it waits no longer."""
        for rows, gradient in self._waiting.pop(name, ()):
            dense.index_add_(0, rows, gradient.to(dense.dtype))
        return dense


class _Take(torch.autograd.Function):
    """``source[rows]`` whose gradient goes by way of `RowGradients`.

    ``handle`` is an output of the call that made ``source``: autograd then runs the backward pass of that call after
    this one.
    """

    @staticmethod
    def forward(
        ctx: Any, handle: torch.Tensor, source: torch.Tensor, rows: torch.Tensor, waiting: RowGradients, name: str
    ) -> torch.Tensor:
        ctx.rows, ctx.waiting, ctx.name = rows, waiting, name
        return source.index_select(0, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.waiting.add(ctx.name, ctx.rows, gradient)
        return gradient.new_zeros(()), None, None, None, None


@dataclass(frozen=True)
class Kept:
    """Tensors of one kernel call, by name, of which rows can be had after the pass.

    Attributes:
        tensors: ``[rows, ...]`` each, without gradient.
        handle: an output of the call that carries its gradient, or ``None`` where there is none.
        waiting: where the call's backward pass finds the gradients of the rows.
    """

    tensors: dict[str, torch.Tensor]
    handle: torch.Tensor | None = None
    waiting: RowGradients | None = None

    def take(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows ``rows`` (int64 ``[R]``) of a tensor: ``[R, ...]``."""
        source = self.tensors[name]
        if self.handle is None or self.waiting is None:
            return source.index_select(0, rows)
        taken: torch.Tensor = _Take.apply(self.handle, source, rows, self.waiting, name)
        return taken


@dataclass(frozen=True)
class ScanHistory:
    """Of the (gated) delta rule; ``M = chunks * heads`` as in `scan`.

    Attributes:
        plan: the layout.
        heads: number of value heads H.
        kept: ``k`` ``[M, C, K]``, the keys; ``writes`` ``[M, C, V]``, U; ``states`` ``[M, K, V]`` before each chunk;
            ``decay`` ``[M, C, 1]``, b, absent for the plain rule.
    """

    plan: ChunkPlan
    heads: int
    kept: Kept

    def at(self, sequences: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """``S_t = exp(b_t) S + sum_{i <= t} exp(b_t - b_i) k_i u_i^T`` over the tokens i of t's chunk."""
        size = self.plan.chunk
        active = torch.tensor(self.plan.active)
        column = sequences if self.plan.inverse is None else self.plan.inverse[sequences]
        chunk = (active.cumsum(0) - active)[positions // size] + column
        rows = (chunk[:, None] * self.heads + torch.arange(self.heads)).flatten()
        last = (positions % size).repeat_interleave(self.heads)
        written = (torch.arange(size) <= last[:, None]).unsqueeze(-1)
        keys, state = self.kept.take("k", rows) * written, self.kept.take("states", rows)
        if "decay" in self.kept.tensors:
            b = self.kept.take("decay", rows)
            reached = b[torch.arange(len(rows)), last].unsqueeze(1)
            keys = keys * (reached - b).clamp_(max=0).exp_()
            state = state * reached.exp()
        state = torch.baddbmm(state, keys.mT, self.kept.take("writes", rows))
        return state.view(len(sequences), self.heads, *state.shape[1:])


@dataclass(frozen=True, kw_only=True)
class ConvHistory:
    """Of the short convolution.

    Attributes:
        kept: ``inputs`` ``[rows, D]``: of each sequence its W state rows, then its tokens.
        start: int64 ``[n]``, first row of each sequence.
        width: W.
    """

    kept: Kept
    start: torch.Tensor
    width: int

    def at(self, sequences: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The last W inputs, ``[R, D, W]``."""
        rows = (self.start[sequences] + positions + 1)[:, None] + torch.arange(self.width)
        return self.kept.take("inputs", rows.flatten()).view(*rows.shape, -1).transpose(1, 2).contiguous()


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

    Costs memory, less than 8 T d per layer, and hardly any time.
    """
    recorder = Recorder()
    token = _recorder.set(recorder)
    try:
        yield recorder
    finally:
        _recorder.reset(token)
