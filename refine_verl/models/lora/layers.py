"""Adapters inside a model: which linear layers get one, and the way back.

PEFT replaces a linear layer with one that holds it and two small matrices, in place, so that the model stays the one it
was: its class, its forward pass, FSDP2's units and our actor do not notice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refine_verl.config import ALL_LINEAR, ConfigError, LoraSettings, did_you_mean
from refine_verl.config.refusals import with_article

ADAPTER = "default"
"""PEFT's name of the one adapter that a model has here."""
_PART = "lora_"
"""What the names of PEFT's parameters and modules of LoRA begin with."""
_FUSED = (
    "its weight is read by a fused kernel past the layer itself, so that an adapter would be ignored, here and "
    "wherever PEFT loads it"
)


_EXPERTS, _OF_EXPERTS = ("qwen3_next",), ("gate_proj", "up_proj", "down_proj")
"""Families in which PEFT makes these names, wherever they stand, those of the experts' weights."""


def target_names(model: nn.Module, settings: LoraSettings, section: str = LoraSettings.SECTION) -> list[str]:
    """Names of the linear layers that get an adapter, in the order of the model.

    The rules are PEFT's: a name in a list stands for every layer whose dotted name ends with it, a text for a regular
    expression that matches the whole dotted name. `all-linear` leaves out the LM head, which is computed in chunks from
    its weight, layers whose weight is read past them, and those that PEFT takes for others.

    Args:
        model: without adapters; may be on the meta device.
        settings: with a rank.
        section: of the keys, for messages.

    Raises:
        ConfigError: names that no linear layer has, layers that can have no adapter, or none left.
    """
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    linear: dict[str, nn.Linear] = {n: each for n, each in model.named_modules() if isinstance(each, nn.Linear)}
    without = {name: "it is computed in chunks from its weight" for name, module in linear.items() if module is head}
    without.update(_read_around(model))
    wanted, key = settings.target_modules, f"{section}.target_modules"
    if wanted == ALL_LINEAR:
        chosen = [name for name in linear if name not in without]
    else:
        chosen = _matching(wanted, linear, key)
        for name in chosen:
            if name in without:
                cure = (
                    " (config.json: fuse_swiglu=false makes it an ordinary layer)" if "fused" in without[name] else ""
                )
                raise ConfigError(key, f"{name} can have no adapter: {without[name]}{cure}. Leave it out.")
    if settings.exclude_modules is not None:
        left_out = set(_matching(settings.exclude_modules, linear, f"{section}.exclude_modules"))
        chosen = [name for name in chosen if name not in left_out]
    if not chosen:
        raise ConfigError(key, f"no linear layer is left to adapt. There are {_listing(linear)}.")
    return chosen


def _read_around(model: Any) -> dict[str, str]:
    """Linear layers that no adapter reaches, and why."""
    found = {}
    experts = getattr(getattr(model, "config", None), "model_type", "") in _EXPERTS
    for name, module in model.named_modules():
        if experts and isinstance(module, nn.Linear) and name.rpartition(".")[2] in _OF_EXPERTS:
            found[name] = "in this family PEFT takes its name for that of weights of the experts"
        children = []
        if getattr(module, "fuse_swiglu", False):  # GatedMLP of fla
            children.append("down_proj")
        if type(module).__name__ == "HGRN2Attention":
            children.append("o_proj")
        children += ["attn_res_proj", "mlp_res_proj"]  # of fla's blocks with attention over residuals
        for child in children:
            if isinstance(getattr(module, child, None), nn.Linear):
                found[f"{name}.{child}" if name else child] = _FUSED
    return found


def _matching(wanted: str | Sequence[str], linear: dict[str, Any], key: str) -> list[str]:
    if isinstance(wanted, str):
        found = {name for name in linear if re.fullmatch(wanted, name)}
        if not found:
            raise ConfigError(
                key,
                f"{wanted!r} matches no linear layer as a whole, such as {next(iter(linear))!r}. There are "
                f"{_listing(linear)}; give a list of such names.",
            )
    else:
        found = set()
        for entry in wanted:
            mine = {name for name in linear if name == entry or name.endswith(f".{entry}")}
            if not mine:
                hint = did_you_mean(entry, _short(linear))
                raise ConfigError(key, f"no linear layer is called {entry!r}. There are {_listing(linear)}.{hint}")
            found |= mine
    return [name for name in linear if name in found]


def _short(linear: dict[str, Any]) -> list[str]:
    """Last parts of names; of a layer in a sequence, whose last part is a number, the last two."""
    return list(dict.fromkeys(re.search(r"[^.]+(\.\d+)*$", name)[0] for name in linear))  # type: ignore[index]


def _listing(linear: dict[str, Any]) -> str:
    return ", ".join(_short(linear))


def add_adapters(
    model: nn.Module,
    settings: LoraSettings,
    *,
    seed: int,
    section: str = LoraSettings.SECTION,
    base: str | None = None,
    empty: bool = False,
) -> None:
    """Put adapters into a model, in place; they alone are trainable afterwards, and change nothing yet.

    Adapters have the dtype of their layer, and float32 where that is bf16 or fp16.

    Args:
        model: without adapters.
        settings: with a rank.
        seed: of their random half; torch's own random state is not touched.
        section: of the keys, for messages.
        base: directory or hub id of the model, to be noted in files; a directory that is there with its whole path.
        empty: leave them on the meta device.

    Raises:
        ConfigError: see `target_names`.
    """
    import peft

    names = target_names(model, settings, section)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules=names,
        base_model_name_or_path=whole_path(base),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, ADAPTER, low_cpu_mem_usage=empty)
    finish(model)
    if missed := set(names).symmetric_difference(lora_layers(model)):
        put_back(model)
        kind: str = model.config.model_type  # type: ignore[union-attr, assignment]
        raise ConfigError(
            f"{section}.target_modules",
            f"PEFT understands these names otherwise for {with_article(kind)} ({sorted(missed)[0]}). Leave such layers "
            "out with exclude_modules.",
        )


def whole_path(base: str | None) -> str | None:
    """The name of a base, with its whole path if it is a directory here: files are used from other directories, too."""
    return str(Path(base).absolute()) if base is not None and Path(base).is_dir() else base


def finish(model: nn.Module) -> None:
    """What `inject_adapter_in_model` leaves undone that PEFT's other doors do."""
    for module in lora_layers(model).values():
        for name, parameter in module.named_parameters():
            if _PART in name and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
        base = next(module.get_base_layer().parameters())
        # with one dtype only autocast makes inputs of another, and it would convert them back
        module.cast_input_dtype_enabled = any(each.dtype != base.dtype for each in module.parameters())


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Layers with adapters by name."""
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has adapters of PEFT."""
    return hasattr(model, "peft_config")


def put_back(model: nn.Module) -> None:
    """Take adapters out; the layers are the ones they were put around. Flags of parameters stay as they are."""
    for name, module in lora_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.get_base_layer())
    if has_adapters(model):
        del model.peft_config


def adapter_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters of adapters by the names that PEFT has for them in files."""
    found = {}
    for layer, module in lora_layers(model).items():
        for name, parameter in module.named_parameters():
            if name.startswith(_PART):
                found[f"base_model.model.{layer}.{name.replace(f'.{ADAPTER}', '', 1)}"] = parameter
    return found


def merged_weights(model: nn.Module, whole: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model with what its adapters add to them, by its names without adapters, one at a time.

    The model is not changed. Weights of layers without adapters are handed over as ``whole`` returns them.

    Args:
        model: with adapters, whose tensors may be shards.
        whole: puts a tensor together; called in the same order on all ranks.

    Yields:
        What PEFT's merge would put there, in the dtype of the weight: W + alpha / r B A.
    """
    layers = lora_layers(model)
    for name, value in model.state_dict().items():
        if f".{_PART}" in name:
            continue
        layer = name.rpartition(".base_layer.")[0] if name.endswith(".base_layer.weight") else ""
        weight = whole(value)
        if layer:
            found = layers[layer]
            first, second = (whole(getattr(found, part)[ADAPTER].weight.detach()) for part in ("lora_A", "lora_B"))
            added = found.scaling[ADAPTER] * (second.to(first.dtype) @ first)
            weight = (weight.to(first.dtype) + added).to(weight.dtype)
        yield name.replace(".base_layer.", "."), weight


def trainable_numbers(model: nn.Module, settings: LoraSettings) -> int:
    """How many numbers of a model without adapters would be trained: all, or those of the adapters."""
    if not settings.lora_rank:
        return sum(parameter.numel() for parameter in model.parameters())
    layers = [model.get_submodule(name) for name in target_names(model, settings)]
    return sum(settings.lora_rank * (layer.in_features + layer.out_features) for layer in layers)  # type: ignore
