"""With which Triton fla's kernels train which models on which GPU: told before a run, not in its first backward pass.

What fla 0.6 checks, in `fla.ops.common.chunk_o.chunk_bwd_dqkwg`: on Hopper, Triton from 3.4.0 up to but without 3.7.1
computes wrong gradients of gated rules (fla #640), so fla raises there unless TileLang can take over.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from packaging.version import Version

WRONG_ON_HOPPER = (Version("3.4.0"), Version("3.7.1"))
"""From (inclusive), to (exclusive)."""
RACES_ON_BLACKWELL = Version("3.8.0")
"""Earlier ones; fla 0.6 goes round it, releases before gave NaN without a word (fla #913, #1327)."""
GATED = ("gated_deltanet", "olmo_hybrid", "qwen3_5_text", "qwen3_next")
"""Model types that always have one."""
HOPPER, BLACKWELL = (9,), (10, 12)
"""Major numbers of compute capabilities."""


@dataclass(frozen=True)
class Installed:
    """What decides.

    Attributes:
        triton: its version.
        tilelang: whether fla would use TileLang: installed, with a CUDA compiler, not switched off.
    """

    triton: Version
    tilelang: bool


def installed() -> Installed:
    """What this process has."""
    return Installed(Version(importlib.metadata.version("triton")), _tilelang_is_usable())


def _tilelang_is_usable() -> bool:
    switched_off = os.environ.get("FLA_TILELANG") == "0" or os.environ.get("FLA_DISABLE_BACKEND_DISPATCH") == "1"
    if switched_off or importlib.util.find_spec("tilelang") is None:
        return False
    from fla.utils.env import has_usable_nvcc

    return bool(has_usable_nvcc())


def is_gated(config: Any) -> bool:
    """Whether a model (its Hugging Face configuration, or anything with a ``model_type``) has a gated delta rule."""
    if config.model_type == "gated_deltaproduct":
        return bool(getattr(config, "use_forget_gate", False))
    return config.model_type in GATED


def facts_of(config: Any) -> dict[str, Any]:
    """What of a model's configuration decides, to be sent to another machine."""
    return {name: getattr(config, name) for name in ("model_type", "use_forget_gate") if hasattr(config, name)}


def why_not_trainable(config: Any, capability: tuple[int, int] | None, have: Installed) -> str | None:
    """Why fla refuses to train a model on a GPU, and what to do; None if it does not.

    Args:
        config: see `is_gated`.
        capability: of the GPU, such as (9, 0); None for a CPU.
        have: see `installed`.
    """
    first, last = WRONG_ON_HOPPER
    if capability is None or capability[0] not in HOPPER or have.tilelang or not is_gated(config):
        return None
    if not first <= have.triton < last:
        return None
    gpu = f"Hopper, compute capability {'.'.join(map(str, capability))}"
    return (
        f"the gradients of a {config.model_type} are wrong on this GPU ({gpu}) with triton {have.triton}, so "
        "flash-linear-attention refuses to train it (fla #640). Install TileLang with a CUDA compiler, pip install "
        f'"tilelang[nvcc]>=0.1.9,<0.2", or a torch that brings triton {last} or later (torch 2.12.1). FLA_TILELANG '
        "must not be 0."
    )


def oldest_capability() -> tuple[int, int] | None:
    """Of the GPUs that this process sees; None where there is none, as on the driver's node of a cluster."""
    import torch

    return min((torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())), default=None)


def refused_here(facts: dict[str, Any]) -> str | None:
    """`why_not_trainable` with the GPUs and the packages of this process, of a model's ``model_type`` and the like."""
    return why_not_trainable(SimpleNamespace(**facts), oldest_capability(), installed())


def doubt(config: Any, capability: tuple[int, int] | None, have: Installed) -> str | None:
    """What is not known to be wrong, but better avoided; None if nothing."""
    if capability is None or capability[0] not in BLACKWELL or not is_gated(config):
        return None
    if have.triton >= RACES_ON_BLACKWELL:
        return None
    return (
        f"triton {have.triton} compiles some kernels of gated rules with a race on Blackwell, which "
        "flash-linear-attention 0.6 goes round. python -m refine_verl.doctor compares gradients; triton "
        f"{RACES_ON_BLACKWELL} or later is safer."
    )
