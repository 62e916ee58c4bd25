"""Training LoRA adapters in the workers, on one rank and on two: all phases, there and back, and files."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from reference.adapter_ranks import LORA, ROW
from reference.prompt_runs import prompt_overrides, write_prompts
from reference.ranks import run_ranks
from reference.runs import toy_overrides
from torch import Tensor

from refine_verl.kernels import cpu_kernels
from refine_verl.models import load_model
from refine_verl.models.lora import base_fingerprint
from refine_verl.trainer.ttt import directory_name

pytestmark = [pytest.mark.slow, pytest.mark.dist]

COMMON = (
    "refine.nsp.rollouts_per_position=2",
    # with this epsilon Adam's step is nearly proportional to the gradient: differences stay as small as they were
    "+actor_rollout_ref.actor.optim.override_optimizer_config.eps=1.0",
    "refine.ppo_mini_batch_size=4",
    *LORA,
)
CASES = (("documents", 1), ("documents", 2), ("posttrain", 1), ("posttrain", 2), ("ttt", 2))
GRADIENT = 2e-5  # float32 sums in another order
Results = dict[tuple[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapter_ranks")


@pytest.fixture(scope="module")
def results(directory: Path) -> Results:
    write_prompts(directory)

    def run(what: str, world: int) -> dict[str, Any]:
        if what == "documents":
            overrides = toy_overrides(directory, directory / "run", "refine.warmup_steps=0", *COMMON)
        else:
            overrides = prompt_overrides(what, directory, directory / "run", *COMMON, "refine.nsp.reward=cosine")
        place = directory / f"{what}_{world}"
        return run_ranks(world, place, overrides, what=what, module="reference.adapter_ranks")

    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(CASES, pool.map(lambda case: run(*case), CASES), strict=True))


def worst(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert got.keys() == wanted.keys() and got
    return max(
        ((got[name] - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-30)).item()
        for name in wanted
        if wanted[name].any() or got[name].any()
    )


@pytest.mark.parametrize("world", [1, 2])
def test_adapters_alone_are_trained(results: Results, world: int) -> None:
    found = results["documents", world]
    assert found["trained"] and all("lora_" in name for name in found["trained"])
    assert not any("gate_proj" in name or "down_proj" in name or "lm_head" in name for name in found["trained"])
    after = found["steps"][-1]["parameters"]
    assert {name for name in after if not torch.equal(after[name], found["initial"][name])} == set(found["trained"])


def test_two_ranks_are_one(results: Results) -> None:
    one, two = results["documents", 1], results["documents", 2]
    assert all(torch.equal(one["initial"][name], two["initial"][name]) for name in one["initial"])
    for got, wanted in zip(two["steps"], one["steps"], strict=True):
        assert torch.equal(got["rollouts"]["rollout_tokens"], wanted["rollouts"]["rollout_tokens"])
        for mine, theirs in zip(got["gradients"], wanted["gradients"], strict=True):
            assert worst(mine, theirs) < GRADIENT
        assert got["metrics"]["actor/grad_norm"] == pytest.approx(wanted["metrics"]["actor/grad_norm"], rel=1e-5)
    first, second = (step["gradients"][1] for step in one["steps"])
    assert worst(first, second) > 0.01  # the control


@pytest.mark.parametrize("world", [1, 2])
def test_activation_checkpointing_and_the_fused_step_change_nothing(results: Results, world: int) -> None:
    ways = results["documents", world]["ways"]
    assert len(ways) == 6
    for found in ways.values():
        assert worst(found, results["documents", 1]["ways"]["none", False]) < GRADIENT


@pytest.mark.parametrize("world", [1, 2])
def test_a_snapshot_holds_the_adapters_and_their_optimiser(results: Results, world: int) -> None:
    found = results["documents", world]["snapshot"]
    steps = 4 * len(results["documents", world]["trained"])  # AdamW counts for each parameter
    assert found["kept"] == 12 * found["trained"] + found["buffers"] + steps
    assert found["kept"] < 12 * found["all"] / 4  # even of this model, which is hardly wider than the rank


@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_run_goes_on_bit_for_bit(results: Results, world: int) -> None:
    found = results["documents", world]
    assert all(torch.equal(found["third"][name], value) for name, value in found["resumed"].items())
    last = found["steps"][-1]["parameters"]
    assert not all(torch.equal(last[name], value) for name, value in found["resumed"].items())


@pytest.mark.parametrize("world", [1, 2])
def test_the_adapter_in_files_is_what_was_trained(results: Results, directory: Path, world: int) -> None:
    place = directory / f"documents_{world}"
    base = load_model(place / f"initial_model_{world}_0", seed=42)
    note = json.loads((place / "adapter" / "refine_adapter.json").read_text())
    assert note["rows"] == ["a"] and note["base"]["sha256"] == base_fingerprint(base)
    with cpu_kernels(), torch.no_grad():
        plain = base(input_ids=ROW[None]).logits
        loaded = peft.PeftModel.from_pretrained(base, str(place / "adapter"))(input_ids=ROW[None]).logits
    wanted = results["documents", world]["logits"]
    torch.testing.assert_close(loaded, wanted, rtol=1e-6, atol=1e-6)
    assert (plain - wanted).abs().max() > 1e-4


@pytest.mark.parametrize("world", [1, 2])
def test_servers_are_sent_merged_weights(results: Results, directory: Path, world: int) -> None:
    """By the names of the model without adapters, and as PEFT merges them; the model is not changed by it."""
    place, sent = directory / f"documents_{world}", results["documents", world]["sent"]
    base = load_model(place / f"initial_model_{world}_0", seed=42)
    plain = {name: value.clone() for name, value in base.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(base, str(place / "adapter")).merge_and_unload().state_dict()
    assert sent.keys() == merged.keys() == plain.keys()
    for name, value in merged.items():
        torch.testing.assert_close(sent[name], value, rtol=1e-6, atol=1e-7)
    changed = {name for name in plain if not torch.equal(sent[name], plain[name])}
    trained = {name.partition(".lora_")[0] for name in results["documents", world]["trained"]}
    assert changed == {f"{name}.weight" for name in trained} and len(changed) < len(plain)


@pytest.mark.parametrize("outer", ["sft", "grpo"])
def test_post_training_on_one_rank_and_two(results: Results, outer: str) -> None:
    one, two = results["posttrain", 1][outer], results["posttrain", 2][outer]
    assert len(one["gradients"]) == 4  # two mini-batches of prompts, two of answers
    for got, wanted in zip(two["gradients"], one["gradients"], strict=True):
        assert all("lora_" in name for name in wanted) and worst(got, wanted) < GRADIENT


def test_test_time_training_keeps_each_prompt_and_forgets_it(results: Results) -> None:
    found = results["ttt", 2]
    assert found["restored"] and len(found["answers"]) == 3
    names = {row["id"]: Path(found["at"]) / directory_name(row["id"]) for row in found["answers"]}
    assert sorted(Path(found["at"]).iterdir()) == sorted(names.values())
    weights = set()
    for row, place in names.items():
        assert json.loads((place / "refine_adapter.json").read_text())["rows"] == [row]
        weights.add((place / "adapter_model.safetensors").read_bytes())
    assert len(weights) == 3  # each has learned something of its own


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ("a-1", "a-1"),
        ("../x/y", "%2E.%2Fx%2Fy"),
        (".", "%2E"),
        ("prompts.jsonl:0", "prompts.jsonl%3A0"),
        ("ü", "%C3%BC"),
    ],
)
def test_names_of_directories(row: str, name: str) -> None:
    assert directory_name(row) == name


def test_long_names_differ() -> None:
    names = {directory_name("x" * 300 + str(i)) for i in range(3)}
    assert len(names) == 3 and all(len(name) == 120 for name in names)
