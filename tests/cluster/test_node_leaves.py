"""A node leaves a running cluster, with its worker; another one joins."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest
from reference.ray_cluster import two_nodes
from reference.runs import (
    TIMEOUT,
    environment,
    kill_tree,
    last_step,
    read_steps,
    started,
    toy_overrides,
    write_corpus,
)

pytestmark = [pytest.mark.slow, pytest.mark.dist, pytest.mark.runs]

NOTICED_SOON = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}


def test_a_run_goes_on_with_the_node_that_takes_its_place(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    run_dir = tmp_path / "run"
    steps = 40
    arguments = toy_overrides(
        tmp_path,
        run_dir,
        f"trainer.total_training_steps={steps}",
        "trainer.nnodes=2",
        "trainer.n_gpus_per_node=1",
        "trainer.save_freq=2",
        "trainer.max_actor_ckpt_to_keep=2",
        "trainer.test_freq=-1",
        "trainer.max_restarts=1",
    )
    # not forked: Ray reads how it authenticates once, when it is imported
    with (
        two_nodes(variables=NOTICED_SOON) as cluster,
        started(arguments, tmp_path, prefix=(), **cluster.variables) as process,
    ):
        deadline = time.monotonic() + TIMEOUT
        while last_step(run_dir / "metrics.jsonl") < 3:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=60)[0][-3000:]
            time.sleep(0.05)
        leaves = cluster.nodes[1]
        kill_tree(leaves)
        left_at = last_step(run_dir / "metrics.jsonl")
        joins = subprocess.Popen(
            leaves.args,
            env={**environment(), **cluster.variables, **NOTICED_SOON},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        finally:
            kill_tree(joins)
    assert process.returncode == 0, output[-4000:]
    assert left_at < steps, "the node left after the run"
    assert "Restart 1 of 1" in output and "127.0.0.2" in output and "Traceback" not in output
    assert list(read_steps(run_dir)) == list(range(steps + 1))
    assert (run_dir / "model").is_dir()
    shutil.rmtree(run_dir)
