"""Post-training whose answers vLLM writes, on the CPU, through the command line, Ray, FSDP2 and verl's servers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from reference.prompt_runs import TEST, prompt_overrides, write_prompts
from reference.runs import TIMEOUT, last_step, read_steps, run_to_the_end, started

ROLLOUT = "actor_rollout_ref.rollout"
VLLM = (
    "refine.outer=grpo",
    "refine.answers.engine=vllm",
    "refine.answers.samples=3",
    "refine.on_policy=true",
    "model.config.hidden_size=128",  # heads of 64, which vLLM's CPU kernels take
    f"{ROLLOUT}.enforce_eager=true",
    f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes=1",  # of 2 MB in all
)
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
# a model of two layers that has learnt for two steps; with the weights of the step before it is above 0.02
BOUND = 0.01


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("answers")
    write_prompts(directory)
    return directory


def engines(pid: int) -> list[psutil.Process]:
    """The processes of vLLM below a run, the engine's first."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if child.name().startswith("VLLM::") or "VLLM::" in "".join(child.cmdline()[:1]):
                found.append(child)
        except psutil.Error:
            continue
    return sorted(found, key=lambda child: "EngineCore" not in "".join(child.cmdline()[:1]))


def test_two_ranks(files: Path) -> None:
    """Weights come from the shards of both ranks, before the answers of each step; the gap is bfloat16's alone."""
    run = files / "two"
    steps = ("trainer.n_gpus_per_node=2", "trainer.total_training_steps=2", "actor_rollout_ref.actor.optim.lr=2e-2")
    code, output = run_to_the_end(prompt_overrides("posttrain", files, run, *VLLM, *steps), files, **ENVIRONMENT)
    assert code == 0, output[-4000:]
    metrics = read_steps(run)
    assert sorted(metrics) == [0, 1, 2]
    for step in (1, 2):
        gap = metrics[step]["answers/log_prob_gap/mean"]
        assert 0 < gap < BOUND and gap <= metrics[step]["answers/log_prob_gap/max"] < 20 * BOUND, metrics[step]
        assert metrics[step]["answer/length/mean"] > 1 and "refine.answers.gap_warning" not in output
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * TEST and {row["step"] for row in rows} == {0, 2}
    assert [row["prediction"] for row in rows[:TEST]] != [row["prediction"] for row in rows[TEST:]]


@pytest.fixture(scope="module")
def killed(files: Path) -> Iterator[tuple[Path, int, str, float]]:
    """A run whose engine is killed in step 2 and again in a later one, with one restart."""
    run = files / "killed"
    more = (
        "trainer.total_training_steps=400",
        "trainer.max_restarts=1",
        "trainer.test_freq=-1",
        "data.max_new_tokens=24",
    )
    overrides = prompt_overrides("posttrain", files, run, *VLLM, *more, "trainer.total_epochs=400")
    deadline = time.monotonic() + TIMEOUT
    with started(overrides, files, **ENVIRONMENT) as process:
        seen: set[int] = set()
        kills = 0
        while process.poll() is None and time.monotonic() < deadline:
            alive = [child for child in engines(process.pid) if child.pid not in seen]
            if kills < 2 and alive and last_step(run / "metrics.jsonl") >= 1 + kills and len(alive) >= 1:
                since = last_step(run / "metrics.jsonl")
                while last_step(run / "metrics.jsonl") == since and process.poll() is None:
                    time.sleep(0.01)
                alive[0].kill()
                seen |= {child.pid for child in engines(process.pid)}
                kills += 1
            time.sleep(0.05)
        output, _ = process.communicate(timeout=TIMEOUT)
        left = [pid for pid in seen if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    assert kills == 2, output[-4000:]
    yield run, process.returncode, output, len(left)


def test_a_killed_server_is_started_again_and_the_next_loss_ends_the_run(killed: Any) -> None:
    run, code, output, left = killed
    assert code == 1, output[-4000:]
    assert "a vLLM server was lost" in output and "It is started again (0 more times)" in output
    assert "The training workers write what is left of this step" in output
    assert "after 1 restart(s) (trainer.max_restarts=1)" in output and "the same command resumes from there" in output
    assert "Traceback" not in output
    saved = int((run / "latest_checkpointed_iteration.txt").read_text())
    steps = read_steps(run)
    assert sorted(steps) == list(range(saved + 1)) or sorted(steps) == list(range(1, saved + 1))
    assert f"Step {saved} was finished" in output and (run / f"global_step_{saved}" / "manifest.json").is_file()
    assert max(record["answers/log_prob_gap/mean"] for step, record in steps.items() if 0 < step < saved) < BOUND
    assert left == 0, "processes of vLLM outlived the run"


def test_the_run_resumes_from_that_checkpoint_with_servers(killed: Any, files: Path) -> None:
    run, *_ = killed
    saved = int((run / "latest_checkpointed_iteration.txt").read_text())
    more = (f"trainer.total_training_steps={saved + 1}", "trainer.test_freq=-1", "data.max_new_tokens=24")
    overrides = prompt_overrides("posttrain", files, run, *VLLM, *more, "trainer.total_epochs=400")
    code, output = run_to_the_end(overrides, files, **ENVIRONMENT)
    assert code == 0, output[-4000:]
    assert 0 < read_steps(run)[saved + 1]["answers/log_prob_gap/mean"] < BOUND
