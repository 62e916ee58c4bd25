"""How to read the state from a family of models and how to hand it back.

fla's models share one cache format, so one adapter serves them all. Anything else needs one class with one
method; see docs/extending.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from refine_verl.config import ConfigError, NSPSettings
from refine_verl.kernels.cuts import Cuts, Places
from refine_verl.kernels.patch import cpu_kernels_in_use, wrap_operators
from refine_verl.kernels.recording import Recorder, last_states, record_states
from refine_verl.models.casts import cast_inputs_once
from refine_verl.models.packing import Documents, Packed
from refine_verl.models.recompute import recomputed_fla_layer
from refine_verl.models.replaced import replaced_forward
from refine_verl.models.state import FastWeightState
from refine_verl.models.trace import KnownStates, Trace
from refine_verl.nsp import looks_at_writes


class ModelAdapter(Protocol):
    """Runs the trunk of a causal language model over tokens, from a state to a state."""

    def run(
        self, model: nn.Module, packed: Packed, state: FastWeightState | None, keep_state: bool
    ) -> tuple[Tensor, FastWeightState | None]:
        """Read ``packed`` tokens, continuing from ``state``.

        Args:
            model: the causal language model (its LM head is not used here).
            packed: the tokens; see :class:`Packed`.
            state: one row per run of tokens; None before the first token.
            keep_state: whether the state after the last token of each run is wanted.

        Returns:
            Hidden states after the final norm, [rows, L, d] in the layout of ``packed.tokens``, and the state
            after the tokens (None unless ``keep_state``). Must not modify ``state``; both results are
            differentiable with respect to the parameters and to ``state``.
        """
        ...


@runtime_checkable
class TracingAdapter(ModelAdapter, Protocol):
    """An adapter that can do more: read documents once, uncut, and give the state after any token afterwards.

    Optional. Without it, documents are read in segments and the states between them are replayed.
    """

    def trace(
        self, model: nn.Module, documents: Documents, positions: Tensor | None = None
    ) -> tuple[list[Tensor], Trace] | None:
        """Read documents from their first token.

        Args:
            model, documents: what to read.
            positions: int64 [N, c] on the CPU, the only ones the trace will be asked for; None: not known yet.

        Returns:
            Hidden states [T, d] of each document after the final norm, and the states on the way, both
            differentiable where gradients are enabled; None where this cannot be done (the same answer on all
            ranks).
        """
        ...


@runtime_checkable
class WritesAdapter(TracingAdapter, Protocol):
    """A tracing adapter that also knows how strongly each token rewrote the fast weights. Optional."""

    def write_norms(self, trace: Trace) -> Tensor:
        """The norm of what each token of a pass wrote into each layer's fast weights.

        Args:
            trace: what `trace` returned, not told positions.

        Returns:
            [layers, tokens], document by document, without gradient.
        """
        ...


@runtime_checkable
class RecomputingAdapter(ModelAdapter, Protocol):
    """An adapter whose model can be read with activation checkpointing per layer. Optional."""

    def recomputed_layers(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside the block, passes with gradients keep each layer's input and compute the layer again later.

        `TracingAdapter.trace` is then given positions, and no more than their states may be kept.
        """
        ...


@runtime_checkable
class RoutingAdapter(ModelAdapter, Protocol):
    """An adapter of models with experts that tells where tokens went. Optional.

    Attributes:
        balances: whether `balance_loss` will be asked for; set by `make_actor`.
    """

    balances: bool

    def routes(self) -> Tensor | None:
        """Of each token of the last pass a number that stands for its experts in all layers.

        Returns:
            int64 [tokens], without gradient; None of a model without experts.
        """
        ...

    def balance_loss(self) -> Tensor:
        """How unevenly the last pass over documents used the experts; may be asked once for each.

        Returns:
            Scalar, differentiable: E * sum over the experts e of f_e P_e, where f_e is how many of a token's routes
            lead to e and P_e the probability that its router gives e, both means over all tokens and layers. It is the
            number of a token's routes if experts are used evenly.
        """
        ...


NO_LAYERS = (
    "layer needs an adapter that knows the model's layers (recomputed_layers, docs/extending.md). Set segment, which "
    "every model can do, or none."
)
"""Why activation checkpointing per layer is refused."""

NO_WRITES = (
    "looks at how strongly each token rewrites the fast weights, which is known of DeltaNet and Gated DeltaNet, and of "
    "models whose adapter says so (write_norms, docs/extending.md). Set refine.nsp.selection=entropy."
)
"""Why strategies that look at writes are refused."""

Adapter = TypeVar("Adapter", bound=type)
_ADAPTERS: dict[str, Callable[[], ModelAdapter]] = {}
_WITH_ATTENTION: dict[str, Callable[[], ModelAdapter]] = {}

TOKENS_PER_PIECE = 4096
"""About so many tokens of a document are in a piece of an operator (`kernels.cuts`): shorter pieces cost launches,
longer ones a longer way from a border to each position, half a piece on average, of the operator alone."""

# Families of fla 0.6 whose memory is a state of fixed size and nothing else, with the devices they were run on.
FLA_VERIFIED_ON_CPU = ("delta_net", "gated_deltanet")
FLA_THROUGH_THE_SAME_ADAPTER = ("gla", "hgrn2", "kda", "gated_deltaproduct")

_ATTENTION = "it has no linear layers, or attention of a kind whose keys and values forks do not share here"
_POSITIONS = "it turns queries and keys by their position in the text, which forks would need beside their states"
_GROWING = "its states become more with the length of the text"
_UNKNOWN_OPERATOR = (
    "its operator is not among those that can be cut (refine_verl.kernels.patch.OPERATORS), and forked states of it "
    "have not been compared with recomputed ones"
)
FLA_NOT_SUPPORTED = {
    **dict.fromkeys(
        (
            "bitnet", "cat", "deltaformer", "forgetting_transformer", "mla", "moba", "nsa", "parallax", "path_attn",
            "samba", "stickbreaking_attn", "transformer", "wall_transformer", "yoco",
        ),
        _ATTENTION,
    ),
    **dict.fromkeys(("abc", "mamba3", "raven", "retnet", "rodimus"), _POSITIONS),
    "log_linear_mamba2": _GROWING,
    **dict.fromkeys(
        (
            "comba", "cyclic_flow_attention", "gsa", "hgrn", "lightnet", "linear_attn", "mamba", "mamba2", "mesa_net",
            "mom", "precond_gated_deltanet", "precond_kda", "rwkv6", "rwkv7",
        ),
        _UNKNOWN_OPERATOR,
    ),
}  # fmt: skip
"""The other models of fla 0.6, and why their states are not forked."""


def register_adapter(model_type: str, *, with_attention: bool = False) -> Callable[[Adapter], Adapter]:
    """Class decorator: use this adapter for models whose config has this ``model_type``.

    Args:
        model_type: the family.
        with_attention: for those of its models that have layers of softmax attention (``attn`` of their config).

    Raises:
        ValueError: another class already serves ``model_type``.
    """
    table = _WITH_ATTENTION if with_attention else _ADAPTERS

    def decorate(adapter: Adapter) -> Adapter:
        owner = table.get(model_type)
        if owner is not None and owner is not adapter:
            raise ValueError(f"model_type '{model_type}' already has the adapter {owner.__name__}")
        table[model_type] = adapter
        return adapter

    return decorate


def known_model_types() -> list[str]:
    """Model types that have an adapter, sorted."""
    return sorted(_ADAPTERS)


def get_adapter(model_type: str) -> ModelAdapter:
    """The adapter for a model type.

    Raises:
        KeyError: no adapter is registered for it.
    """
    return _ADAPTERS[model_type]()


def adapter_for(config: Any) -> ModelAdapter:
    """The adapter for a model with this configuration.

    Raises:
        KeyError: none is registered for it.
    """
    table = _WITH_ATTENTION if has_attention_layers(config) else _ADAPTERS
    return table[config.model_type]()


def has_attention_layers(config: Any) -> bool:
    """Whether it is that of a fla model with layers of softmax attention; ``attn`` of other models is their own."""
    return config.model_type in _WITH_ATTENTION and bool(getattr(config, "attn", None))


def sizes(config: object) -> tuple[int | None, int]:
    """Width of a model's hidden states (None: its configuration does not say) and number of its layers."""
    return getattr(config, "hidden_size", None), getattr(config, "num_hidden_layers", 2)


def check_selection(nsp: NSPSettings, adapter: ModelAdapter) -> None:
    """Check that what the selection strategy looks at is known of a model.

    Raises:
        ConfigError: it looks at what tokens write, and the adapter does not know.
    """
    if looks_at_writes(nsp) and not isinstance(adapter, WritesAdapter):
        raise ConfigError("refine.nsp.selection", f"{nsp.selection} {NO_WRITES}")


class FlaAdapter:
    """Any recurrent model of flash-linear-attention: the state is its cache in legacy form."""

    def run(
        self, model: nn.Module, packed: Packed, state: FastWeightState | None, keep_state: bool
    ) -> tuple[Tensor, FastWeightState | None]:
        from fla.models.utils import Cache

        cache = None
        if state is not None:
            # fla's single-token decoding overwrites the convolution states it is given
            in_place = not torch.is_grad_enabled() and max(packed.lengths) == 1
            cache = Cache.from_legacy_cache(_fresh_layers(state.tree, in_place))
        elif keep_state:
            cache = Cache()
        # A filled cache with use_cache=False would come back ruined (fla keeps half of it), so a state that is
        # read is always also written: into our own copy of the dictionaries.
        kwargs: dict[str, Any] = {} if packed.cu_seqlens is None else {"cu_seqlens": packed.cu_seqlens}
        trunk: Any = model.base_model
        with cast_inputs_once(trunk.layers), last_states(keep_state):
            output = trunk(
                input_ids=packed.tokens, past_key_values=cache, use_cache=cache is not None, return_dict=True, **kwargs
            )
        if not keep_state:
            return output.last_hidden_state, None
        layers = tuple(dict(layer) for layer in output.past_key_values)
        return output.last_hidden_state, FastWeightState(layers)

    def trace(
        self, model: nn.Module, documents: Documents, positions: Tensor | None = None
    ) -> tuple[list[Tensor], Trace] | None:
        """One pass: the stand-ins for the CPU remember their states, fla's own operators are cut (`kernels.cuts`)."""
        wrap_operators()
        places = None if positions is None else Places.of(positions)
        packed = documents.whole
        cuts = None
        if self.cuts_operators():
            pieces = -(-max(documents.lengths) // TOKENS_PER_PIECE)
            cuts = Cuts.even(documents.lengths, pieces, documents.tokens.device)
        with record_states(cuts, places) as recorder:
            hidden, state = self.run(model, packed, None, keep_state=True)
        assert state is not None
        parts = list(hidden.flatten(0, 1).split(packed.lengths))
        if recorder.taken:
            return (parts, KnownStates(state)) if state.tensors else None
        if not all(recorder.covers(tensor) for tensor in state.tensors):
            return None
        return parts, _RecordedTrace(state, recorder)

    def cuts_operators(self) -> bool:
        """Whether operators have to be cut for the states inside a pass; the stand-ins for the CPU know theirs."""
        return not cpu_kernels_in_use()

    def recomputed_layers(self, model: nn.Module) -> AbstractContextManager[None]:
        """See `RecomputingAdapter`."""
        trunk: Any = model.base_model
        return replaced_forward(trunk.layers, functools.partial(recomputed_fla_layer, trunk.layers))


class DeltaRuleAdapter(FlaAdapter):
    """A family of fla with the (gated) delta rule, one write a token."""

    def write_norms(self, trace: Trace) -> Tensor:
        """See `WritesAdapter`."""
        assert isinstance(trace, _RecordedTrace)
        return trace.recorder.write_norms()


@dataclass(frozen=True)
class _RecordedTrace:
    """The final states of a pass and how the kernels got there."""

    final: FastWeightState
    recorder: Recorder

    def after(self, positions: Tensor) -> FastWeightState:
        places = Places.of(positions)
        return self.final.map(lambda tensor: self.recorder.at(tensor, places))


def _fresh_layers(layers: tuple[dict[str, Any], ...], clone_conv: bool) -> tuple[dict[str, Any], ...]:
    """New dictionaries around the same tensors; convolution states cloned if they are about to be overwritten."""
    fresh = tuple(dict(layer) for layer in layers)
    if clone_conv:
        leaves, spec = pytree.tree_flatten([layer.get("conv_state") for layer in fresh])
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        copies = [torch.empty_like(tensor) for tensor in tensors]
        if tensors:
            torch._foreach_copy_(copies, tensors)  # one launch for all layers
        rest = iter(copies)
        states = pytree.tree_unflatten([next(rest) if isinstance(x, Tensor) else x for x in leaves], spec)
        for layer, state in zip(fresh, states, strict=True):
            if "conv_state" in layer:
                layer["conv_state"] = state
    return fresh


for _model_type in FLA_VERIFIED_ON_CPU:
    register_adapter(_model_type)(DeltaRuleAdapter)
for _model_type in FLA_THROUGH_THE_SAME_ADAPTER:
    register_adapter(_model_type)(FlaAdapter)
