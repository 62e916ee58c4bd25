"""verl's FSDP engine around a :class:`~refine_verl.models.FastWeightActor`."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.utils.fsdp_utils import get_fsdp_full_state_dict, get_init_weight_context_manager
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

from refine_verl.config import LoraSettings, ModelSettings, NSPSettings
from refine_verl.models import Branches, Documents, FastWeightActor, load_model, make_actor
from refine_verl.models.answers import end_tokens_of
from refine_verl.models.lora import (
    adapter_parameters,
    add_adapters,
    apply_adapter,
    base_fingerprint,
    has_adapters,
    merged_weights,
    open_adapter,
    write_adapter,
)
from refine_verl.models.stored_types import only_safe_types
from refine_verl.nsp import sentence_ends
from refine_verl.plugin import ENGINE_MODEL_TYPE
from refine_verl.record.checkpoint_files import being_saved, flushed, put_in_place
from refine_verl.workers.objective import Objective, on_device, rollouts_to_learn
from refine_verl.workers.schedule import rising_from_the_first_step, warmup_steps


@EngineRegistry.register(model_type=ENGINE_MODEL_TYPE, backend=["fsdp", "fsdp2"], device=["cuda", "cpu"])
class RefineEngine(FSDPEngine):
    """Builds the actor and runs its update pass; sharding, optimiser, scheduler and checkpoints are verl's.

    ``configure`` must be called before ``initialize``.
    """

    module: FastWeightActor
    nsp: NSPSettings
    model_settings: ModelSettings
    seed: int
    # writes rollouts in the trained pass and adds what the loss needs of them to its micro-batch; set by the worker
    on_policy_pass: Callable[[TensorDict], dict[str, Tensor]]
    # a training step may make several updates, but the schedule moves once per step: with the last of them
    hold_learning_rate = False
    # of the model without adapters, on rank 0 of a run that trains adapters
    base_fingerprint = ""

    def configure(self, nsp: NSPSettings, model: ModelSettings, seed: int) -> None:
        """Settings verl's engine constructor has no place for. ``seed``: of random weights."""
        self.nsp = nsp
        self.model_settings = model
        self.seed = seed

    def _build_module(self) -> nn.Module:
        hf_config = self.model_config.hf_config
        # as in verl: only rank 0 holds weights, the others receive their shards from it
        context = get_init_weight_context_manager(
            use_meta_tensor=not hf_config.tie_word_embeddings, mesh=self.device_mesh
        )
        with context():
            module = load_model(self.model_config.local_path, config=hf_config, seed=self.seed)
        # float32 parameters everywhere; on GPUs bf16 enters through autocast, so that gradients of the several
        # passes over one document are summed in float32
        autocast = torch.bfloat16 if get_device_name() == "cuda" else None
        actor = make_actor(
            module,
            autocast_dtype=autocast,
            activation_checkpointing=self.model_settings.activation_checkpointing,
            reading=self.model_settings.reading,
            balance_coef=self.model_settings.balance_coef,
        )
        tokenizer = self.model_config.tokenizer
        actor.end_tokens = end_tokens_of(actor, tokenizer.eos_token_id)
        actor.sentence_ends = sentence_ends(tokenizer, self.nsp)
        return actor

    def _build_lora_module(self, module: nn.Module) -> nn.Module:
        """With adapters, before it is sharded. verl would wrap the model in another one, which is no actor."""
        section, name = self.model_config, self.model_config.path
        settings = LoraSettings.of({key: getattr(section, key) for key in vars(section)})
        if settings.lora_adapter_path is not None:
            adapter = open_adapter(settings.lora_adapter_path, "actor_rollout_ref.model.lora_adapter_path")
            real = not any(parameter.is_meta for parameter in module.parameters())
            apply_adapter(module, adapter, trains=True, check=real, base=name)
        else:
            add_adapters(module, settings, seed=self.seed, base=name)
        if self.rank == 0:  # the others may have no weights yet
            self.base_fingerprint = base_fingerprint(module)
        return module

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable[..., Any], forward_only: bool = False
    ) -> Any:
        counted = torch.tensor(rollouts_to_learn(data), device=get_device_id())
        torch.distributed.all_reduce(counted, group=self.get_data_parallel_group())
        rollouts, tokens = counted.tolist()
        tu.assign_non_tensor(data, global_rollouts=rollouts, global_rollout_tokens=tokens)
        with self.gathered() if Objective.of(data) is Objective.ON_POLICY else nullcontext():
            return super().forward_backward_batch(data, loss_function, forward_only)

    def forward_step(
        self, micro_batch: TensorDict, loss_function: Callable[..., Any], forward_only: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """One micro-batch through the actor, and its share of the loss."""
        micro_batch = on_device(micro_batch, get_device_id())
        if Objective.of(micro_batch) is Objective.ON_POLICY:
            output = self.on_policy_pass(micro_batch)
        else:
            output = self.trained_pass(micro_batch)
        loss, metrics = loss_function(model_output=output, data=micro_batch, dp_group=self.get_data_parallel_group())
        # verl reads the losses of all micro-batches when all backward passes are on their way
        return loss, {"model_output": {}, "loss": loss.detach(), "metrics": metrics}

    def trained_pass(self, micro_batch: TensorDict) -> dict[str, Tensor]:
        """A micro-batch (`on_device`) through the actor as its :class:`Objective` says."""
        objective, documents = Objective.of(micro_batch), documents_of(micro_batch)
        if objective is Objective.ANSWERS:
            return self.module(
                mode="answer_log_probs",
                prompts=documents,
                tokens=micro_batch["answer_tokens"],
                lengths=micro_batch["answer_lengths"],
                temperature=tu.get(micro_batch, "temperature"),
                segments=self.nsp.chunks + 1 if self.module.checkpoint_segments else 1,
            )
        branches = None
        if objective is Objective.ROLLOUTS:
            branches = Branches(micro_batch["positions"], micro_batch["rollout_tokens"])
        return self.module(mode="update", documents=documents, branches=branches, nsp=self.nsp)

    def _build_lr_scheduler(self, optimizer: Optimizer) -> LambdaLR:
        scheduler = super()._build_lr_scheduler(optimizer)
        return rising_from_the_first_step(scheduler, optimizer, warmup_steps(self.optimizer_config))

    def lr_scheduler_step(self) -> float:
        """The learning rate of the update just made, from which the schedule moves on; verl calls it once per batch."""
        used = float(self.optimizer.param_groups[0]["lr"])
        if not self.hold_learning_rate:
            super().lr_scheduler_step()
        return used

    def all_done(self, done: Tensor) -> bool:
        """Whether ``done`` holds for all rows on all ranks: ranks must stop generating together."""
        answer = done.all().to(torch.int64)
        torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MIN, group=self.get_data_parallel_group())
        return bool(answer.item())

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """For the many short passes of a rollout: gather each layer's shards once, not once in every pass.

        With FSDP2 only; a backward pass frees what it gathered. Costs the memory of the whole model in float32 while
        it lasts.
        """
        root: nn.Module = self.module
        layers = [m for m in root.modules() if isinstance(m, FSDPModule) and m is not root]
        for layer in layers:
            layer.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for layer in layers:
                layer.set_reshard_after_forward(self.engine_config.reshard_after_forward, recurse=False)
                layer.reshard()
            if isinstance(root, FSDPModule):
                root.reshard()  # full weights must not outlive the next optimiser step

    def load_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, del_local_after_load: int = True, **kwargs: Any
    ) -> None:
        """verl's, but a checkpoint is data: one that needs more is not read.

        Raises:
            pickle.UnpicklingError: it names the type that a file needs.
        """
        with only_safe_types():
            super().load_checkpoint(local_path, hdfs_path, del_local_after_load, **kwargs)

    def get_per_tensor_param(self, *arguments: Any, **named: Any) -> tuple[Iterator[tuple[str, Tensor]], Any]:
        """verl's names and full weights, one after the other on all ranks; of adapters what they add to weights.

        verl's own merge puts all of a layer together in place and back, and knows modules of PEFT's wrapper only.
        """
        if not has_adapters(self.module):
            return super().get_per_tensor_param(*arguments, **named)
        device = get_device_id()

        def whole(value: Tensor) -> Tensor:
            if not isinstance(value, DTensor):
                return value
            gathered: Tensor = value.to(device).full_tensor()  # type: ignore[attr-defined]
            return gathered

        return merged_weights(self.module, whole), None

    def save_adapter(self, directory: str, about: dict[str, Any] | None = None) -> None:
        """Write the adapters to a PEFT directory, as `export` writes a model. Call on all ranks."""
        parts = adapter_parameters(self.module)
        whole = {name: (each.full_tensor() if isinstance(each, DTensor) else each) for name, each in parts.items()}
        if self.rank == 0:
            write_adapter(directory, self.module, self.base_fingerprint, about=about, tensors=whole)
        torch.distributed.barrier()

    def export(self, directory: str, processing_class: Any = None) -> None:
        """Write a Hugging Face model directory in the dtype of the parameters (float32). Call on all ranks.

        It is written beside and renamed into place: a kill meanwhile leaves what was there before.
        """
        from transformers import AutoModelForCausalLM

        state = get_fsdp_full_state_dict(self.module, offload_to_cpu=True, rank0_only=True)
        if self.rank == 0:
            final = Path(directory)
            folder = being_saved(final)
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            config = copy.deepcopy(self.model_config.hf_config)
            # verl has put its override there, and who loads the model would get that attention
            vars(config).pop("attn_implementation", None)
            with torch.device("meta"):
                shell = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            shell.save_pretrained(folder, state_dict=state)
            if processing_class is not None:
                processing_class.save_pretrained(folder)
            for file in folder.iterdir():
                flushed(file)
            put_in_place(folder, final)
        torch.distributed.barrier()


def documents_of(batch: TensorDict) -> Documents:
    """The documents of a batch with ``tokens`` int64 [b, Tmax], ``lengths`` int64 [b], maybe ``learn_from`` [b]."""
    return Documents.from_tensors(batch["tokens"], batch["lengths"], batch.get("learn_from", None))
