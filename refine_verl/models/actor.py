"""The policy: a causal language model whose one forward pass knows every way REFINE runs it.

FSDP2 gathers parameters only while the root module's forward pass runs, so all of it happens in there: reading a
document, forking its state, writing rollouts, and the trunk-and-branches pass that is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from refine_verl.config import NSPSettings
from refine_verl.models import answers, reference
from refine_verl.models.adapters import ModelAdapter, get_adapter
from refine_verl.models.head import FusedHead
from refine_verl.models.packing import Documents
from refine_verl.models.passes import Passes
from refine_verl.models.rollouts import Branches, RolloutBatch, RolloutDraws
from refine_verl.models.state import FastWeightState

# Replaying from the nearest snapshot then costs at most c * T / (8 c) = T / 8 tokens for all positions together.
SNAPSHOTS_PER_CHUNK = 8


def snapshot_count(chunks: int, max_length: int) -> int:
    """Segments in which documents of at most ``max_length`` tokens are read while their states are kept.

    A function of settings alone: under FSDP every rank has to make the same number of passes.
    """
    return min(SNAPSHOTS_PER_CHUNK * chunks, max_length)


class FastWeightActor(Passes):
    """Mixed into a model's class by :func:`make_actor`; state-dict keys and export stay those of the model.

    ``forward(mode=...)`` runs :meth:`rollout`, :meth:`update`, :meth:`score`, (``generate``)
    :func:`refine_verl.models.answers.write` or (``answer_log_probs``) :func:`refine_verl.models.answers.log_probs`;
    without a mode it is the model's own forward pass.
    """

    def forward(self, *args: Any, mode: str | None = None, **kwargs: Any) -> Any:
        if mode is None:
            return super().forward(*args, **kwargs)
        with self.autocast(), nullcontext() if mode in _TRAINED else torch.no_grad():
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
        else:
            shape, copies = draws.tokens.shape, nsp.rollouts_per_position
            last = torch.cat([part for _, part, _ in readings]).repeat_interleave(copies, dim=0)
            state = FastWeightState.stack([part for _, _, part in readings if part is not None]).fork(copies)
            uniforms, never = draws.tokens.flatten(0, 2), self.forbidden(nsp)
            written = self.write(last, state, uniforms, nsp.temperature, keep_hidden=True, forbidden=never)
            assert written.hidden is not None
            tokens, log_probs = written.tokens.view(shape), written.log_probs.view(shape)
            predicted = written.hidden.view(*shape, -1)
        return RolloutBatch(tokens=tokens, log_probs=log_probs, predicted_hidden=predicted, **found)

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
            return {"ntp_loss_sum": self.read_to_train(documents, nsp.chunks)}
        if nsp.rollout == "prefix":
            return reference.update(self, documents, branches, nsp)
        forks = self.fork(documents, branches)
        loss = self.next_token_loss(documents, forks.hidden, forks.targets)
        return {"ntp_loss_sum": loss, "log_probs": self.branch(forks.last, forks.state, branches.tokens, nsp)}

    def score(self, documents: Documents) -> tuple[Tensor, Tensor]:
        """Next-token loss and accuracy of each document.

        Returns:
            Sum of -log p(x_{j+1} | x_0..x_j), float32 [N], and number of right argmaxes, int64 [N], each over
            the T-1 predicted tokens.
        """
        hidden, _ = self.run(documents.whole, None, keep_state=False)
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
        hidden, trace = self.read(documents, snapshots if nsp.rollout == "fork" else 0)
        entropy = list(self.apply_head(torch.cat(hidden), "entropy").split(documents.lengths))
        rows = range(len(documents))
        tokens = [documents.tokens[b, :length] for b, length in enumerate(documents.lengths)]
        chosen = [self.select(entropy[b], hidden[b], tokens[b], nsp, uniforms[b]) for b in rows]
        positions = torch.stack(chosen).to(documents.tokens.device)
        places = positions[..., None] + torch.arange(1, nsp.rollout_length + 1, device=positions.device)
        fields = {
            "positions": positions,
            "target_hidden": torch.stack([hidden[b][places[b]] for b in rows]),
            "target_tokens": torch.stack([tokens[b][places[b]] for b in rows]),
            "entropy_mean": torch.stack([part[:-1].mean() for part in entropy]),
            "entropy_selected": torch.stack([part[at] for part, at in zip(entropy, positions, strict=True)]),
        }
        last = torch.cat([hidden[b][positions[b]] for b in rows])
        return fields, last, None if trace is None else trace.after(positions)


_MODES: dict[str, Callable[..., Any]] = {
    "rollout": FastWeightActor.rollout,
    "update": FastWeightActor.update,
    "score": FastWeightActor.score,
    "generate": answers.write,
    "answer_log_probs": answers.log_probs,
}
_TRAINED = ("update", "answer_log_probs")

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
    actor.end_tokens = answers.end_tokens_of(actor)
    return actor
