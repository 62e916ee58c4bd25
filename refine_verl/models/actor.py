"""The policy: a causal language model whose one forward pass knows every way REFINE runs it.

FSDP2 gathers parameters only while the root module's forward pass runs, so all of it happens in there: reading a
document, forking its state, writing rollouts, and the trunk-and-branches pass that is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from refine_verl.config import NSPSettings
from refine_verl.models import answers, reference
from refine_verl.models.adapters import ModelAdapter, TracingAdapter, get_adapter
from refine_verl.models.head import IGNORED, FusedHead
from refine_verl.models.packing import Documents, Packed
from refine_verl.models.rollouts import Branches, RolloutBatch, RolloutDraws
from refine_verl.models.state import FastWeightState
from refine_verl.models.trace import Trace, read_in_segments
from refine_verl.nsp import align_entropy, sample_from_logits, select_positions

# Replaying from the nearest snapshot then costs at most c * T / (8 c) = T / 8 tokens for all positions together.
SNAPSHOTS_PER_CHUNK = 8


def snapshot_count(chunks: int, max_length: int) -> int:
    """Segments in which documents of at most ``max_length`` tokens are read while their states are kept.

    A function of settings alone: under FSDP every rank has to make the same number of passes.
    """
    return min(SNAPSHOTS_PER_CHUNK * chunks, max_length)


_MODES = {
    "rollout": "rollout",
    "update": "update",
    "score": "score",
    "generate": "answer",
    "answer_log_probs": "answer_log_probs",
}
_TRAINED = ("update", "answer_log_probs")


class FastWeightActor(nn.Module):
    """Mixed into a model's class by :func:`make_actor`; state-dict keys and export stay those of the model.

    ``forward(mode=...)`` runs :meth:`rollout`, :meth:`update`, :meth:`score`, (``generate``) :meth:`answer` or
    :meth:`answer_log_probs`; without a mode it is the model's own forward pass.
    """

    adapter: ModelAdapter
    autocast_dtype: torch.dtype | None
    checkpoint_segments: bool
    forward_tokens: int

    def forward(self, *args: Any, mode: str | None = None, **kwargs: Any) -> Any:
        if mode is None:
            return super().forward(*args, **kwargs)
        run: Callable[..., Any] = getattr(self, _MODES[mode])
        with self._autocast(), nullcontext() if mode in _TRAINED else torch.no_grad():
            return run(*args, **kwargs)

    # The modes

    def rollout(
        self,
        documents: Documents,
        nsp: NSPSettings,
        draws: RolloutDraws,
        snapshots: int,
        read_together: int | None = None,
    ) -> RolloutBatch:
        """Steps 1 and 2 of the paper: choose positions by entropy, continue from each (Eq. 5-8).

        Args:
            documents: as many as are to be continued together.
            nsp: c, k, n and how to select and sample.
            draws: the random numbers to use.
            snapshots: in how many segments to read (:func:`snapshot_count`); the same on all ranks.
            read_together: documents per pass over S; None: all of them.
        """
        size = read_together or len(documents)
        parts = zip(documents.split(size), draws.positions.split(size), strict=True)
        readings = [self._look(part, nsp, uniforms, snapshots) for part, uniforms in parts]
        positions = torch.cat([reading.positions for reading in readings])
        if nsp.rollout == "prefix":
            tokens, log_probs, predicted = reference.rollout(self, documents, positions, nsp, draws.tokens)
        else:
            last = torch.cat([reading.last for reading in readings])
            state = FastWeightState.stack([reading.state for reading in readings if reading.state is not None])
            tokens, log_probs, predicted = self._continue(last, state, nsp, draws.tokens)
        return RolloutBatch(
            positions=positions,
            tokens=tokens,
            log_probs=log_probs,
            predicted_hidden=predicted,
            target_hidden=torch.cat([reading.target_hidden for reading in readings]),
            target_tokens=torch.cat([reading.target_tokens for reading in readings]),
            entropy_mean=torch.cat([reading.entropy_mean for reading in readings]),
            entropy_selected=torch.cat([reading.entropy_selected for reading in readings]),
        )

    def update(self, documents: Documents, branches: Branches | None, nsp: NSPSettings) -> dict[str, Tensor]:
        """The pass that is trained (step 4): the document as a trunk, the rollouts as branches of its states.

        Args:
            documents: the micro-batch.
            branches: positions and rollouts; None for the next-token loss alone.
            nsp: the settings the rollouts were made with.

        Returns:
            ``ntp_loss_sum``: scalar, sum of -log p(x_{j+1} | x_0..x_j) over all documents (Eq. 2);
            ``log_probs``: [N * c * n, k] of the rollouts' tokens under the current policy (absent without branches).
        """
        if branches is None:
            borders = documents.even_cuts(nsp.chunks + 1 if self.checkpoint_segments else 1)
            parts, _, order = self._trunk(documents, borders, keep=())
            targets = torch.cat([segment.targets for segment in order])
            return {"ntp_loss_sum": self._next_token_loss(documents, torch.cat(parts), targets)}
        if nsp.rollout == "prefix":
            return reference.update(self, documents, branches, nsp)
        hidden, targets, last, state = self._fork(documents, branches)
        loss = self._next_token_loss(documents, hidden, targets)
        # all forked states under each other, k-1 tokens each, in one pass
        return {"ntp_loss_sum": loss, "log_probs": self._branch_log_probs(last, state, branches.tokens, nsp)}

    def score(self, documents: Documents) -> tuple[Tensor, Tensor]:
        """Next-token loss and accuracy of each document.

        Returns:
            Sum of -log p(x_{j+1} | x_0..x_j), float32 [N], and number of right argmaxes, int64 [N], each over
            the T-1 predicted tokens.
        """
        packed = documents.cut([0] * len(documents), documents.lengths)
        hidden, _ = self.run(packed, None, keep_state=False)
        loss, correct = self._head(hidden, "score", targets=_next_tokens(documents, packed, documents.lengths))
        lengths = documents.lengths
        return (
            torch.stack([part.sum() for part in loss.split(lengths)]),
            torch.stack([part.sum() for part in correct.split(lengths)]),
        )

    def answer(self, prompts: Documents, **kwargs: Any) -> answers.Answers:
        """Write answers to prompts; see :func:`refine_verl.models.answers.write`."""
        return answers.write(self, prompts, **kwargs)

    def answer_log_probs(
        self, prompts: Documents, tokens: Tensor, lengths: Tensor, temperature: float, segments: int
    ) -> dict[str, Tensor]:
        """``log_probs`` [N * n, A] of answers, to be trained; see :func:`refine_verl.models.answers.log_probs`."""
        return {"log_probs": answers.log_probs(self, prompts, tokens, lengths, temperature, segments)}

    # The passes they are made of

    def run(
        self, packed: Packed, state: FastWeightState | None, keep_state: bool
    ) -> tuple[Tensor, FastWeightState | None]:
        """One pass of the trunk: hidden states [tokens, d] in the order of the runs, and the state after them."""
        self.forward_tokens += packed.tokens.numel()
        hidden, after = self.adapter.run(self, packed, state, keep_state)
        return hidden.reshape(-1, hidden.shape[-1]), after

    def _look(self, documents: Documents, nsp: NSPSettings, uniforms: Tensor, snapshots: int) -> _Reading:
        """Read documents and choose positions in them; ``uniforms`` [N, c] decide."""
        hidden, trace = self._read(documents, snapshots if nsp.rollout == "fork" else 0)
        entropy = list(self._head(torch.cat(hidden), "entropy").split(documents.lengths))
        rows = range(len(documents))
        positions = torch.stack([self._select(entropy[b], nsp, uniforms[b]) for b in rows]).to(documents.tokens.device)
        places = positions[..., None] + torch.arange(1, nsp.rollout_length + 1, device=positions.device)
        return _Reading(
            positions=positions,
            last=torch.cat([hidden[b][positions[b]] for b in rows]),
            state=None if trace is None else trace.after(positions),
            target_hidden=torch.stack([hidden[b][places[b]] for b in rows]),
            target_tokens=torch.stack([documents.tokens[b][places[b]] for b in rows]),
            entropy_mean=torch.stack([part[:-1].mean() for part in entropy]),
            entropy_selected=torch.stack([part[at] for part, at in zip(entropy, positions, strict=True)]),
        )

    def _read(self, documents: Documents, snapshots: int) -> tuple[list[Tensor], Trace | None]:
        """One pass over S: hidden states [T, d] of each document, and its states (None for 0 ``snapshots``)."""
        if snapshots == 0:
            packed = documents.cut([0] * len(documents), documents.lengths)
            return list(self.run(packed, None, keep_state=False)[0].split(packed.lengths)), None
        return self._trace(documents) or read_in_segments(self.run, documents, snapshots)

    def _trace(self, documents: Documents) -> tuple[list[Tensor], Trace] | None:
        if not isinstance(self.adapter, TracingAdapter):
            return None
        traced = self.adapter.trace(self, documents)
        if traced is not None:
            self.forward_tokens += documents.total
        return traced

    @staticmethod
    def _select(entropy: Tensor, nsp: NSPSettings, draws: Tensor) -> Tensor:
        return select_positions(
            align_entropy(entropy),
            chunks=nsp.chunks,
            rollout_length=nsp.rollout_length,
            strategy=nsp.selection,
            anchor=nsp.anchor,
            temperature=nsp.entropy_temperature,
            window=nsp.smoothing_window,
            uniforms=draws,
        )

    def _continue(
        self, last: Tensor, state: FastWeightState, nsp: NSPSettings, draws: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write k tokens from each of N * c states, n times (Eq. 7).

        Args:
            last: [N * c, d] hidden state at x_t.
            state: [N * c] rows, after x_t.
            nsp: n, k and the sampling temperature.
            draws: [N, c, n, k].

        Returns:
            tokens and log-probabilities [N, c, n, k], hidden states at the tokens [N, c, n, k, d].
        """
        state = state.fork(nsp.rollouts_per_position)
        hidden = last.repeat_interleave(nsp.rollouts_per_position, dim=0)
        uniforms = draws.flatten(0, 2).to(last.device)
        tokens, log_probs, states = [], [], []
        for step in range(nsp.rollout_length):
            token, log_prob = sample_from_logits(self._head(hidden), uniforms[:, step], nsp.temperature)
            hidden, after = self.run(_column(token), state, keep_state=True)
            assert after is not None
            state = after
            tokens.append(token)
            log_probs.append(log_prob)
            states.append(hidden)
        shape = draws.shape
        return (
            torch.stack(tokens, dim=1).view(shape),
            torch.stack(log_probs, dim=1).view(shape),
            torch.stack(states, dim=1).view(*shape, -1),
        )

    def _fork(self, documents: Documents, branches: Branches) -> tuple[Tensor, Tensor, Tensor, FastWeightState]:
        """Read S and fork its state after every chosen position.

        Returns:
            Hidden states [tokens, d] of the documents and the token each predicts [tokens], in any one order; hidden
            states [N * c, d] at x_t and states after x_t ([N * c] rows), document by document.
        """
        traced = None if self.checkpoint_segments else self._trace(documents)
        if traced is not None:
            parts, trace = traced
            whole = documents.cut([0] * len(documents), documents.lengths)
            last = torch.cat([part[at] for part, at in zip(parts, branches.positions, strict=True)])
            targets = _next_tokens(documents, whole, documents.lengths)
            return torch.cat(parts), targets, last, trace.after(branches.positions)
        # in c+1 segments cut after the chosen positions, the state carried from one to the next
        borders = [[0] * len(documents), *branches.cuts, list(documents.lengths)]
        chunks = len(branches.cuts)
        hidden, states, order = self._trunk(documents, borders, keep=range(chunks))
        last = torch.stack([part[run.last] for part, run in zip(hidden[:-1], order[:-1], strict=True)], dim=1)
        picks = [(chunk, b) for b in range(len(documents)) for chunk in range(chunks)]
        targets = torch.cat([segment.targets for segment in order])
        return torch.cat(hidden), targets, last.flatten(0, 1), FastWeightState.gather(states, picks)

    def _trunk(
        self, documents: Documents, borders: list[list[int]], keep: Sequence[int]
    ) -> tuple[list[Tensor], list[FastWeightState], list[_Segment]]:
        """Read S segment by segment, keeping the states after the segments in ``keep``."""
        hidden, states, order = [], [], []
        state: FastWeightState | None = None
        last = len(borders) - 2
        for index, (starts, stops) in enumerate(zip(borders, borders[1:], strict=False)):
            packed = documents.cut(starts, stops)
            part, state = self._segment(packed, state, keep_state=index < last)
            if index in keep and state is not None:
                states.append(state)
            hidden.append(part)
            order.append(_Segment(packed.last, _next_tokens(documents, packed, stops)))
        return hidden, states, order

    def _segment(
        self, packed: Packed, state: FastWeightState | None, keep_state: bool
    ) -> tuple[Tensor, FastWeightState | None]:
        """``run``; with activation checkpointing it is run again in the backward pass, from state to state."""
        if not (self.checkpoint_segments and torch.is_grad_enabled()):
            return self.run(packed, state, keep_state)
        tensors, rebuild = state.flatten() if state is not None else ([], None)
        trees: list[Callable[[Sequence[Tensor]], FastWeightState]] = []

        def body(*inputs: Tensor) -> tuple[Tensor, ...]:
            hidden, after = self.run(packed, rebuild(inputs) if rebuild else None, keep_state)
            if after is None:
                return (hidden,)
            outputs, tree = after.flatten()
            trees.append(tree)
            return (hidden, *outputs)

        # model states are explicit inputs and outputs: a cache captured by the closure would be read twice
        hidden, *outputs = checkpoint(body, *tensors, use_reentrant=False, preserve_rng_state=False)
        return hidden, trees[0](outputs) if keep_state else None

    def _branch_log_probs(self, last: Tensor, state: FastWeightState, tokens: Tensor, nsp: NSPSettings) -> Tensor:
        """Log-probabilities of the rollouts from the forked states.

        Args:
            last: [N * c, d] hidden state at x_t.
            state: [N * c] rows, after x_t.
            tokens: int64 [N, c, n, k].
            nsp: n, k, temperature and how far the gradient goes.

        Returns:
            [N * c * n, k], in the order of ``tokens``.
        """
        copies, length = tokens.shape[2:]
        tokens = tokens.flatten(0, 2)
        if nsp.grad_scope == "branch":
            last, state = last.detach(), state.detach()
        hidden = last.repeat_interleave(copies, dim=0).unsqueeze(1)
        if length > 1:
            rest = Packed(tokens[:, :-1], (length - 1,) * len(tokens), None)
            after, _ = self._segment(rest, state.fork(copies), keep_state=False)
            hidden = torch.cat([hidden, after.view(*rest.tokens.shape, -1)], dim=1)
        return self.log_probs(hidden, tokens, nsp.temperature)

    def log_probs(self, hidden: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        """Log-probabilities [R, k] of ``tokens`` [R, k], each predicted from ``hidden`` [R, k, d]."""
        flat = self._head(hidden.flatten(0, 1), "log_probs", targets=tokens.flatten(), temperature=temperature)
        return flat.view(tokens.shape)

    def _next_token_loss(self, documents: Documents, hidden: Tensor, targets: Tensor) -> Tensor:
        if documents.learn_from is not None:
            # most tokens may be a prompt's, and logits of these are not worth making
            hidden, targets = hidden[targets != IGNORED], targets[targets != IGNORED]
        return self._head(hidden, "cross_entropy", targets=targets)

    def _head(self, hidden: Tensor, task: str = "logits", **kwargs: Any) -> Any:
        return self.get_output_embeddings()(hidden, task=task, **kwargs)  # type: ignore[operator]

    def _autocast(self) -> AbstractContextManager[Any]:
        """bf16 matmuls over float32 parameters.

        Without autocast's weight cache: cached bf16 copies collect the gradients of all passes in bf16.
        """
        if self.autocast_dtype is None:
            return nullcontext()
        device = next(self.parameters()).device.type
        return torch.autocast(device, dtype=self.autocast_dtype, cache_enabled=False)


@dataclass(frozen=True)
class _Reading:
    """What stays of a pass over S: the fields of `RolloutBatch` that it decides, and at every position x_t the hidden
    state ``last`` [N * c, d] and the ``state`` ([N * c] rows; None where prefixes are run again)."""

    positions: Tensor
    last: Tensor
    state: FastWeightState | None
    target_hidden: Tensor
    target_tokens: Tensor
    entropy_mean: Tensor
    entropy_selected: Tensor


@dataclass(frozen=True)
class _Segment:
    """Where the runs of a packed segment end (``last`` [N]) and what each token predicts (``targets`` [tokens])."""

    last: Tensor
    targets: Tensor


def _next_tokens(documents: Documents, packed: Packed, stops: Sequence[int]) -> Tensor:
    """Target of every token of a packed segment: its successor, IGNORED for the last token of a document and
    for what lies before `Documents.learn_from`."""
    runs = []
    for b, (length, stop) in enumerate(zip(packed.lengths, stops, strict=True)):
        following = documents.tokens[b, stop - length + 1 : stop + 1]
        if stop == documents.lengths[b]:
            following = torch.cat([following[: length - 1], following.new_full((1,), IGNORED)])
        if documents.learn_from is not None:
            skipped = min(max(documents.learn_from[b] - (stop - length + 1), 0), length)
            following = torch.cat([following.new_full((skipped,), IGNORED), following[skipped:]])
        runs.append(following)
    return torch.cat(runs)


def _column(tokens: Tensor) -> Packed:
    """One token for each of R sequences."""
    return Packed(tokens.unsqueeze(1), (1,) * tokens.shape[0], None)


Module = TypeVar("Module", bound=nn.Module)


def swap_class(module: Module, mixin: type[nn.Module]) -> Module:
    """Give ``module`` the methods of ``mixin`` in place: same parameters, same names, same class name.

    A wrapper module would rename every key of the state dict, and a checkpoint with renamed keys reloads with
    silently re-initialised weights.
    """
    kind = type(module)
    if not issubclass(kind, mixin):
        module.__class__ = type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})
    return module


def make_actor(
    model: nn.Module,
    *,
    adapter: ModelAdapter | None = None,
    autocast_dtype: torch.dtype | None = None,
    checkpoint_segments: bool = False,
) -> FastWeightActor:
    """Turn a causal language model into a :class:`FastWeightActor`, in place.

    Args:
        model: a Hugging Face causal language model with a linear LM head and an adapter for its ``model_type``.
        adapter: used instead of the registered one.
        autocast_dtype: dtype of matmuls (bfloat16 on GPUs); None computes in the dtype of the parameters.
        checkpoint_segments: keep only the state between segments and recompute the rest in the backward pass.

    Raises:
        TypeError: the LM head is not an ``nn.Linear``.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise TypeError(f"the LM head of {type(model).__name__} is a {type(head).__name__}; an nn.Linear is needed")
    swap_class(head, FusedHead)
    actor = swap_class(model, FastWeightActor)
    assert isinstance(actor, FastWeightActor)
    actor.adapter = adapter or get_adapter(model.config.model_type)  # type: ignore[union-attr, arg-type]
    actor.autocast_dtype = autocast_dtype
    actor.checkpoint_segments = checkpoint_segments
    actor.forward_tokens = 0
    return actor
