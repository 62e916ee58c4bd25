"""The examples: their scripts name runs that the checks let pass, and the reward is one."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest
import torch

from refine_verl.command.keys import take_keys
from refine_verl.compose.composition import compose_config
from refine_verl.compose.recipes import find_configs
from refine_verl.compose.validate import validate
from refine_verl.nsp import RewardInputs, get_reward
from refine_verl.plan.options import PlanSettings

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
REWARD = "new_reward.near_matches.near_matches"
SCRIPTS = ("single_gpu.sh", "node_8gpu.sh", "slurm.sbatch")


@pytest.mark.parametrize("name", SCRIPTS)
def test_syntax(name: str) -> None:
    subprocess.run(["bash", "-n", str(EXAMPLES / name)], check=True)


def fake_python(directory: Path) -> Path:
    """A `python` (and SLURM's programs) that write down what they are asked to run."""
    log = directory / "asked"
    for name, body in {
        "python": f'echo "$@" >> {log}',
        "ray": 'case "$1" in list) echo "\\"node_id\\"";; start) exec sleep 60;; esac',
        "scontrol": "echo node1",
        "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
        "hostname": "echo 10.0.0.1 fe80::1",
    }.items():
        (directory / name).write_text(f"#!/bin/bash\n{body}\n")
        (directory / name).chmod(0o755)
    return log


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_run_is_one_that_would_start(name: str, tmp_path: Path) -> None:
    log = fake_python(tmp_path)
    environment = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "MODEL": "DIR",
        "DATA": "FILES",
        "VALIDATION": "MORE",
        "RUN": str(tmp_path / "run"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_GPUS_ON_NODE": "8",
    }
    command = ["bash", str(EXAMPLES / name), "data.max_length=4096"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    asked = [shlex.split(line) for line in log.read_text().splitlines()]
    runs = [words[2:] for words in asked if words[:2] in (["-m", "refine_verl.main"], ["-m", "refine_verl.plan"])]
    assert len(runs) == (1 if name == "slurm.sbatch" else 2) and all(run == runs[0] for run in runs)
    valid = validate(compose_config(runs[0]), find_configs())
    assert valid.workers == (1 if name == "single_gpu.sh" else 8)
    assert valid.config.data.max_length == 4096


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_missing_is_said(name: str, tmp_path: Path) -> None:
    fake_python(tmp_path)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(EXAMPLES / name)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "MODEL" in done.stderr


@pytest.mark.parametrize("code", [143, 0])
def test_slurms_signal_reaches_the_run_alone(code: int, tmp_path: Path) -> None:
    """The run is given its time, and its exit status is the job's."""
    log = fake_python(tmp_path)
    python = tmp_path / "python"
    wait = "for _ in {1..600}; do sleep 0.1; done"
    python.write_text(
        f"#!/bin/bash\ntrap 'sleep 1; echo saved >> {log}; exit {code}' TERM\necho up >> {log}\n{wait}\nexit 9\n"
    )
    environment = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        **{"MODEL": "DIR", "DATA": "FILES", "RUN": str(tmp_path / "run"), "SLURM_JOB_ID": "7"},
        **{"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1"},
    }
    script = subprocess.Popen(["bash", str(EXAMPLES / "slurm.sbatch")], env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (log.is_file() and "up" in log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        script.terminate()
        assert script.wait(timeout=60) == code
    finally:
        script.kill()
    assert log.read_text().split() == ["up", "saved"]


def test_commands_of_the_page() -> None:
    text = (EXAMPLES / "ray_cluster.md").read_text()
    runs = re.findall(r"-m refine_verl\.(?:main|plan) (recipe=.*)", text)
    assert len(runs) == 2
    for run in runs:
        overrides = [word.replace("/shared", "shared") for word in shlex.split(run)]
        assert validate(compose_config(overrides), find_configs()).workers == 16


# The reward; a run with it is in tests/docs/test_new_model.py


@pytest.fixture
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_the_reward_by_hand(on_the_path: None) -> None:
    hidden = torch.zeros(3, 4, 2)
    inputs = RewardInputs(
        predicted_hidden=hidden,
        target_hidden=hidden,
        predicted_tokens=torch.tensor([[1, 2, 3, 4], [9, 1, 2, 3], [9, 9, 9, 9]]),
        target_tokens=torch.tensor([[1, 2, 3, 4]]).expand(3, -1),
    )
    torch.testing.assert_close(get_reward(REWARD)(inputs), torch.tensor([1.0, 0.375, 0.0]))


def test_plans_of_the_docs_are_of_runs_that_would_start() -> None:
    text = "\n".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    plans = re.findall(r"-m refine_verl\.plan (recipe=[^\n`]*)", text)
    assert len(plans) >= 2
    for plan in plans:
        _, overrides = take_keys(shlex.split(plan), PlanSettings)
        assert len(overrides) >= 3
        validate(compose_config(overrides), find_configs())
