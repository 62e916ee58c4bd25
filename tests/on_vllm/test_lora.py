"""Adapters beside a served model, as PEFT directories that this package writes: `LLM(DIR, enable_lora=True)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reference.on_vllm import MODELS, adapted, engine, gap, generate, prompts, teacher_forced, write_lora, write_model

from refine_verl.models.loading import load_model
from refine_verl.models.lora import open_adapter
from refine_verl.serving.adapters import LAYERS, RANKS

TIMES_OWN_ROUNDING = 1.5  # as in test_log_probs


@pytest.mark.parametrize(
    ("name", "missing"), [("gated", set()), ("delta_gate_tied", {"a_proj"})], ids=["gated", "delta_gate_tied"]
)
def test_adapters_in_turns(name: str, missing: set[str], tmp_path: Path) -> None:
    """Two adapters in one batch, then none: each answer is its own model's within bfloat16, and no other's."""
    from vllm.lora.request import LoRARequest

    # fused, the last layer of an MLP takes no adapter here
    base = write_model(tmp_path / "m", **MODELS[name], fuse_swiglu=False)
    places = [write_lora(tmp_path / f"a{seed}", base, seed=seed) for seed in (1, 2)]
    layers = {tensor.split(".")[-3] for tensor in open_adapter(places[0]).tensors}
    assert layers == set(LAYERS) - missing
    requests = [LoRARequest(f"a{n}", n, str(place)) for n, place in enumerate(places, 1)]
    with engine(base, enable_lora=True, max_loras=2, max_lora_rank=8) as llm:
        batch = [prompt for prompt in prompts() for _ in requests]
        both = generate(llm, batch, lora_request=requests * len(prompts()))
        answers = [generate(llm, prompts()), both[::2], both[1::2]]
    exact: list[Any] = [load_model(base), *(adapted(base, place) for place in places)]
    rounded = [load_model(base, dtype=torch.bfloat16), *(adapted(base, place, torch.bfloat16) for place in places)]
    for n in range(3):
        mine = answers[n]
        own = [(teacher_forced(exact[n], a.tokens) - teacher_forced(rounded[n], a.tokens)).abs() for a in mine]
        bound = TIMES_OWN_ROUNDING * float(torch.cat(own).mean())
        assert gap(mine, exact[n]) < bound
        assert min(gap(mine, exact[other]) for other in range(3) if other != n) > 5 * bound


def test_ranks_are_those_of_vllm() -> None:
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    assert tuple(sorted(get_args(MaxLoRARanks))) == RANKS
