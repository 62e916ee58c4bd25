"""Which adapters vLLM serves, and which can be sent to it merged: from PEFT's configuration and names alone."""

from __future__ import annotations

import re
from typing import Any

import peft
import pytest

from refine_verl.serving.adapters import LAYERS, RANKS, room_for, why_adapter_not_served, why_not_sent_merged

NAMES = [
    f"base_model.model.model.layers.0.{place}.lora_{part}.weight"
    for place in ("attn.q_proj", "attn.o_proj", "mlp.down_proj")
    for part in "AB"
]


def config(**fields: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **fields})


@pytest.mark.parametrize(("rank", "room"), [(1, 1), (2, 8), (8, 8), (9, 16), (300, 320), (512, 512)])
def test_room(rank: int, room: int) -> None:
    assert room_for(rank) == room and room in RANKS


def test_an_ordinary_one() -> None:
    assert why_adapter_not_served(config(), NAMES) is None and why_not_sent_merged(config()) is None
    assert why_adapter_not_served(config(use_rslora=True), NAMES) is None  # vLLM divides by the root of the rank, too
    every = [f"base_model.model.model.layers.0.attn.{layer}.lora_A.weight" for layer in LAYERS]
    assert why_adapter_not_served(config(), every) is None


@pytest.mark.parametrize(
    ("fields", "name", "reason", "sent"),
    [
        ({"use_dora": True}, None, "also scales weights", False),
        ({"lora_bias": True}, None, "has biases", False),
        ({"bias": "all"}, None, "has biases", False),
        ({"r": 513}, None, "its rank is 513, and 512 is the largest", True),
        ({"alpha_pattern": {"q_proj": 2}}, None, "its layers differ in rank or alpha .alpha_pattern.", True),
        ({"rank_pattern": {"q_proj": 2}}, None, "rank_pattern", True),
        ({}, "model.layers.0.attn.q_conv1d.lora_A.weight", r"it has model.layers.0.attn.q_conv1d.lora_A.weight$", True),
        ({}, "lm_head.lora_A.weight", "it has lm_head.lora_A.weight$", True),
        ({}, "model.embeddings.lora_embedding_A", "it has model.embeddings.lora_embedding_A$", True),
        ({}, "model.layers.0.attn.q_proj.lora_magnitude_vector", "lora_magnitude_vector$", True),
    ],
)
def test_not_served(fields: dict[str, Any], name: str | None, reason: str, sent: bool) -> None:
    names = [*NAMES, *([] if name is None else [f"base_model.model.{name}"])]
    found = why_adapter_not_served(config(**fields), names)
    assert found is not None and re.search(reason, found), found
    assert (why_not_sent_merged(config(**fields)) is None) == sent
