"""The passes that all modes of the actor are made of: read a document, continue from its states, branch from them.

Everything here runs inside the actor's one forward pass (`refine_verl.models.actor`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from refine_verl.config import ConfigError, NSPSettings
from refine_verl.models.adapters import ModelAdapter, TracingAdapter
from refine_verl.models.packing import IGNORED, Documents, Packed
from refine_verl.models.rollouts import Branches
from refine_verl.models.state import FastWeightState
from refine_verl.models.trace import Trace, read_segments, read_with_snapshots
from refine_verl.nsp import align_entropy, sample_from_logits, select_positions, without


@dataclass(frozen=True)
class Written:
    """Tokens that R sequences were continued with.

    Attributes:
        tokens: int64 [R, steps].
        log_probs: float32 [R, steps], of the policy that wrote them.
        hidden: [R, steps, d], hidden states at the tokens; None unless asked for.
    """

    tokens: Tensor
    log_probs: Tensor
    hidden: Tensor | None


@dataclass(frozen=True)
class Forks:
    """S, read with its states after the chosen positions.

    Attributes:
        hidden: [tokens, d] of the documents, in any one order.
        targets: [tokens], what each of them predicts.
        last: [N * c, d], hidden states at x_t, document by document.
        state: [N * c] rows, after x_t.
    """

    hidden: Tensor
    targets: Tensor
    last: Tensor
    state: FastWeightState


class Passes(nn.Module):
    """Mixed into a model's class with the modes that use them."""

    adapter: ModelAdapter
    autocast_dtype: torch.dtype | None
    checkpoint_segments: bool
    forward_tokens: int
    end_tokens: Sequence[int]

    # One pass

    def run(
        self, packed: Packed, state: FastWeightState | None, keep_state: bool
    ) -> tuple[Tensor, FastWeightState | None]:
        """One pass of the trunk: hidden states [tokens, d] in the order of the runs, and the state after them."""
        self.forward_tokens += packed.tokens.numel()
        hidden, after = self.adapter.run(self, packed, state, keep_state)
        return hidden.reshape(-1, hidden.shape[-1]), after

    def segment(
        self, packed: Packed, state: FastWeightState | None, keep_state: bool
    ) -> tuple[Tensor, FastWeightState | None]:
        """`run`; with activation checkpointing it is run again in the backward pass, from state to state."""
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

    def apply_head(self, hidden: Tensor, task: str = "logits", **kwargs: Any) -> Any:
        """The LM head; see `refine_verl.models.head.FusedHead.forward` for the tasks."""
        return self.get_output_embeddings()(hidden, task=task, **kwargs)  # type: ignore[operator]

    def log_probs(self, hidden: Tensor, tokens: Tensor, nsp: NSPSettings) -> Tensor:
        """Log-probabilities [R, k] of a rollout's ``tokens`` [R, k], each predicted from ``hidden`` [R, k, d]."""
        flat: Tensor = self.apply_head(
            hidden.flatten(0, 1),
            "log_probs",
            targets=tokens.flatten(),
            temperature=nsp.temperature,
            forbidden=self.forbidden(nsp),
        )
        return flat.view(tokens.shape)

    def forbidden(self, nsp: NSPSettings) -> Sequence[int]:
        """Tokens that no rollout may have.

        Raises:
            ConfigError: end tokens are to be suppressed, and neither model nor tokenizer names one.
        """
        if nsp.end_tokens != "suppressed":
            return ()
        if not self.end_tokens:
            raise ConfigError(
                "refine.nsp.end_tokens", "suppressed needs a model or a tokenizer with an end token (eos_token_id)."
            )
        return self.end_tokens

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 matmuls over float32 parameters.

        Without autocast's weight cache: cached bf16 copies collect the gradients of all passes in bf16.
        """
        if self.autocast_dtype is None:
            return nullcontext()
        device = next(self.parameters()).device.type
        return torch.autocast(device, dtype=self.autocast_dtype, cache_enabled=False)

    # Read

    def read(self, documents: Documents, snapshots: int) -> tuple[list[Tensor], Trace | None]:
        """One pass over S: hidden states [T, d] of each document, and its states (None for 0 ``snapshots``)."""
        if snapshots == 0:
            packed = documents.whole
            return list(self.run(packed, None, keep_state=False)[0].split(packed.lengths)), None
        return self.trace(documents) or read_with_snapshots(self.run, documents, snapshots)

    def trace(self, documents: Documents) -> tuple[list[Tensor], Trace] | None:
        """`read` in one uncut pass with all its states; None where the adapter cannot."""
        if not isinstance(self.adapter, TracingAdapter):
            return None
        traced = self.adapter.trace(self, documents)
        if traced is not None:
            self.forward_tokens += documents.total
        return traced

    def read_to_train(self, documents: Documents, chunks: int) -> Tensor:
        """The next-token loss of S alone, in c + 1 segments where activations are recomputed; see `next_token_loss`."""
        borders = documents.even_cuts(chunks + 1 if self.checkpoint_segments else 1)
        parts = [
            (part.hidden, documents.next_tokens(part.packed, part.stops))
            for part in read_segments(self.segment, documents, borders)
        ]
        hidden, targets = (torch.cat(column) for column in zip(*parts, strict=True))
        return self.next_token_loss(documents, hidden, targets)

    def next_token_loss(self, documents: Documents, hidden: Tensor, targets: Tensor) -> Tensor:
        """Scalar, sum of -log p(x_{j+1} | x_0..x_j) over all documents (Eq. 2).

        Args:
            documents: S.
            hidden: [tokens, d], in any order.
            targets: [tokens], what each of them predicts.
        """
        if documents.learn_from is not None:
            # most tokens may be a prompt's, and logits of these are not worth making
            hidden, targets = hidden[targets != IGNORED], targets[targets != IGNORED]
        loss: Tensor = self.apply_head(hidden, "cross_entropy", targets=targets)
        return loss

    # Select

    def select(self, entropy: Tensor, hidden: Tensor, tokens: Tensor, nsp: NSPSettings, uniforms: Tensor) -> Tensor:
        """Positions [c] of one document, on the CPU.

        Args:
            entropy: [T], of the prediction made from each token.
            hidden: [T, d].
            tokens: [T].
            nsp: how to select.
            uniforms: [c], they decide.
        """
        return select_positions(align_entropy(entropy), nsp, uniforms, hidden=hidden, tokens=tokens)

    # Continue

    def write(
        self,
        last: Tensor,
        state: FastWeightState | None,
        draws: Tensor,
        temperature: float,
        *,
        stop: Callable[[Tensor], bool] | None = None,
        keep_hidden: bool = False,
        forbidden: Sequence[int] = (),
    ) -> Written:
        """Continue R sequences token by token.

        Args:
            last: [R, d], hidden states at their last tokens.
            state: [R] rows, after these.
            draws: [R, steps], a uniform number for each token.
            temperature: 0 takes the most likely token.
            stop: asked after each token, with int64 [R], whether it was the last.
            keep_hidden: whether hidden states at the tokens are wanted; the last token is then read, too.
            forbidden: ids that are never written.
        """
        draws = draws.to(last.device)
        tokens: list[Tensor] = []
        log_probs: list[Tensor] = []
        hidden: list[Tensor] = []
        for step in range(draws.shape[1]):
            token, log_prob = sample_from_logits(without(self.apply_head(last), forbidden), draws[:, step], temperature)
            tokens.append(token)
            log_probs.append(log_prob)
            ended = (stop is not None and stop(token)) or step + 1 == draws.shape[1]
            if not ended or keep_hidden:
                last, state = self.run(Packed.of_rows(token.unsqueeze(1)), state, keep_state=True)
                hidden.append(last)
            if ended:
                break
        return Written(
            torch.stack(tokens, dim=1),
            torch.stack(log_probs, dim=1),
            torch.stack(hidden, dim=1) if keep_hidden else None,
        )

    # Branch

    def fork(self, documents: Documents, branches: Branches) -> Forks:
        """Read S and fork its state after every chosen position."""
        traced = None if self.checkpoint_segments else self.trace(documents)
        if traced is not None:
            parts, trace = traced
            last = torch.cat([part[at] for part, at in zip(parts, branches.positions, strict=True)])
            targets = documents.next_tokens(documents.whole, documents.lengths)
            return Forks(torch.cat(parts), targets, last, trace.after(branches.positions))
        # in c+1 segments cut after the chosen positions, the state carried from one to the next
        borders = [[0] * len(documents), *(branches.positions + 1).t().tolist(), list(documents.lengths)]
        segments = list(read_segments(self.segment, documents, borders))
        states = [part.state for part in segments if part.state is not None]
        picks = [(chunk, b) for b in range(len(documents)) for chunk in range(len(states))]
        return Forks(
            torch.cat([part.hidden for part in segments]),
            torch.cat([documents.next_tokens(part.packed, part.stops) for part in segments]),
            torch.stack([part.last for part in segments[:-1]], dim=1).flatten(0, 1),
            FastWeightState.gather(states, picks),
        )

    def branch(self, last: Tensor, state: FastWeightState, tokens: Tensor, nsp: NSPSettings) -> Tensor:
        """Log-probabilities of the rollouts from the forked states: k-1 tokens from each, all in one pass.

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
            rest = Packed.of_rows(tokens[:, :-1])
            after, _ = self.segment(rest, state.fork(copies), keep_state=False)
            hidden = torch.cat([hidden, after.view(*rest.tokens.shape, -1)], dim=1)
        return self.log_probs(hidden, tokens, nsp)
