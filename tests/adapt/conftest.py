"""Small models as a user would have them, and everything about them that must come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference.toy import tiny_config
from torch import Tensor, nn

from refine_verl.models import load_model

FAMILIES = ("delta_net", "gated_deltanet", "lact_swiglu")
# Chunks and windows that prompts of these lengths cross.
LACT = {"num_attn_heads": 2, "num_lact_heads": 2, "lact_chunk_size": 8, "window_size": 8}
LENGTHS = (23, 40, 13, 31, 40)
# A reward that differs between rollouts even where a random model guesses nothing right.
CONFIG: dict[str, Any] = {
    "lr": 1e-2,
    "mini_batch_size": 2,
    "nsp": {"chunks": 3, "rollout_length": 4, "rollouts_per_position": 2, "reward": "cosine"},
}


def build(family: str = "delta_net", dtype: torch.dtype = torch.float32, **values: object) -> Any:
    """The same model every time, with larger weights than at initialisation: every part of it matters."""
    if family == "lact_swiglu":
        values = {**LACT, **values}
    model = load_model(None, config=tiny_config(family, **values), dtype=torch.float32, seed=1)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 61, (length,), generator=generator) for length in lengths]


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything that must be as before, comparable with ``==``."""
    look: dict[str, Any] = {"rng": bits(torch.get_rng_state()), "grad": torch.is_grad_enabled()}
    for name, module in model.named_modules():
        look[f"{name}:class"] = type(module)
        look[f"{name}:training"] = module.training
        look[f"{name}:attributes"] = sorted(module.__dict__)
        look[f"{name}:forward"] = module.__dict__.get("forward")
        look[f"{name}:hooks"] = [sorted(v) for k, v in sorted(module.__dict__.items()) if k.endswith("hooks")]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        grad = parameter.grad
        look[f"{name}:is"] = (id(parameter), parameter.data_ptr(), parameter.dtype, parameter.requires_grad)
        look[f"{name}:bits"] = bits(parameter)
        look[f"{name}:grad"] = None if grad is None else (id(grad), bits(grad))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        look[f"{name}:buffer"] = (id(buffer), buffer.dtype, bits(buffer))
    return look


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make() -> Callable[..., Any]:
    return build
