"""What vLLM servers beside the workers take (`refine.answers.engine=vllm`), as far as it can be known before."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from transformers import PretrainedConfig

from refine_verl.compose.validate import ValidConfig
from refine_verl.plan.memory import FP32, MemoryEstimate
from refine_verl.serving.configs import layer_settings

BF16 = 2
SERVER, ANSWERS = "server", "answers"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Servers:
    """Bytes of each device of a server.

    Attributes:
        count: of all nodes.
        devices: of each server; it shares them with as many workers.
        weights: in bfloat16.
        state: of one sequence: recurrent states in float32, those of convolutions in bfloat16.
        states: of `max_num_seqs` sequences; prefix caching keeps more where there is room.
        set_aside: what a server takes while it is awake; None where the device's memory is not known.
        sleeps: whether it gives that back between uses.
        said_by: the key, or the variable, that sets it.
    """

    count: int
    devices: int
    weights: int
    state: int
    states: int
    set_aside: int | None
    sleeps: bool
    said_by: str

    @property
    def taken(self) -> int:
        """What it takes while it is awake, at least."""
        return max(self.weights + self.states, self.set_aside or 0)


def servers_of(valid: ValidConfig, model: PretrainedConfig, parameters: int, available: int | None) -> Servers | None:
    """The servers of a run, if it has any.

    Args:
        valid: the run.
        model: of its model, which vLLM serves.
        parameters: of the model without adapters: servers are sent weights that these are merged into.
        available: bytes of a worker's device, None if unknown.
    """
    if valid.refine.answers.engine != "vllm":
        return None
    config: Any = valid.config
    rollout, cuda = config.actor_rollout_ref.rollout, config.trainer.device == "cuda"
    devices = int(rollout.tensor_model_parallel_size)
    layer = layer_settings(model)
    keys = layer.linear_num_key_heads * layer.linear_key_head_dim
    values = layer.linear_num_value_heads * layer.linear_value_head_dim
    recurrent = layer.linear_key_head_dim * values * FP32
    convolution = (2 * keys + values) * (layer.linear_conv_kernel_dim - 1) * BF16
    state = int(model.num_hidden_layers) * (recurrent + convolution) // devices
    weights = parameters * BF16 // devices
    share, said_by = float(rollout.gpu_memory_utilization), "actor_rollout_ref.rollout.gpu_memory_utilization"
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    if not cuda and space:  # GB for states, beside the weights
        set_aside: int | None = weights + round(float(space) * 2**30)
        said_by = "VLLM_CPU_KVCACHE_SPACE"
    elif available is None:
        set_aside = None
    else:  # of a GPU, or of all memory of the machine
        set_aside = round(share * available * (1 if cuda else int(config.trainer.n_gpus_per_node)))
    return Servers(
        count=valid.workers // devices,
        devices=devices,
        weights=weights,
        state=state,
        states=int(rollout.max_num_seqs) * state,
        set_aside=set_aside,
        sleeps=cuda and bool(rollout.free_cache_engine),
        said_by=said_by,
    )


def with_servers(memory: MemoryEstimate, servers: Servers | None) -> MemoryEstimate:
    """An estimate with what servers take: while answers are written, and in all phases if they do not sleep."""
    if servers is None:
        return memory
    held = memory.phases["optimiser"]
    answers: dict[str, int] = {part: held[part] for part in ("parameters", "optimiser") if part in held}
    phases = {name: {**parts, **_beside(servers)} for name, parts in memory.phases.items()}
    return dataclasses.replace(memory, phases={ANSWERS: {**answers, SERVER: servers.taken}, **phases})


def _beside(servers: Servers) -> dict[str, int]:
    return {} if servers.sleeps else {SERVER: servers.taken}
