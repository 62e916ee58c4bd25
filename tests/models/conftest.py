"""Small models of each family that runs on the CPU, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig

from refine_verl.models import FastWeightActor, load_model, make_actor

FAMILIES = ("delta_net", "gated_deltanet")
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "vocab_size": 61,
    "hidden_ratio": 2,
    "fuse_cross_entropy": False,
}


def make_config(family: str, **values: object) -> object:
    """A tiny configuration of ``family``."""
    extra = {"head_dim": 16, "expand_v": 1.0} if family == "gated_deltanet" else {}
    return AutoConfig.for_model(family, **{**TINY, **extra, **values})


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make(family: str) -> Callable[..., FastWeightActor]:
    """``make(activation_checkpointing="none")`` -> the same float64 actor every time."""

    def build(**kwargs: object) -> FastWeightActor:
        model = load_model(None, config=make_config(family), dtype=torch.float64, seed=1)
        with torch.no_grad():  # larger weights than at initialisation: every part of the model matters
            generator = torch.Generator().manual_seed(2)
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        return make_actor(model, **kwargs)

    return build
