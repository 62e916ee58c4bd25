"""Settings and models that cannot be used in this process, told apart before anything is touched."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from refine_verl.adaptation.settings import AdaptSettings
from refine_verl.kernels.versions import installed, why_not_trainable
from refine_verl.models import FastWeightActor
from refine_verl.models.adapters import sizes
from refine_verl.models.loading import check_family
from refine_verl.models.lora import has_adapters
from refine_verl.models.weights import Unusable, check_numbers, naming
from refine_verl.nsp import check_functions


def check_settings(settings: AdaptSettings, config: object = None) -> None:
    """Check that the reward and the selection strategy exist and return what can be used.

    Args:
        settings: what names them.
        config: of the model, if it is known.

    Raises:
        ConfigError: names the key, and the nearest known name.
    """
    check_functions(settings.nsp, *sizes(config))


def check_model(model: object, trains: bool, caller: str = "refine_verl.adapt", adapters: bool = False) -> None:
    """Check that a model can be adapted here.

    Args:
        model: what the user gave.
        trains: whether weights will be changed (not with method=none).
        caller: what was called, for messages.
        adapters: whether it is LoRA adapters that are trained, and not the weights themselves.

    Raises:
        ModelError: not a Hugging Face model, no adapter, quantised, no linear head, weights spread over devices or
            processes, no numbers, made in inference mode, all frozen, sharing memory, with LoRA adapters already, or
            one that fla refuses to train on this GPU.
    """
    with naming(caller):
        _check(model, trains, adapters)


def _check(model: object, trains: bool, adapters: bool) -> None:
    if torch.is_inference_mode_enabled():
        raise Unusable(
            "torch.inference_mode() is on, and tensors made under it can never have gradients. Leave that "
            "block, or use torch.no_grad() instead."
        )
    if not isinstance(model, PreTrainedModel):
        raise _not_a_model(model)
    if not isinstance(model, FastWeightActor):
        check_family(model.config, on_gpu=next(model.parameters()).device.type == "cuda")
    _check_head(model)
    _check_placement(model)
    check_numbers(model)
    if getattr(model, "is_gradient_checkpointing", False):
        raise Unusable(
            "the model's own gradient checkpointing drops the fast-weight state. Call "
            "model.gradient_checkpointing_disable(), and set activation_checkpointing='layer' instead."
        )
    if adapters and has_adapters(model):
        raise Unusable(
            "the model has adapters already (peft_config). Merge them first (merge_and_unload, or python -m "
            "refine_verl.export), or leave lora_rank out: then they stay in place, and what has requires_grad is "
            "trained, the adapters or, where they are fixed (apply_adapter without trains=True), the model's own "
            "weights."
        )
    if trains:
        if not adapters:
            _check_trainable(model)
        device = next(model.parameters()).device
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        if refused := why_not_trainable(model.config, capability, installed()):
            raise Unusable(refused)


def _not_a_model(model: object) -> Unusable:
    kind = type(model).__name__
    if isinstance(model, (str, bytes)):
        cure = "Load it first: refine_verl.models.load_model(path), or AutoModelForCausalLM.from_pretrained."
    elif hasattr(model, "_orig_mod"):
        cure = "It is compiled: give the model that went into torch.compile."
    elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        cure = "Give the model inside, model.module."
    elif hasattr(model, "peft_config"):
        cure = "Give model.get_base_model(): its adapters stay in place, and only what is trainable is trained."
    else:
        cure = "Give a causal language model of transformers (AutoModelForCausalLM)."
    return Unusable(f"the model is a {kind}, not a Hugging Face model. {cure}")


def _check_head(model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise Unusable(f"the LM head is a {type(head).__name__}; an nn.Linear is needed.")


def _check_placement(model: PreTrainedModel) -> None:
    tensors = dict(model.named_parameters())
    places = {str(tensor.device): name for name, tensor in tensors.items()}
    if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        raise Unusable(
            "the weights are sharded over several processes. Give a model that is whole in this one; for "
            "several GPUs use the command line."
        )
    if "meta" in places:
        raise Unusable(f"{places['meta']} is on the meta device: the weights are not loaded here.")
    if len(places) > 1:
        listing = ", ".join(f"{place} ({name})" for place, name in sorted(places.items()))
        raise Unusable(f"the weights lie on several devices: {listing}. Move the model to one with model.to(device).")
    device = torch.device(next(iter(places)))
    if device.type not in ("cpu", "cuda"):
        raise Unusable(f"the model is on {device}; it runs on the CPU or a CUDA device.")
    made_in_inference = [name for name, tensor in tensors.items() if tensor.is_inference()]
    if made_in_inference:
        raise Unusable(
            f"{made_in_inference[0]} was made under torch.inference_mode() and can never have a gradient. "
            "Load the model outside of that block."
        )


def _check_trainable(model: PreTrainedModel) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise Unusable(
            "all parameters are frozen (requires_grad=False), so there is nothing to adapt. Call "
            "model.requires_grad_(True), or unfreeze the part that should learn."
        )
    ranges = sorted(
        (tensor.untyped_storage().data_ptr(), tensor.storage_offset() * tensor.element_size(), name, tensor)
        for name, tensor in model.named_parameters()
        if tensor.numel()
    )
    for (storage, start, name, tensor), (other, after, second, _) in zip(ranges, ranges[1:], strict=False):
        if storage == other and after < start + tensor.numel() * tensor.element_size():
            raise Unusable(
                f"{name} and {second} share memory without being one parameter, so each would be updated "
                "through the other. Tie them: assign the same nn.Parameter to both."
            )
