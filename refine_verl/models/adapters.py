"""How to read the state from a family of models and how to hand it back.

fla's models share one cache format, so one adapter serves them all. Anything else needs one class with one
method; see docs/extending.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from refine_verl.kernels.patch import cpu_kernels_in_use
from refine_verl.kernels.recording import Recorder, record_states
from refine_verl.models.packing import Documents, Packed
from refine_verl.models.state import FastWeightState
from refine_verl.models.trace import Trace


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

    def trace(self, model: nn.Module, documents: Documents) -> tuple[list[Tensor], Trace] | None:
        """Read documents from their first token.

        Returns:
            Hidden states [T, d] of each document after the final norm, and the states on the way, both
            differentiable where gradients are enabled; None where this cannot be done (the same answer on all
            ranks).
        """
        ...


Adapter = TypeVar("Adapter", bound=type)
_ADAPTERS: dict[str, Callable[[], ModelAdapter]] = {}

# Families of fla 0.6 whose memory is a state of fixed size and nothing else, with the devices they were run on.
FLA_VERIFIED_ON_CPU = ("delta_net", "gated_deltanet")
# Left out: families that count positions (retnet, mamba hybrids), for which a forked cache would need more than states.
FLA_THROUGH_THE_SAME_ADAPTER = ("gla", "hgrn2", "kda", "gated_deltaproduct")


def register_adapter(model_type: str) -> Callable[[Adapter], Adapter]:
    """Class decorator: use this adapter for models whose config has this ``model_type``.

    Raises:
        ValueError: another class already serves ``model_type``.
    """

    def decorate(adapter: Adapter) -> Adapter:
        owner = _ADAPTERS.get(model_type)
        if owner is not None and owner is not adapter:
            raise ValueError(f"model_type '{model_type}' already has the adapter {owner.__name__}")
        _ADAPTERS[model_type] = adapter
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
        output = trunk(
            input_ids=packed.tokens, past_key_values=cache, use_cache=cache is not None, return_dict=True, **kwargs
        )
        if not keep_state:
            return output.last_hidden_state, None
        layers = tuple(dict(layer) for layer in output.past_key_values)
        return output.last_hidden_state, FastWeightState(layers)

    def trace(self, model: nn.Module, documents: Documents) -> tuple[list[Tensor], Trace] | None:
        """On the CPU, where the kernels are ours; fla's own kernels give out final states only."""
        if not cpu_kernels_in_use():
            return None
        packed = documents.whole
        with record_states() as recorder:
            hidden, state = self.run(model, packed, None, keep_state=True)
        assert state is not None
        if not all(recorder.covers(tensor) for tensor in state.tensors):
            return None
        return list(hidden.flatten(0, 1).split(packed.lengths)), _RecordedTrace(state, recorder)


@dataclass(frozen=True)
class _RecordedTrace:
    """The final states of a pass and how the kernels got there."""

    final: FastWeightState
    recorder: Recorder

    def after(self, positions: Tensor) -> FastWeightState:
        sequences = torch.arange(len(positions)).repeat_interleave(positions.shape[1])
        return self.final.map(lambda tensor: self.recorder.at(tensor, sequences, positions.flatten()))


def _fresh_layers(layers: tuple[dict[str, Any], ...], clone_conv: bool) -> tuple[dict[str, Any], ...]:
    """New dictionaries around the same tensors; convolution states cloned if they are about to be overwritten."""
    fresh = tuple(dict(layer) for layer in layers)
    for layer in fresh:
        if clone_conv and "conv_state" in layer:
            layer["conv_state"] = pytree.tree_map_only(Tensor, torch.clone, layer["conv_state"])
    return fresh


for _model_type in (*FLA_VERIFIED_ON_CPU, *FLA_THROUGH_THE_SAME_ADAPTER):
    register_adapter(_model_type)(FlaAdapter)
