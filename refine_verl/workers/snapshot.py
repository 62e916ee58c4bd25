"""All that training changes in a worker, kept aside and put back bit for bit: what test-time training undoes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager

if TYPE_CHECKING:
    from refine_verl.workers.engine import RefineEngine


class Snapshot:
    """Parameters, buffers, optimiser, schedule and random state of one rank, on the CPU.

    Costs the host memory of this rank's shards: 4 bytes per parameter before the first optimiser step, 12 after it
    (AdamW keeps two more numbers for each).
    """

    def __init__(self, engine: RefineEngine) -> None:
        with torch.no_grad():
            self._tensors = [_copied(tensor) for tensor in _tensors(engine)]
        optimizer = engine.optimizer
        # by position: a parameter that has no state yet must have none afterwards either
        self._states = [
            _copied_state(optimizer.state.get(p)) for group in optimizer.param_groups for p in group["params"]
        ]
        self._groups = [
            {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        self._schedule = copy.deepcopy(engine.lr_scheduler.state_dict())
        self._random = BaseCheckpointManager.get_rng_state()

    @torch.no_grad()
    def restore(self, engine: RefineEngine) -> None:
        """Put everything back. Gradients are dropped. May be called any number of times."""
        for tensor, saved in zip(_tensors(engine), self._tensors, strict=True):
            _local(tensor).copy_(saved)
        optimizer = engine.optimizer
        optimizer.zero_grad(set_to_none=True)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter, saved_state in zip(parameters, self._states, strict=True):
            if saved_state is None:
                optimizer.state.pop(parameter, None)
                continue
            now = optimizer.state[parameter]
            for name in now.keys() - saved_state.keys():
                del now[name]
            for name, value in saved_state.items():
                if isinstance(value, Tensor):
                    _local(now[name]).copy_(value)
                else:
                    now[name] = copy.deepcopy(value)
        for group, saved_group in zip(optimizer.param_groups, self._groups, strict=True):
            group.update(copy.deepcopy(saved_group))
        engine.lr_scheduler.load_state_dict(copy.deepcopy(self._schedule))
        BaseCheckpointManager.load_rng_state(self._random)


def shard_bytes(engine: RefineEngine) -> int:
    """Bytes of this rank's parameters, buffers and optimiser: what its part of a checkpoint takes, at least."""
    states = (value for state in engine.optimizer.state.values() for value in state.values())
    tensors = [*_tensors(engine), *(value for value in states if isinstance(value, Tensor))]
    return sum(_local(tensor).nbytes for tensor in tensors)


def _tensors(engine: RefineEngine) -> list[Tensor]:
    return [*engine.module.parameters(), *engine.module.buffers()]


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard of what FSDP2 has sharded; any other tensor as it is."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def _copied(tensor: Tensor) -> Tensor:
    return _local(tensor).to("cpu", copy=True)


def _copied_state(state: dict[str, Any] | None) -> dict[str, Any] | None:
    if not state:
        return None
    return {
        name: _copied(value) if isinstance(value, Tensor) else copy.deepcopy(value) for name, value in state.items()
    }
