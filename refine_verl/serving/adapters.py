"""Which LoRA adapters vLLM serves beside a model. Loads neither vLLM nor PEFT."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `max_lora_rank` may be."""

LAYERS = ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of fla's two families."""

_ALL = "base_model.model."


def room_for(rank: int) -> int:
    """The least `max_lora_rank` in which adapters of this rank have room."""
    return min(size for size in RANKS if size >= rank)


def why_adapter_not_served(config: Any, names: Iterable[str]) -> str | None:
    """What of an adapter vLLM does not compute, or would pass over without a word; None if it serves it.

    Args:
        config: PEFT's, `peft.LoraConfig`.
        names: of its tensors in the file.
    """
    problems = [*_changes(config), *_other_layers(names)]
    if config.r > RANKS[-1]:
        problems.append(f"its rank is {config.r}, and {RANKS[-1]} is the largest")
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(config, name, None):
            problems.append(f"its layers differ in rank or alpha ({name})")
    return "; ".join(problems) or None


def why_not_sent_merged(config: Any) -> str | None:
    """Why what an adapter adds to a weight is not alpha / r B A alone, which can be sent; None if it is.

    Args:
        config: PEFT's, `peft.LoraConfig`.
    """
    return "; ".join(_changes(config)) or None


def _changes(config: Any) -> list[str]:
    found = []
    if getattr(config, "use_dora", False):
        found.append("it also scales weights (use_dora)")
    if getattr(config, "lora_bias", False) or getattr(config, "bias", "none") != "none":
        found.append("it has biases")
    return found


def _other_layers(names: Iterable[str]) -> list[str]:
    others = []
    for name in names:
        layer, _, part = name.removeprefix(_ALL).rpartition(".lora_")
        if part not in ("A.weight", "B.weight") or layer.rpartition(".")[2] not in LAYERS:
            others.append(name.removeprefix(_ALL))
    return [f"it has {sorted(others)[0]}"] if others else []
