"""Do a configuration and a checkpoint speak of the same LaCT? What weights tell is compared with what is written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from refine_verl.models.lact.configuration import LaCTConfig

_LAYER = re.compile(r"(?:model\.)?layers\.\d+\.attn\.(.+)$")


def check_weights_against_config(config: LaCTConfig, weights: Mapping[str, Sequence[int]]) -> None:
    """Refuse a configuration that contradicts the names and shapes of the weights.

    Not told by weights, and so taken from the configuration: attention heads, muon, rotary embeddings, pre- or
    post-norm, SiLU, window, chunk and the rotary base.

    Args:
        config: of the model that is to be loaded.
        weights: shape of every tensor of the checkpoint.

    Raises:
        ValueError: names every field that disagrees, with its value in the configuration and in the weights.
    """
    found = [(match[1], tuple(shape)) for name, shape in weights.items() if (match := _LAYER.search(name))]
    if not found:
        return
    told: dict[str, set[Any]] = {}
    heads = next((shape[0] for name, shape in found if name == "w1"), config.num_lact_heads)
    for name, shape in found:
        for field, value in _tells(config, name, shape, heads):
            told.setdefault(field, set()).add(value)
    names = {name for name, _ in found}
    told["attn_qk_norm"] = {"q_norm.weight" in names}
    told["use_momentum"] = {"momentum_proj.0.weight" in names}
    told["learnable_ttt_scale"] = {"ttt_scale_proj.weight" in names}
    told["qkv_bias"] = {"qkv.bias" in names}
    wrong = []
    for field, values in told.items():
        written = getattr(config, field)
        if field == "w0_w2_low_rank" and written <= 0:
            written = -1
        if values != {written}:
            seen = " or ".join(str(value) for value in sorted(values, key=str))
            wrong.append(f"{field} is {written} in the configuration and {seen} in the weights")
    if wrong:
        raise ValueError("; ".join(wrong))


def _tells(config: LaCTConfig, name: str, shape: tuple[int, ...], heads: int) -> list[tuple[str, Any]]:
    """What one tensor says of the configuration."""
    if name == "w1":
        _, width, inner = shape
        multiple: float = inner / width
        # a width that is no whole multiple is rounded down by the model
        same = int(width * config.inter_multi) == inner
        return [("num_lact_heads", heads), ("inter_multi", config.inter_multi if same else multiple)]
    if name in ("w0", "w2"):
        return [("w0_w2_low_rank", -1)]
    if name in ("w0.w_left", "w2.w_left"):
        return [("w0_w2_low_rank", shape[-1])]
    if name == "lr_proj.weight":
        return [("lr_dim", shape[0] // (3 * heads))]
    if name == "qkv.weight":
        return [("hidden_size", shape[1])]
    return []
