"""The policy: a causal language model whose one forward pass knows every way REFINE runs it.

FSDP2 gathers parameters only while the root module's forward pass runs, so all of it happens in there: reading a
document, forking its state, writing rollouts, and the trunk-and-branches pass that is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from refine_verl.config import NSPSettings, RolloutLength
from refine_verl.models import answers, keeping, reference
from refine_verl.models.adapters import ModelAdapter, RoutingAdapter, adapter_for
from refine_verl.models.head import FusedHead
from refine_verl.models.packing import Documents
from refine_verl.models.passes import Passes, Written
from refine_verl.models.pieces import in_pieces, piece_count
from refine_verl.models.rollouts import Branches, RolloutBatch, RolloutDraws
from refine_verl.models.state import FastWeightState
from refine_verl.models.trace import Trace
from refine_verl.nsp import looks_at_writes, rollout_lengths

# Replaying from the nearest snapshot then costs at most c * T / (8 c) = T / 8 tokens for all positions together.
SNAPSHOTS_PER_CHUNK = 8


def snapshot_count(chunks: int, max_length: int) -> int:
    """Segments in which documents of at most ``max_length`` tokens are read while their states are kept.

    A function of settings alone: under FSDP every rank has to make the same number of passes.
    """
    return min(SNAPSHOTS_PER_CHUNK * chunks, max_length)


class FastWeightActor(Passes):
    """Mixed into a model's class by :func:`make_actor`; state-dict keys and export stay those of the model.

    ``forward(mode=...)`` runs :meth:`rollout`, :meth:`update`, :meth:`on_policy`, :meth:`score`, (``generate``)
    :func:`refine_verl.models.answers.write`, (``answer_log_probs``) :func:`refine_verl.models.answers.log_probs` or
    (``read_on``, ``bytes_per_token``, ``first_state``) the functions of these names in
    :mod:`refine_verl.models.keeping`; without a mode it is the model's own forward pass.
    """

    def forward(self, *args: Any, mode: str | None = None, **kwargs: Any) -> Any:
        if mode is None:
            return super().forward(*args, **kwargs)
        trains = mode in _TRAINED
        with self.computing(trains):
            return _MODES[mode](self, *args, **kwargs)

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
        readings = [self._read_and_select(part, nsp, uniforms, snapshots) for part, uniforms in parts]
        found = {name: torch.cat([fields[name] for fields, _, _ in readings]) for name in readings[0][0]}
        if nsp.rollout == "prefix":
            tokens, log_probs, predicted = reference.rollout(self, documents, found["positions"], nsp, draws.tokens)
            return RolloutBatch(tokens=tokens, log_probs=log_probs, predicted_hidden=predicted, **found)
        last = torch.cat([part for _, part, _ in readings])
        state = FastWeightState.stack([part for _, _, part in readings if part is not None])
        written, shape = self._continue(last, state, nsp, draws, keep_hidden=True), draws.tokens.shape
        assert written.hidden is not None
        return RolloutBatch(
            tokens=written.tokens.view(shape),
            log_probs=written.log_probs.view(shape),
            predicted_hidden=written.hidden.view(*shape, -1),
            routes=_routes_of(written, shape),
            **found,
        )

    def on_policy(
        self, documents: Documents, nsp: NSPSettings, draws: RolloutDraws, snapshots: int
    ) -> tuple[RolloutBatch, dict[str, Tensor]]:
        """`rollout` and `update` in one: S is read once, with gradients, and rollouts start from its detached states.

        The branches, which are trained, read the rollouts' last tokens as well: rewards take their hidden states there.
        Where they are in pieces, which are read twice, it is cheaper to read those tokens when they are written.

        Where activations are recomputed, or states cannot be had from one pass, S is read once more for the rollouts.

        Args:
            documents: the micro-batch.
            nsp, draws, snapshots: see `rollout`.

        Returns:
            The rollouts, without gradients, and what `update` returns for them.
        """
        traced = None if self.activation_checkpointing != "none" else self.trace(documents)
        if traced is None:
            with self.computing(trains=False), evaluating(self):
                rollouts = self.rollout(documents, nsp, draws, snapshots)
            return rollouts, self.update(documents, Branches(rollouts.positions, rollouts.tokens), nsp)
        (parts, trace), balance = traced, self.balance_loss(documents)
        targets = documents.next_tokens(documents.whole, documents.lengths)
        loss, entropy = self.next_token_loss_and_entropy(torch.cat(parts), targets)
        with torch.no_grad():
            detached = [part.detach() for part in parts]
            found, positions = self._select(documents, detached, entropy, trace, nsp, draws.positions)
        forks, shape = self.forks_of(documents, parts, trace, positions), draws.tokens.shape
        pieces = piece_count(shape[0] * shape[1], shape[2], nsp.rollouts_together)
        with self.computing(trains=False), evaluating(self):
            written = self._continue(forks.last.detach(), forks.state.detach(), nsp, draws, keep_hidden=pieces > 1)
        tokens = written.tokens.view(shape)
        if written.hidden is None:
            trained, predicted = self.branch_and_read(forks.last, forks.state, tokens, nsp)
        else:
            trained, predicted = self.branch(forks.last, forks.state, tokens, nsp), written.hidden
        rollouts = RolloutBatch(
            tokens=tokens,
            log_probs=written.log_probs.view(shape),
            predicted_hidden=predicted.view(*shape, -1),
            routes=_routes_of(written, shape),
            **found,
        )
        return rollouts, {"ntp_loss_sum": loss, **balance, **trained}

    def update(self, documents: Documents, branches: Branches | None, nsp: NSPSettings) -> dict[str, Tensor]:
        """The pass that is trained (step 4): the document as a trunk, the rollouts as branches of its states.

        Args:
            documents: the micro-batch.
            branches: positions and rollouts; None for the next-token loss alone.
            nsp: the settings the rollouts were made with.

        Returns:
            ``ntp_loss_sum``: scalar, sum of -log p(x_{j+1} | x_0..x_j) over all documents (Eq. 2);
            ``log_probs``: [N * c * n, k] of the rollouts' tokens under the current policy (absent without branches);
            ``routes``: see `branch`; ``balance_loss_sum``: see `balance_loss`.
        """
        if branches is None:
            return {"ntp_loss_sum": self.read_to_train(documents, nsp.chunks), **self.balance_loss(documents)}
        if nsp.rollout == "prefix":
            return reference.update(self, documents, branches, nsp)
        forks = self.fork(documents, branches)
        balance = self.balance_loss(documents)
        loss = self.next_token_loss(documents, forks.hidden, forks.targets)
        return {"ntp_loss_sum": loss, **balance, **self.branch(forks.last, forks.state, branches.tokens, nsp)}

    def score(self, documents: Documents) -> tuple[Tensor, Tensor]:
        """Next-token loss and accuracy of each document.

        Returns:
            Sum of -log p(x_{j+1} | x_0..x_j), float32 [N], and number of right argmaxes, int64 [N], each over
            the T-1 predicted tokens.
        """
        hidden, _ = self.run(documents.whole, documents.before, keep_state=False)
        targets = documents.next_tokens(documents.whole, documents.lengths)
        loss, correct = self.apply_head(hidden, "score", targets=targets)
        return (
            torch.stack([part.sum() for part in loss.split(documents.lengths)]),
            torch.stack([part.sum() for part in correct.split(documents.lengths)]),
        )

    def _read_and_select(
        self, documents: Documents, nsp: NSPSettings, uniforms: Tensor, snapshots: int
    ) -> tuple[dict[str, Tensor], Tensor, FastWeightState | None]:
        """Read documents and choose positions in them; ``uniforms`` [N, c] decide.

        Returns:
            The fields of `RolloutBatch` that this decides, and at every position x_t the hidden state [N * c, d] and
            the state ([N * c] rows; None where prefixes are run again).
        """
        forks = nsp.rollout == "fork"
        hidden, trace = self.read(documents, snapshots if forks or looks_at_writes(nsp) else 0)
        entropy = self.apply_head(torch.cat(hidden), "entropy")
        fields, positions = self._select(documents, hidden, entropy, trace, nsp, uniforms)
        last = torch.cat([part[at] for part, at in zip(hidden, fields["positions"], strict=True)])
        return fields, last, trace.after(positions) if trace is not None and forks else None

    def _select(
        self,
        documents: Documents,
        hidden: list[Tensor],
        entropies: Tensor,
        trace: Trace | None,
        nsp: NSPSettings,
        uniforms: Tensor,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Choose positions; the fields of `RolloutBatch` that this decides, and the positions [N, c] on the CPU.

        Args:
            documents: N of them.
            hidden: [T, d] of each document.
            entropies: [tokens], of the predictions made from all their tokens.
            trace: of the pass, if there is one.
            nsp: how to select.
            uniforms: [N, c], they decide.
        """
        entropy = entropies.split(documents.lengths)
        rows = range(len(documents))
        tokens = [documents.tokens[b, :length] for b, length in enumerate(documents.lengths)]
        on_cpu = entropies.cpu().split(documents.lengths)  # the host waits once
        writes = self.write_norms(documents, trace, nsp)
        chosen = torch.stack([self.select(on_cpu[b], hidden[b], tokens[b], writes[b], nsp, uniforms[b]) for b in rows])
        positions = chosen.to(documents.tokens.device, non_blocking=True)
        places = positions[..., None] + torch.arange(1, nsp.longest_rollout + 1, device=positions.device)
        fields = {
            "positions": positions,
            "target_hidden": torch.stack([hidden[b][places[b]] for b in rows]),
            "target_tokens": torch.stack([tokens[b][places[b]] for b in rows]),
            "entropy_mean": torch.stack([part[:-1].mean() for part in entropy]),
            "entropy_selected": torch.stack([part[at] for part, at in zip(entropy, positions, strict=True)]),
        }
        if isinstance(nsp.rollout_length, RolloutLength):
            ends = self.sentence_ends_of(nsp, positions.device)
            parts = [rollout_lengths(nsp.rollout_length, positions[b], entropy[b], tokens[b], ends) for b in rows]
            fields["lengths"] = torch.stack(parts)
        return fields, chosen

    def _continue(
        self, last: Tensor, state: FastWeightState, nsp: NSPSettings, draws: RolloutDraws, *, keep_hidden: bool
    ) -> Written:
        """Write n rollouts from every position, ``refine.nsp.rollouts_together`` of them at a time: [N * c * n] rows.

        Args:
            last: [N * c, d], hidden states at the positions.
            state: [N * c] rows, after them.
            nsp, draws: see `rollout`.
            keep_hidden: whether the hidden states at the tokens are wanted.
        """

        def body(last: Tensor, state: FastWeightState, draws: Tensor) -> tuple[Tensor, ...]:
            copies = draws.shape[1]
            written = self.write(
                last.repeat_interleave(copies, dim=0),
                state.fork(copies),
                draws.flatten(0, 1),
                nsp.temperature,
                keep_hidden=keep_hidden,
                forbidden=self.forbidden(nsp),
            )
            found = (written.tokens, written.log_probs, written.hidden, written.routes)
            return tuple(part.unflatten(0, draws.shape[:2]) for part in found if part is not None)

        found = in_pieces(body, last, state, draws.tokens.flatten(0, 1), nsp.rollouts_together)
        tokens, log_probs, *others = (part.flatten(0, 1) for part in found)
        rest = iter(others)
        return Written(tokens, log_probs, next(rest) if keep_hidden else None, next(rest, None))


def _routes_of(written: Written, shape: torch.Size) -> Tensor | None:
    """Routes of those tokens that the trained pass reads, too, [N, c, n, k - 1]; ``shape`` is [N, c, n, k]."""
    if written.routes is None or shape[-1] == 1:
        return None
    return written.routes[:, : shape[-1] - 1].reshape(*shape[:-1], -1)


_MODES: dict[str, Callable[..., Any]] = {
    "rollout": FastWeightActor.rollout,
    "update": FastWeightActor.update,
    "on_policy": FastWeightActor.on_policy,
    "score": FastWeightActor.score,
    "generate": answers.write,
    "answer_log_probs": answers.log_probs,
    "read_on": keeping.read_on,
    "bytes_per_token": keeping.bytes_per_token,
    "first_state": keeping.first_state,
}
_TRAINED = ("update", "on_policy", "answer_log_probs")

Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside a training pass, for rollouts: fla takes other kernels for single tokens then."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
    activation_checkpointing: str = "none",
    reading: str = "whole",
    balance_coef: float = 0.0,
) -> FastWeightActor:
    """Turn a causal language model into a :class:`FastWeightActor`, in place.

    Args:
        model: a Hugging Face causal language model with a linear LM head and an adapter for its ``model_type``.
        adapter: used instead of the registered one.
        autocast_dtype: dtype of matmuls (bfloat16 on GPUs); None computes in the dtype of the parameters.
        activation_checkpointing: what is computed again in the backward pass instead of kept: ``none``; ``layer``, all
            but each layer's input and its states at the positions; ``segment``, all but the states between segments.
        reading: for rollouts ``whole``, keeping all that states can be had from, or in ``segments``, keeping those
            between.
        balance_coef: weight of the load-balance loss of a model's experts in what `update` returns.

    Raises:
        TypeError: the LM head is not an ``nn.Linear``.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise TypeError(f"the LM head of {type(model).__name__} is a {type(head).__name__}; an nn.Linear is needed")
    swap_class(head, FusedHead)
    actor = swap_class(model, FastWeightActor)
    assert isinstance(actor, FastWeightActor)
    actor.adapter = adapter or adapter_for(model.config)
    actor.autocast_dtype = autocast_dtype
    actor.activation_checkpointing, actor.reading = activation_checkpointing, reading
    actor.balance_coef = balance_coef
    if balance_coef:
        assert isinstance(actor.adapter, RoutingAdapter)
        actor.adapter.balances = True
    actor.forward_tokens = 0
    actor.end_tokens, actor.sentence_ends = answers.end_tokens_of(actor), ()
    return actor
