"""The passes that all modes of the actor are made of: read a document, continue from its states, branch from them.

Everything here runs inside the actor's one forward pass (`refine_verl.models.actor`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from refine_verl.config import ConfigError, NSPSettings, RolloutLength
from refine_verl.models.adapters import (
    NO_LAYERS,
    ModelAdapter,
    RecomputingAdapter,
    RoutingAdapter,
    TracingAdapter,
    WritesAdapter,
    check_selection,
)
from refine_verl.models.casts import shared_casts
from refine_verl.models.packing import IGNORED, Documents, Packed
from refine_verl.models.pieces import in_pieces, piece_count
from refine_verl.models.recompute import checkpointed
from refine_verl.models.rollouts import Branches
from refine_verl.models.state import FastWeightState
from refine_verl.models.trace import Run, Trace, read_segments, read_with_snapshots
from refine_verl.nsp import align_entropy, looks_at_writes, sample_from_logits, select_positions, without


@dataclass(frozen=True)
class Written:
    """Tokens that R sequences were continued with.

    Attributes:
        tokens: int64 [R, steps].
        log_probs: float32 [R, steps], of the policy that wrote them.
        hidden: [R, steps, d], hidden states at the tokens; None unless asked for.
        routes: int64 [R, tokens that were read], see `RoutingAdapter`; None of a model without experts.
    """

    tokens: Tensor
    log_probs: Tensor
    hidden: Tensor | None
    routes: Tensor | None = None


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
    activation_checkpointing: str
    reading: str
    balance_coef: float
    forward_tokens: int
    end_tokens: Sequence[int]
    sentence_ends: Sequence[int]

    @property
    def checkpoint_segments(self) -> bool:
        """Whether documents are cut into segments that are run again in the backward pass."""
        return self.activation_checkpointing == "segment"

    # One pass

    def run(
        self, packed: Packed, state: FastWeightState | None, keep_state: bool
    ) -> tuple[Tensor, FastWeightState | None]:
        """One pass of the trunk: hidden states [tokens, d] in the order of the runs, and the state after them."""
        self.forward_tokens += packed.tokens.numel() * (self._times() - 1)
        with self.recomputed():
            return self._run(packed, state, keep_state)

    def _run(
        self, packed: Packed, state: FastWeightState | None, keep_state: bool
    ) -> tuple[Tensor, FastWeightState | None]:
        """`run` without activation checkpointing of its own, for bodies that are run again as a whole."""
        self.forward_tokens += packed.tokens.numel()
        hidden, after = self.adapter.run(self, packed, state, keep_state)
        return hidden.reshape(-1, hidden.shape[-1]), after

    def routes(self) -> Tensor | None:
        """Where the tokens of the last pass went, [tokens]; see `RoutingAdapter.routes`."""
        return self.adapter.routes() if isinstance(self.adapter, RoutingAdapter) else None

    def balance_loss(self, documents: Documents) -> dict[str, Tensor]:
        """Of the pass over documents just made: ``balance_loss_sum``, weighted, times the number of predicted tokens.

        Nothing unless it is wanted (`make_actor`).
        """
        if not self.balance_coef:
            return {}
        assert isinstance(self.adapter, RoutingAdapter)
        return {"balance_loss_sum": self.balance_coef * documents.predicted * self.adapter.balance_loss()}

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

    def sentence_ends_of(self, nsp: NSPSettings, device: torch.device) -> Tensor:
        """Ids [...] of tokens that end a sentence, int64, if rollouts end there.

        Raises:
            ConfigError: they do, and nobody has said which tokens do.
        """
        asked = isinstance(nsp.rollout_length, RolloutLength) and nsp.rollout_length.by == "sentence"
        if asked and not self.sentence_ends:
            raise ConfigError(
                "refine.nsp.rollout_length.by",
                "sentence needs a tokenizer, and there are token ids only here. Set by=entropy.",
            )
        ends = torch.tensor(self.sentence_ends if asked else (), dtype=torch.int64)
        return ends.to(device, non_blocking=True)

    @contextmanager
    def computing(self, trains: bool) -> Iterator[None]:
        """What all passes of a mode, with gradients (``trains``) or without, are made in."""
        # activation checkpointing casts again when it computes again; a copy kept until then would cost its memory
        shares = self.autocast_dtype is not None and not (trains and self.activation_checkpointing != "none")
        layers = getattr(self.base_model, "layers", ())
        casts = shared_casts([layers] if isinstance(layers, nn.Module) else layers) if shares else nullcontext()
        with self.autocast(trains), casts, nullcontext() if trains else torch.no_grad():
            yield

    def autocast(self, trains: bool) -> AbstractContextManager[Any]:
        """bf16 matmuls over float32 parameters.

        Passes with gradients do without autocast's cache: cached bf16 copies collect the gradients of all of them in
        bf16. The weights of layers are cast once all the same (`casts`).
        """
        if self.autocast_dtype is None:
            return nullcontext()
        device = next(self.parameters()).device.type
        return torch.autocast(device, dtype=self.autocast_dtype, cache_enabled=not trains)

    def recomputed(self) -> AbstractContextManager[None]:
        """With activation checkpointing per layer: what a pass with gradients is made in.

        Raises:
            ConfigError: the model's adapter cannot do it.
        """
        if self._times() == 1:
            return nullcontext()
        if not isinstance(self.adapter, RecomputingAdapter):
            raise ConfigError("model.activation_checkpointing", NO_LAYERS)
        return self.adapter.recomputed_layers(self)

    # Read

    def read(self, documents: Documents, snapshots: int) -> tuple[list[Tensor], Trace | None]:
        """One pass over S: hidden states [T, d] of each document, and its states (None for 0 ``snapshots``).

        In ``snapshots`` segments where the adapter cannot trace, or a trace would keep too much (`make_actor`).
        """
        if snapshots == 0:
            packed = documents.whole
            return list(self.run(packed, documents.before, keep_state=False)[0].split(packed.lengths)), None
        traced = None if self.reading == "segments" else self.trace(documents)
        return traced or read_with_snapshots(self.run, documents, snapshots)

    def trace(self, documents: Documents, positions: Tensor | None = None) -> tuple[list[Tensor], Trace] | None:
        """`read` in one uncut pass with all its states, or those at known positions.

        None where the adapter cannot, and behind a state: adapters trace from the first token on.
        """
        if not isinstance(self.adapter, TracingAdapter) or documents.before is not None:
            return None
        with self.recomputed():
            traced = self.adapter.trace(self, documents, positions)
        if traced is not None:
            self.forward_tokens += documents.total * self._times()
        return traced

    def _times(self) -> int:
        """How often a pass is computed: with activation checkpointing per layer again in the backward pass."""
        return 2 if self.activation_checkpointing == "layer" and torch.is_grad_enabled() else 1

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
            # sorted and not by `nonzero`: the host knows how many there are, and need not wait to be told
            kept = (targets == IGNORED).argsort(stable=True)[: documents.predicted]
            hidden, targets = hidden.index_select(0, kept), targets.index_select(0, kept)
        loss: Tensor = self.apply_head(hidden, "cross_entropy", targets=targets)
        return loss

    def next_token_loss_and_entropy(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """`next_token_loss`, and [tokens] the entropy of each prediction (Eq. 5), from one pass of the head.

        Args:
            hidden: [tokens, d].
            targets: [tokens], what each of them predicts.
        """
        loss, entropy = self.apply_head(hidden, "cross_entropy", targets=targets, with_entropy=True)
        return loss, entropy

    # Select

    def write_norms(self, documents: Documents, trace: Trace | None, nsp: NSPSettings) -> Sequence[Tensor | None]:
        """How strongly the tokens of each document rewrote the fast weights, [layers, T]; None if nobody asks.

        Raises:
            ConfigError: the selection strategy asks, and the adapter does not know.
        """
        if not looks_at_writes(nsp):
            return [None] * len(documents)
        check_selection(nsp, self.adapter)
        assert isinstance(self.adapter, WritesAdapter) and trace is not None
        return self.adapter.write_norms(trace).cpu().split(documents.lengths, dim=1)

    def select(
        self,
        entropy: Tensor,
        hidden: Tensor,
        tokens: Tensor,
        write_norms: Tensor | None,
        nsp: NSPSettings,
        uniforms: Tensor,
    ) -> Tensor:
        """Positions [c] of one document, on the CPU.

        Args:
            entropy: [T], of the prediction made from each token.
            hidden: [T, d].
            tokens: [T].
            write_norms: [layers, T], or None.
            nsp: how to select.
            uniforms: [c], they decide.
        """
        about = {"hidden": hidden, "tokens": tokens, "write_norms": write_norms}
        return select_positions(align_entropy(entropy), nsp, uniforms, **about)

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
        draws = draws.to(last.device, non_blocking=True)
        tokens: list[Tensor] = []
        log_probs: list[Tensor] = []
        hidden: list[Tensor] = []
        routes: list[Tensor] = []
        for step in range(draws.shape[1]):
            token, log_prob = sample_from_logits(without(self.apply_head(last), forbidden), draws[:, step], temperature)
            tokens.append(token)
            log_probs.append(log_prob)
            ended = (stop is not None and stop(token)) or step + 1 == draws.shape[1]
            if not ended or keep_hidden:
                last, state = self.run(Packed.of_rows(token.unsqueeze(1)), state, keep_state=True)
                hidden.append(last)
                if (taken := self.routes()) is not None:
                    routes.append(taken)
            if ended:
                break
        return Written(
            torch.stack(tokens, dim=1),
            torch.stack(log_probs, dim=1),
            torch.stack(hidden, dim=1) if keep_hidden else None,
            torch.stack(routes, dim=1) if routes else None,
        )

    # Branch

    def fork(self, documents: Documents, branches: Branches) -> Forks:
        """Read S and fork its state after every chosen position."""
        positions = branches.positions.cpu()  # the host waits once
        traced = None if self.checkpoint_segments else self.trace(documents, positions)
        if traced is not None:
            return self.forks_of(documents, *traced, positions)
        # in c+1 segments cut after the chosen positions, the state carried from one to the next
        borders = [[0] * len(documents), *(positions + 1).t().tolist(), list(documents.lengths)]
        segments = list(read_segments(self.segment, documents, borders))
        states = [part.state for part in segments if part.state is not None]
        picks = [(chunk, b) for b in range(len(documents)) for chunk in range(len(states))]
        return Forks(
            torch.cat([part.hidden for part in segments]),
            torch.cat([documents.next_tokens(part.packed, part.stops) for part in segments]),
            torch.stack([part.last for part in segments[:-1]], dim=1).flatten(0, 1),
            FastWeightState.gather(states, picks),
        )

    @staticmethod
    def forks_of(documents: Documents, parts: list[Tensor], trace: Trace, positions: Tensor) -> Forks:
        """What `trace` gave, with the states after ``positions`` [N, c], on the CPU."""
        hidden = torch.cat(parts)
        last = hidden.index_select(0, documents.places(positions).to(hidden.device, non_blocking=True))
        targets = documents.next_tokens(documents.whole, documents.lengths)
        return Forks(hidden, targets, last, trace.after(positions))

    def branch(self, last: Tensor, state: FastWeightState, tokens: Tensor, nsp: NSPSettings) -> dict[str, Tensor]:
        """Log-probabilities of the rollouts from the forked states: k-1 tokens from each.

        In one pass, or, where there are more than ``refine.nsp.rollouts_together``, in one for each piece. A piece is
        forked, read and scored again in the backward pass: from one piece to the next only the states before the fork
        stay, and their gradients enter the trunk once.

        Args:
            last: [N * c, d] hidden state at x_t.
            state: [N * c] rows, after x_t.
            tokens: int64 [N, c, n, k].
            nsp: n, k, temperature and how far the gradient goes.

        Returns:
            ``log_probs`` [N * c * n, k], in the order of ``tokens``; of a model with experts also ``routes``, int64
            [N * c * n, k - 1].
        """
        last, state = self._where_branches_start(last, state, nsp)
        rows = tokens.flatten(0, 1)
        score = functools.partial(self._score_branches, nsp=nsp, read_all=False)
        if piece_count(rows.shape[0], rows.shape[1], nsp.rollouts_together) == 1:
            found = score(last, state, rows, run=self.segment)
        else:
            found = in_pieces(functools.partial(self._again, score), last, state, rows, nsp.rollouts_together)
        return {name: part.flatten(0, 1) for name, part in zip(("log_probs", "routes"), found, strict=False)}

    def branch_and_read(
        self, last: Tensor, state: FastWeightState, tokens: Tensor, nsp: NSPSettings
    ) -> tuple[dict[str, Tensor], Tensor]:
        """`branch` in one pass, reading the rollouts' last tokens, too.

        Returns:
            What `branch` returns, and the hidden states at all k tokens, [N * c * n, k, d], without gradient.
        """
        last, state = self._where_branches_start(last, state, nsp)
        found = self._score_branches(last, state, tokens.flatten(0, 1), nsp, read_all=True, run=self.segment)
        log_probs, *routes, hidden = (part.flatten(0, 1) for part in found)
        return {"log_probs": log_probs, **({"routes": routes[0][:, :-1]} if routes else {})}, hidden

    @staticmethod
    def _where_branches_start(last: Tensor, state: FastWeightState, nsp: NSPSettings) -> tuple[Tensor, FastWeightState]:
        return (last.detach(), state.detach()) if nsp.grad_scope == "branch" else (last, state)

    def _again(
        self, score: Callable[..., tuple[Tensor, ...]], last: Tensor, state: FastWeightState, rows: Tensor
    ) -> tuple[Tensor, ...]:
        """``score`` a piece, and once more in the backward pass."""

        def body(last: Tensor, state: FastWeightState | None) -> tuple[tuple[Tensor, ...], None]:
            return score(last, state, rows, run=self._run), None

        if not torch.is_grad_enabled():
            return body(last, state)[0]
        found: tuple[Tensor, ...] = checkpointed(body, last, state)[0]
        return found

    def _score_branches(
        self, last: Tensor, state: FastWeightState, tokens: Tensor, nsp: NSPSettings, *, read_all: bool, run: Run
    ) -> tuple[Tensor, ...]:
        """Log-probabilities of ``tokens`` [p, m, k], like these.

        Of a model with experts then the routes of the tokens that are read, and last, with ``read_all``, hidden states
        [p, m, k, d].
        """
        shape, copies = tokens.shape, tokens.shape[1]
        tokens = tokens.flatten(0, 1)
        hidden, read = last.repeat_interleave(copies, dim=0).unsqueeze(1), tokens if read_all else tokens[:, :-1]
        after, routes = hidden[:, :0], None
        if read.shape[1]:
            after = run(Packed.of_rows(read), state.fork(copies), False)[0].view(*read.shape, -1)
            hidden = torch.cat([hidden, after[:, : shape[2] - 1]], dim=1)
            routes = self.routes()
        found = [self.log_probs(hidden, tokens, nsp).view(shape)]
        if routes is not None:
            found.append(routes.view(*shape[:2], -1))
        return (*found, after.detach().view(*shape, -1)) if read_all else tuple(found)
