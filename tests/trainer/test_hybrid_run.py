"""Hybrids through the command line: a whole run on the CPU each, and what it leaves loads again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reference.runs import (
    TOY_DELTANET,
    TOY_EXPERTS,
    TOY_OLMO_HYBRID,
    TOY_QWEN3_5,
    read_steps,
    run_to_the_end,
    toy_overrides,
    write_corpus,
)

pytestmark = [pytest.mark.slow, pytest.mark.dist, pytest.mark.runs]
LAST = 8


MODELS = {
    "olmo_hybrid": TOY_OLMO_HYBRID,
    "qwen3_5_text": TOY_QWEN3_5,
    "delta_net with attention": (*TOY_DELTANET, "+model.config.attn={layers:[1],num_heads:2}"),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_run_on_the_cpu_learns(model: tuple[str, ...], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from refine_verl.kernels import cpu_kernels
    from refine_verl.models import Documents, make_actor

    write_corpus(tmp_path)
    more = [f"trainer.total_training_steps={LAST}", f"trainer.save_freq={LAST}"]
    code, output = run_to_the_end(toy_overrides(tmp_path, tmp_path / "run", *more, model=model), tmp_path)
    assert code == 0, output[-4000:]
    steps = read_steps(tmp_path / "run")
    assert list(steps) == list(range(LAST + 1))
    assert steps[6]["val/ntp_accuracy"] > steps[0]["val/ntp_accuracy"] + 0.2
    assert 2 < steps[LAST]["perf/forward_tokens_per_token"] < 2.3
    assert not any(record.get("actor/skipped_updates") for record in steps.values())
    trained, report = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # not the attention that the run had: its scores of all pairs would fill the memory of who goes on with the model
    assert "attn_implementation" not in json.loads((tmp_path / "run/model/config.json").read_text())
    tokens = torch.arange(97, 123).repeat(3)[None, :60]  # the alphabet, over and over
    with cpu_kernels():
        _, correct = make_actor(trained)(mode="score", documents=Documents(tokens, (60,)))
    assert correct.item() > 0.2 * 59


def test_routes_are_compared(tmp_path: Path) -> None:
    """With experts, in float32, by a run: nearly every token goes to the same ones when it is trained on."""
    write_corpus(tmp_path)
    more = [
        *TOY_EXPERTS,
        "model.balance_coef=0.01",
        "trainer.total_training_steps=3",
        "refine.warmup_steps=1",
        "trainer.test_freq=-1",
    ]
    code, output = run_to_the_end(toy_overrides(tmp_path, tmp_path / "run", *more, model=()), tmp_path)
    assert code == 0, output[-4000:]
    steps = read_steps(tmp_path / "run")
    assert "nsp/expert_agreement" not in steps[1]
    # two routes each: at least 2 for one layer, about that for experts as they are at first
    assert all(0.019 < step["actor/balance_loss"] < 0.04 for step in list(steps.values())[1:])
    assert all(0.95 < steps[step]["nsp/expert_agreement"] <= 1 for step in (2, 3))
