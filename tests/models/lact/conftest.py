"""Small LaCTs whose every part matters, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from refine_verl.models import FastWeightActor, load_model, make_actor
from refine_verl.models.lact import LaCTConfig, LaCTForCausalLM

TINY: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attn_heads": 4,
    "num_lact_heads": 2,
    "lact_chunk_size": 8,
    "window_size": 6,
    "intermediate_size": 20,
    "vocab_size": 61,
    "rope_theta": 100.0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "post-norm, muon": {"use_muon": True, "w0_w2_low_rank": 3, "ttt_nope": True},
    "pre-norm": {"ttt_prenorm": True, "num_lact_heads": 1},
    "no momentum": {"use_momentum": False, "learnable_ttt_scale": False, "window_size": 5, "num_lact_heads": 4},
    "whole window": {"window_size": None, "use_muon": True, "ttt_prenorm": True, "lact_chunk_size": 5},
    "no window": {"window_size": 1},
    "narrow window": {"window_size": 2, "lact_chunk_size": 3},
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def lact() -> Callable[..., LaCTForCausalLM]:
    """``lact(**fields)`` -> a model; the same for the same fields."""

    def build(dtype: torch.dtype = torch.float64, **fields: Any) -> LaCTForCausalLM:
        config = LaCTConfig(**{**TINY, **fields})
        model = load_model(None, config=config, dtype=dtype, seed=1)
        with torch.no_grad():  # larger weights than at initialisation, and rates at which an update shows
            generator = torch.Generator().manual_seed(2)
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((0.2 * noise).to(dtype))
                if name.endswith("lr_proj.bias"):
                    parameter.add_(6)
        assert isinstance(model, LaCTForCausalLM)
        return model.eval()

    return build


@pytest.fixture
def make(lact: Callable[..., LaCTForCausalLM], variant: str) -> Callable[..., FastWeightActor]:
    """``make(**of_make_actor)`` -> an actor of the variant."""
    return lambda **kwargs: make_actor(lact(**VARIANTS[variant]), **kwargs)
