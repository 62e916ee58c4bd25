"""The worked example of docs/extending.md: forking its state equals recomputing prefixes, and it trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from reference.toy import NSP, documents_of, draws_for, loss_of, relative
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from refine_verl.compose.composition import compose_config
from refine_verl.compose.validate import validate
from refine_verl.config import ConfigError
from refine_verl.models import (
    Branches,
    Documents,
    FastWeightActor,
    FastWeightState,
    ModelAdapter,
    get_adapter,
    load_model,
    make_actor,
)
from refine_verl.preflight.run import prepare_run

ROOT = Path(__file__).resolve().parents[2]
# float64 rounding through two layers; a wrong state is off by more than 1e-3 (see the negative controls)
RELATIVE = 1e-9
# The recipe trains on python_stdlib; two steps need a batch of sequences and a BPE of 512 pieces.
LINES = 4000


@pytest.fixture
def make() -> Callable[..., FastWeightActor]:
    import new_model  # noqa: F401  registers the model and its adapter

    def build(adapter: ModelAdapter | None = None, activation_checkpointing: str = "none") -> FastWeightActor:
        config = AutoConfig.for_model("decay_memory", vocab_size=61, hidden_size=32)
        model = load_model(None, config=config, dtype=torch.float64, seed=1)
        with torch.no_grad():  # larger weights than at initialisation: every part of the model matters
            generator = torch.Generator().manual_seed(2)
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        return make_actor(model, adapter=adapter, activation_checkpointing=activation_checkpointing)

    return build


class DropsTheShiftedToken:
    """The example's adapter, forgetting one part of the state: what an incomplete adapter looks like."""

    def run(
        self, model: torch.nn.Module, packed: object, state: FastWeightState | None, keep_state: bool
    ) -> tuple[Tensor, FastWeightState | None]:
        if state is not None:
            layers = [{**layer, "shift": torch.zeros_like(layer["shift"])} for layer in state.tree]
            state = FastWeightState(tuple(layers))
        return get_adapter("decay_memory").run(model, packed, state, keep_state)


def roll_out(actor: FastWeightActor, documents: Documents, how: str) -> object:
    draws = draws_for(range(len(documents)))
    nsp = replace(NSP, rollout=how)
    return actor(mode="rollout", documents=documents, nsp=nsp, draws=draws, snapshots=24)


def update(actor: FastWeightActor, documents: Documents, how: str, grad_scope: str = "full") -> dict[str, Tensor]:
    """Loss, log-probabilities and every parameter's gradient of one update pass."""
    generator = torch.Generator().manual_seed(5)
    shape = (len(documents), NSP.chunks, NSP.rollouts_per_position, NSP.rollout_length)
    branches = Branches(torch.tensor([[0, 17, 35], [0, 15, 28]]), torch.randint(0, 61, shape, generator=generator))
    rows = shape[0] * shape[1] * shape[2]
    old = -4 + 0.1 * torch.randn(rows, shape[3], generator=generator, dtype=torch.float64)
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    nsp = replace(NSP, rollout=how, grad_scope=grad_scope)
    output = actor(mode="update", documents=documents, branches=branches, nsp=nsp)
    loss = loss_of(output, documents, old, advantages)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in actor.named_parameters()}
    return {"loss": loss.detach(), "log_probs": output["log_probs"].detach(), **gradients}


def worst(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert got.keys() == wanted.keys()
    return max(relative(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("lengths", [(40,), (40, 33, 51), (7, 7)], ids=["one", "unequal", "shortest"])
def test_forked_rollouts_equal_recomputed_ones(make: Callable[..., FastWeightActor], lengths: tuple[int, ...]) -> None:
    actor, documents = make(), documents_of(lengths)
    forked, recomputed = (roll_out(actor, documents, how) for how in ("fork", "prefix"))
    assert torch.equal(forked.positions, recomputed.positions)
    assert torch.equal(forked.tokens, recomputed.tokens)
    for name in ("log_probs", "predicted_hidden", "target_hidden"):
        assert relative(getattr(forked, name), getattr(recomputed, name)) < RELATIVE, name


@pytest.mark.parametrize("grad_scope", ["full", "branch"])
@pytest.mark.parametrize("checkpointing", ["none", "segment"])
def test_forked_updates_equal_recomputed_ones(
    make: Callable[..., FastWeightActor], grad_scope: str, checkpointing: str
) -> None:
    documents = documents_of((40, 33))
    forked = update(make(activation_checkpointing=checkpointing), documents, "fork", grad_scope)
    assert worst(forked, update(make(), documents, "prefix", grad_scope)) < RELATIVE


def test_an_incomplete_state_is_caught(make: Callable[..., FastWeightActor]) -> None:
    """Negative control: an adapter that drops a part of the state differs by far more than the tolerance."""
    documents = documents_of((40, 33))
    wanted = update(make(), documents, "prefix")
    assert worst(update(make(DropsTheShiftedToken()), documents, "fork"), wanted) > 1e-3
    forked = roll_out(make(DropsTheShiftedToken()), documents, "fork")
    assert relative(forked.log_probs, roll_out(make(), documents, "prefix").log_probs) > 1e-3


def test_the_memory_equals_the_recurrence() -> None:
    """All tokens at once against W_t = a_t W_{t-1} + k_t v_t^T, o_t = W_t^T q_t, token by token."""
    from new_model.modeling import read_and_write

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    log_gate = -torch.rand(2, 3, 9, generator=generator, dtype=torch.float64)
    memory = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    outputs, after = read_and_write(q, k, v, log_gate, memory)
    for t in range(9):
        memory = log_gate[..., t, None, None].exp() * memory + k[..., t, :, None] * v[..., t, None, :]
        read = (memory.transpose(-1, -2) @ q[..., t, :, None]).squeeze(-1)
        assert relative(outputs[..., t, :], read) < RELATIVE
    assert relative(after, memory) < RELATIVE


def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFINE_RECIPES_PATH", str(ROOT / "examples/new_model/recipes"))
    monkeypatch.chdir(tmp_path)
    config = compose_config(["recipe=new_model", "actor_rollout_ref.model.external_lib=not_there"])
    with pytest.raises(ConfigError, match="external_lib: not_there cannot be imported .*PYTHONPATH"):
        prepare_run(validate(config))
    HydraConfig.instance().cfg = None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.runs
def test_it_trains_through_the_command_line(tmp_path: Path) -> None:
    """With the example of a reward of one's own, too: both are found by their import paths, in every process."""
    import new_model  # noqa: F401

    text = tmp_path / "text.jsonl"
    sentences = (f"line {i}: {i} times {i % 7} is {i * (i % 7)}, remember {i % 13}." for i in range(LINES))
    lines = list(sentences)
    text.write_text("".join(json.dumps({"text": " ".join(lines[i : i + 40])}) + "\n" for i in range(0, LINES, 40)))
    run_dir = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "refine_verl.main", "recipe=new_model"),
        *(f"data.train_files={text}", f"data.val_files={text}", f"data.cache_dir={tmp_path / 'cache'}"),
        *("refine.warmup_steps=0", "trainer.total_training_steps=2", f"trainer.default_local_dir={run_dir}"),
        *("model.tokenizer=bpe:300", "data.max_length=128", "refine.nsp.reward=new_reward.near_matches.near_matches"),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "examples"),
        "REFINE_RECIPES_PATH": str(ROOT / "examples/new_model/recipes"),
    }
    environment.pop("RAY_ADDRESS", None)
    finished = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "actor/pg_loss" in record] == [1, 2]
    assert all(record["actor/grad_norm"] > 0 for record in records if "actor/grad_norm" in record)
    for record in records[1:]:
        assert 0 <= record["nsp/reward/mean"] <= 1
        # a token in its place counts whole in both
        assert record["nsp/reward/mean"] >= record["nsp/reward_binary/mean"] - 1e-6
    reloaded, report = AutoModelForCausalLM.from_pretrained(run_dir / "model", output_loading_info=True)
    assert type(reloaded).__name__ == "DecayMemoryForCausalLM"
    assert not report["missing_keys"] and not report["unexpected_keys"]
