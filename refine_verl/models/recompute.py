"""Activation checkpointing layer by layer: what a layer computed is computed again in the backward pass.

Only a layer's input stays, [tokens, d], and what it leaves in the state. Each layer's forward function is replaced for
the time of a pass; the function that is run again is the original one, so FSDP2's hooks on the layer run once and its
parameters are there when the backward pass needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from refine_verl.kernels.cuts import Places
from refine_verl.kernels.recording import Recorder, active_recorder, last_states, record_states
from refine_verl.models.casts import cast_inputs_once, casts_apart
from refine_verl.models.replaced import LayerForward
from refine_verl.models.state import FastWeightState


def checkpointed(
    body: Callable[..., tuple[Any, FastWeightState | None]], hidden: Tensor, state: FastWeightState | None
) -> tuple[Any, FastWeightState | None, tuple[Tensor, ...]]:
    """Run ``body(hidden, state)`` now and, in the backward pass, once more.

    Args:
        body: from [tokens, d] and a state to any tree of tensors and a state.
        hidden: [tokens, d].
        state: before; None if there is none.

    Returns:
        What ``body`` returns, and the tensors of its state.
    """
    tensors, rebuild = state.flatten() if state is not None else ([], None)
    seen: list[tuple[Any, Callable[[Sequence[Tensor]], FastWeightState] | None]] = []

    def run(hidden: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        with casts_apart():
            out, after = body(hidden, rebuild(tensors) if rebuild else None)
        leaves, spec = pytree.tree_flatten(out)
        made, tree = after.flatten() if after is not None else ([], None)
        seen.append(((spec, len(leaves)), tree))
        return (*leaves, *made)

    # the state is an explicit input and output: a cache captured by the closure would be read twice
    outputs = checkpoint(run, hidden, *tensors, use_reentrant=False, preserve_rng_state=False)
    (spec, count), tree = seen[0]
    made = tuple(outputs[count:])
    return pytree.tree_unflatten(outputs[:count], spec), tree(made) if tree else None, made


class OneLayerCache:
    """The cache of a single layer, as fla's layers use one."""

    def __init__(self, index: int, state: dict[str, Any] | None) -> None:
        self.index, self.state = index, state

    def __len__(self) -> int:
        return 0 if self.state is None else self.index + 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.state is None or index != self.index:
            raise IndexError(f"layer {index} asked for the state of layer {self.index}")
        return self.state

    def update(self, *, layer_idx: int, offset: int = 1, **parts: Any) -> dict[str, Any]:
        self.state = {**(self.state or {}), **{name: part for name, part in parts.items() if part is not None}}
        return self.state


def recomputed_fla_layer(
    layers: Sequence[nn.Module], forward: LayerForward, index: int, hidden_states: Tensor, **kwargs: Any
) -> Any:
    """A layer of a fla model that is computed again in the backward pass.

    While states are recorded for places that are known (`kernels.recording`), the cache gets the layer's states there
    instead of its last one, so that what they are made of need not be kept either.
    """
    if not torch.is_grad_enabled():
        return forward(hidden_states, **kwargs)
    outer: Any = kwargs.pop("past_key_values", None)
    recorder = active_recorder()
    before = outer[index] if outer is not None and len(outer) > index else None

    def body(hidden: Tensor, state: FastWeightState | None) -> tuple[Any, FastWeightState | None]:
        cache = None if outer is None else OneLayerCache(index, None if state is None else dict(state.tree))
        recording = record_states(recorder.cuts, recorder.places) if recorder is not None else nullcontext()
        # as in the backward pass, where the block around this one is gone
        with recording as inner, cast_inputs_once([layers[index]]), last_states(wanted=True):
            out, _, _, *more = forward(hidden, past_key_values=cache, **kwargs)
        after = FastWeightState(cache.state) if cache is not None and cache.state else None
        if inner is not None and inner.places is not None and after is not None:
            after = states_at(inner, after, inner.places)
        return (out, more), after

    state = None if before is None else FastWeightState(dict(before))
    (out, more), after, tensors = checkpointed(body, hidden_states, state)
    if recorder is not None and recorder.places is not None:
        recorder.taken = True
    if after is not None:
        outer.update(layer_idx=index, offset=hidden_states.shape[1], **after.tree)
    # the states are outputs of the layer, too: FSDP2 has to gather its parameters before their backward pass
    return out, tensors, outer, *more


def states_at(recorder: Recorder, final: FastWeightState, places: Places) -> FastWeightState | None:
    """The states on the way to ``final``; None if the kernels that made it were not recorded."""
    if not all(recorder.covers(tensor) for tensor in final.tensors):
        return None
    return final.map(lambda tensor: recorder.at(tensor, places))
