"""All that training changes in a worker, kept aside and put back bit for bit: what test-time training undoes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager

if TYPE_CHECKING:
    from refine_verl.workers.engine import RefineEngine


class Snapshot:
    """Trainable parameters, buffers, optimiser, schedule and random state of one rank, on the CPU.

    Costs the host memory of this rank's shards: 4 bytes per trainable parameter before the first optimiser step, 12
    after it (AdamW keeps two more numbers for each). Of a run with adapters these are the adapters' alone.
    """

    def __init__(self, engine: RefineEngine) -> None:
        with torch.no_grad():
            self._tensors = [_local(tensor).to("cpu", copy=True) for tensor in _trained(engine)]
        self._optimizer = _copied(engine.optimizer.state_dict(), "cpu")
        self._schedule = copy.deepcopy(engine.lr_scheduler.state_dict())
        self._random = BaseCheckpointManager.get_rng_state()

    @property
    def num_bytes(self) -> int:
        """Size of all tensors that are kept, this rank's part."""
        kept = [*self._tensors, *tree_leaves(self._optimizer)]
        return sum(_local(value).nbytes for value in kept if isinstance(value, Tensor))

    @torch.no_grad()
    def restore(self, engine: RefineEngine) -> None:
        """Put everything back. Gradients are dropped. May be called any number of times."""
        for tensor, saved in zip(_trained(engine), self._tensors, strict=True):
            _local(tensor).copy_(saved)
        engine.optimizer.zero_grad(set_to_none=True)
        engine.optimizer.state.clear()  # frees its memory before the old state takes as much
        # a copy: the optimiser keeps what it is given, and changes it in place
        engine.optimizer.load_state_dict(_copied(self._optimizer, None))
        engine.lr_scheduler.load_state_dict(copy.deepcopy(self._schedule))
        BaseCheckpointManager.load_rng_state(self._random)


def shard_bytes(engine: RefineEngine) -> int:
    """Bytes of this rank's parameters, buffers and optimiser: what its part of a checkpoint takes, at least."""
    states = (value for state in engine.optimizer.state.values() for value in state.values())
    tensors = [*_tensors(engine), *(value for value in states if isinstance(value, Tensor))]
    return sum(_local(tensor).nbytes for tensor in tensors)


def _trained(engine: RefineEngine) -> list[Tensor]:
    """What training changes: frozen parameters it does not."""
    return [*(each for each in engine.module.parameters() if each.requires_grad), *engine.module.buffers()]


def _tensors(engine: RefineEngine) -> list[Tensor]:
    return [*engine.module.parameters(), *engine.module.buffers()]


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard of what FSDP2 has sharded; any other tensor as it is."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def _copied(state: dict[str, Any], device: str | None) -> dict[str, Any]:
    """A copy down to the last tensor, on ``device`` if that is not None."""

    def one(value: Any) -> Any:
        return value.to(device=device, copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)

    copied: dict[str, Any] = tree_map(one, state)
    return copied
