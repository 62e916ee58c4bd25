"""The slow way: every prefix is run again from its first token (``refine.nsp.rollout=prefix``).

No snapshot, no fork. This is what the forked passes must equal, value by value and gradient by gradient, and the
baseline they are timed against. It runs, per document, what the authors' code runs, without its padding: for every
rollout one cached pass over the prefix to write, one plain pass to score, one plain pass to train.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from refine_verl.config import NSPSettings
from refine_verl.models.packing import Documents, Packed, pack
from refine_verl.models.passes import Passes
from refine_verl.models.rollouts import Branches
from refine_verl.models.state import FastWeightState


def rollout(
    actor: Passes, documents: Documents, positions: Tensor, nsp: NSPSettings, draws: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the rollouts; same arguments and results as forking.

    Args:
        actor: the policy.
        documents: the micro-batch.
        positions: int64 [N, c].
        nsp: n, k and the sampling temperature.
        draws: [N, c, n, k].

    Returns:
        tokens and log-probabilities [N, c, n, k], hidden states at the tokens [N, c, n, k, d]. Only the tokens come
        from cached decoding; the other two are taken from one plain pass over prefix and rollout.
    """
    tokens, log_probs, hidden = [], [], []
    for chunk in range(nsp.chunks):
        prefixes = _prefixes(documents, positions[:, chunk], nsp.rollouts_per_position)
        packed = pack(prefixes)
        before = _before(documents, nsp.rollouts_per_position)
        states, after = actor.run(packed, before, keep_state=True)
        uniforms = draws[:, chunk].flatten(0, 1)
        written = actor.write(
            states[packed.last], after, uniforms, nsp.temperature, forbidden=actor.forbidden(nsp)
        ).tokens
        states = _plain_hidden(actor, prefixes, before, written, nsp.longest_rollout + 1)
        tokens.append(written)
        log_probs.append(actor.log_probs(states[:, :-1], written, nsp))
        hidden.append(states[:, 1:])
    shape = (len(documents), nsp.rollouts_per_position, nsp.longest_rollout)
    return (
        torch.stack([part.view(shape) for part in tokens], dim=1),
        torch.stack([part.view(shape) for part in log_probs], dim=1),
        torch.stack([part.view(*shape, -1) for part in hidden], dim=1),
    )


def update(actor: Passes, documents: Documents, branches: Branches, nsp: NSPSettings) -> dict[str, Tensor]:
    """The pass that is trained: the document once for the next-token loss, every prefix again for its rollouts."""
    loss = actor.read_to_train(documents, nsp.chunks)
    log_probs = []
    for chunk in range(nsp.chunks):
        prefixes = _prefixes(documents, branches.positions[:, chunk], nsp.rollouts_per_position)
        written = branches.tokens[:, chunk].flatten(0, 1)
        score = _branch_only if nsp.grad_scope == "branch" else _through_prefix
        before = _before(documents, nsp.rollouts_per_position)
        log_probs.append(score(actor, prefixes, before, written, nsp).view(len(documents), -1, nsp.longest_rollout))
    return {"ntp_loss_sum": loss, "log_probs": torch.stack(log_probs, dim=1).flatten(0, 2)}


def _prefixes(documents: Documents, positions: Tensor, copies: int) -> list[Tensor]:
    return [documents.tokens[b, : t + 1] for b, t in enumerate(positions.tolist()) for _ in range(copies)]


def _before(documents: Documents, copies: int) -> FastWeightState | None:
    return None if documents.before is None else documents.before.detach().fork(copies)


def _plain_hidden(
    actor: Passes, prefixes: list[Tensor], before: FastWeightState | None, tokens: Tensor, keep: int
) -> Tensor:
    """Hidden states [R, keep, d] at the last ``keep`` tokens of prefix + tokens, in one pass without forking."""
    packed = pack([torch.cat(pair) for pair in zip(prefixes, tokens, strict=True)])
    hidden, _ = actor.run(packed, before, keep_state=False)
    return torch.stack([part[-keep:] for part in hidden.split(packed.lengths)])


def _through_prefix(
    actor: Passes, prefixes: list[Tensor], before: FastWeightState | None, tokens: Tensor, nsp: NSPSettings
) -> Tensor:
    def body(inputs: Tensor) -> Tensor:
        return _plain_hidden(actor, prefixes, before, inputs, nsp.longest_rollout)

    inputs = tokens[:, :-1]
    if actor.checkpoint_segments:
        hidden = checkpoint(body, inputs, use_reentrant=False, preserve_rng_state=False)
    else:
        hidden = body(inputs)
    return actor.log_probs(hidden, tokens, nsp)


def _branch_only(
    actor: Passes, prefixes: list[Tensor], before: FastWeightState | None, tokens: Tensor, nsp: NSPSettings
) -> Tensor:
    """``grad_scope: branch``: everything up to and including x_t is a constant."""
    packed = pack(prefixes)
    with torch.no_grad():
        hidden, state = actor.run(packed, before, keep_state=True)
    last = hidden[packed.last].unsqueeze(1)
    if nsp.longest_rollout > 1:
        assert state is not None
        rest = Packed.of_rows(tokens[:, :-1])
        after, _ = actor.run(rest, state.detach(), keep_state=False)
        last = torch.cat([last, after.view(*rest.tokens.shape, -1)], dim=1)
    return actor.log_probs(last, tokens, nsp)
