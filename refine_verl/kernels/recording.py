"""Remember how kernels got to their final states, so that the state after any token of a pass can be had afterwards.

The stand-ins for the CPU know the state before every chunk and what each token wrote, and keep it; fla's operators
give out the final state only and are cut (`operators`). `Recorder.at` looks a history up by the final state it belongs
to: whatever a model's layers do with that tensor, it is the one in their cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from refine_verl.kernels.chunking import ChunkPlan, from_chunks
from refine_verl.kernels.cuts import Cuts, Places


class History(Protocol):
    """The states one kernel call went through."""

    def at(self, places: Places) -> torch.Tensor:
        """States after the tokens at ``places``: ``[R, ...]``."""
        ...

    def write_norms(self) -> torch.Tensor | None:
        """Frobenius norm of what each token wrote into the state, all heads together.

        Returns:
            ``[tokens]`` without gradient, in the order of the call's own; None for a state that nothing is written
            into, such as a convolution's, and for one that another history is about already.
        """
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

    def take(self, name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The rows of a tensor that have gradients, and these; they wait no longer."""
        return self._waiting.pop(name, [])

    def add_to(self, dense: torch.Tensor, name: str) -> torch.Tensor:
        """Add what waits for a tensor to its gradient, in place."""
        for rows, gradient in self.take(name):
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
        return None, None, None, None, None


class _Keep(torch.autograd.Function):
    """A tensor ``[1, rows, ...]`` or ``[B, T, ...]`` as it is, and a handle: see `keep`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, waiting: RowGradients) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.waiting, ctx.shape = waiting, x.shape
        ctx.set_materialize_grads(False)
        return x.view_as(x), x.new_empty(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor | None, _: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        for rows, added in ctx.waiting.take(""):
            if gradient is None:
                gradient = added.new_zeros(ctx.shape)
            # not in place: what made the gradient may have given it to others, too
            flat = gradient.flatten(0, 1).index_add(0, rows, added.to(gradient.dtype))
            gradient = flat.view(ctx.shape)
        return gradient, None


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


def keep(x: torch.Tensor) -> tuple[torch.Tensor, Kept]:
    """A tensor to be handed on, and the same as rows (of its first two dimensions) that can be had after the pass.

    Args:
        x: ``[B, T, ...]``.

    Returns:
        ``x`` itself and `Kept` of the one tensor "", ``[B * T, ...]``.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x, Kept({"": x.flatten(0, 1)})
    waiting = RowGradients()
    same, handle = _Keep.apply(x, waiting)
    return same, Kept({"": x.detach().flatten(0, 1)}, handle, waiting)


@dataclass(frozen=True)
class ScanHistory:
    """Of the (gated) delta rule; ``M = chunks * heads`` as in `scan`.

    Attributes:
        plan: the layout.
        shape: ``[B, T, H]`` of the call, with H value heads.
        kept: ``k`` ``[M, C, K]``, the keys; ``writes`` ``[M, C, V]``, U; ``states`` ``[M, K, V]`` before each chunk;
            ``decay`` ``[M, C, 1]``, b, absent for the plain rule.
    """

    plan: ChunkPlan
    shape: torch.Size
    kept: Kept

    def write_norms(self) -> torch.Tensor:
        """See `History`; a token writes ``k u^T``."""
        keys, writes = self.kept.tensors["k"].detach(), self.kept.tensors["writes"].detach()
        norms = torch.linalg.vector_norm(keys, dim=-1) * torch.linalg.vector_norm(writes, dim=-1)
        by_head = from_chunks(norms.unsqueeze(-1), torch.Size((*self.shape, 1)), self.plan)
        return torch.linalg.vector_norm(by_head, dim=(2, 3)).flatten()

    def at(self, places: Places) -> torch.Tensor:
        """``S_t = exp(b_t) S + sum_{i <= t} exp(b_t - b_i) k_i u_i^T`` over the tokens i of t's chunk."""
        size, heads, device = self.plan.chunk, self.shape[2], self.kept.tensors["states"].device
        sequences = torch.tensor(places.sequences, device=device)
        positions = torch.tensor(places.positions, device=device)
        active = torch.tensor(self.plan.active, device=device)
        column = sequences if self.plan.inverse is None else self.plan.inverse[sequences]
        chunk = (active.cumsum(0) - active)[positions // size] + column
        rows = (chunk[:, None] * heads + torch.arange(heads, device=device)).flatten()
        last = (positions % size).repeat_interleave(heads)
        written = (torch.arange(size, device=device) <= last[:, None]).unsqueeze(-1)
        keys, state = self.kept.take("k", rows) * written, self.kept.take("states", rows)
        if "decay" in self.kept.tensors:
            b = self.kept.take("decay", rows)
            reached = b[torch.arange(len(rows), device=device), last].unsqueeze(1)
            keys = keys * (reached - b).clamp_(max=0).exp_()
            state = state * reached.exp()
        state = torch.baddbmm(state, keys.mT, self.kept.take("writes", rows))
        return state.view(len(sequences), heads, *state.shape[1:])


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

    def at(self, places: Places) -> torch.Tensor:
        """The last W inputs, ``[R, D, W]``."""
        device = self.start.device
        sequences, positions = (torch.tensor(x, device=device) for x in (places.sequences, places.positions))
        rows = (self.start[sequences] + positions + 1)[:, None] + torch.arange(self.width, device=device)
        return self.kept.take("inputs", rows.flatten()).view(*rows.shape, -1).transpose(1, 2).contiguous()

    def write_norms(self) -> None:
        """See `History`: nothing is written."""


@dataclass(frozen=True)
class _Transposed:
    """A history whose states are kept with their last two dimensions swapped."""

    history: History

    def at(self, places: Places) -> torch.Tensor:
        return self.history.at(places).transpose(-1, -2).contiguous()

    def write_norms(self) -> None:
        """See `History`: those of `history` are known."""


class Recorder:
    """Histories of the kernel calls of one pass; see `record_states`.

    Attributes:
        cuts: where operators are cut that do not know their histories themselves; ``None``: they are left alone.
        places: where states will be asked for, if that is known beforehand.
        taken: whether layers have left their states at ``places`` where their last ones would be.
    """

    def __init__(self, cuts: Cuts | None, places: Places | None) -> None:
        self.cuts, self.places, self.taken = cuts, places, False
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

    def at(self, final: torch.Tensor, places: Places) -> torch.Tensor:
        """States on the way to ``final``; see `History.at`.

        Raises:
            KeyError: ``final`` did not come out of a recorded call.
        """
        return self._histories[id(final)][1].at(places)

    def write_norms(self) -> torch.Tensor:
        """`History.write_norms` of every call that has them, in order: ``[calls, tokens]``."""
        found = (history.write_norms() for _, history in self._histories.values())
        return torch.stack([norms for norms in found if norms is not None])


_recorder: ContextVar[Recorder | None] = ContextVar("refine_verl_recorder", default=None)


def active_recorder() -> Recorder | None:
    """The recorder in use: for the kernels."""
    return _recorder.get()


@contextlib.contextmanager
def record_states(cuts: Cuts | None = None, places: Places | None = None) -> Iterator[Recorder]:
    """Record the calls that return a final state; what `Recorder.at` gives back is differentiable like the state.

    On the CPU it costs memory, less than 8 T d per layer, and hardly any time.

    Args:
        cuts: cut operators, the stand-ins for the CPU too, and keep their inputs; ``None``: the stand-ins alone are
            recorded, which they do by themselves.
        places: see `Recorder`.
    """
    recorder = Recorder(cuts, places)
    token = _recorder.set(recorder)
    try:
        yield recorder
    finally:
        _recorder.reset(token)


_last_states_wanted: ContextVar[bool] = ContextVar("refine_verl_last_states_wanted", default=True)


def last_states_wanted() -> bool:
    """Whether the states after the last tokens are for anybody: for the kernels."""
    return _last_states_wanted.get()


@contextlib.contextmanager
def last_states(wanted: bool) -> Iterator[None]:
    """Whether calls inside the block give out the states after their last tokens, if they are asked for.

    fla's layers ask for them whenever they are given a state. A state that nobody uses still costs its making, and a
    gradient of zeros.
    """
    token = _last_states_wanted.set(wanted)
    try:
        yield
    finally:
        _last_states_wanted.reset(token)


@contextlib.contextmanager
def no_recording() -> Iterator[None]:
    """Leave the calls inside the block alone."""
    token = _recorder.set(None)
    try:
        yield
    finally:
        _recorder.reset(token)
