"""`ray job submit` for real: a head and a second node on this machine, jobs through the Jobs API."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient
from reference.ray_cluster import Cluster, finish, two_nodes, wait_for
from reference.runs import last_step, read_steps, toy_overrides, write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.dist, pytest.mark.runs]

TWO_NODES = ("trainer.nnodes=2", "trainer.n_gpus_per_node=1")
# what the job brings along: a recipe, and a reward that writes down where it was called
RECIPE = "# @package _global_\n# A job's own recipe.\nrefine:\n  nsp:\n    reward: noting.noting\n"
REWARD = """
import json, os, pathlib, ray
from refine_verl.nsp import get_reward

NAMES = ("OF_THE_JOB", "OF_THE_RUN", "OF_THE_NODE")

def noting(inputs):
    if ray.is_initialized():  # not yet when the driver tries it out
        content = {"node": ray.get_runtime_context().get_node_id(), **{name: os.environ.get(name) for name in NAMES}}
        pathlib.Path(os.environ["NOTES"], f"{os.getpid()}.json").write_text(json.dumps(content))
    return get_reward("cosine")(inputs)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with two_nodes({"OF_THE_NODE": "yes"}) as running:
        yield running


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    write_corpus(directory)
    return directory


def command(corpus: Path, run_dir: Path, *more: str) -> str:
    overrides = toy_overrides(corpus, run_dir, "refine.warmup_steps=0", *TWO_NODES, *more)
    return " ".join([sys.executable, "-m", "refine_verl.main", *(f"'{item}'" for item in overrides)])


def submit(client: JobSubmissionClient, entrypoint: str, working_dir: Path, **variables: str) -> str:
    environment = {"REFINE_RECIPES_PATH": "recipes", "OMP_NUM_THREADS": "1", **variables}
    runtime = {"working_dir": str(working_dir), "env_vars": environment}
    return client.submit_job(entrypoint=entrypoint, runtime_env=runtime)


@pytest.fixture
def working_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "work"
    (directory / "recipes").mkdir(parents=True)
    (directory / "recipes" / "mine.yaml").write_text(RECIPE)
    (directory / "noting.py").write_text(REWARD)
    return directory


def test_a_job_is_stopped_and_goes_on(cluster: Cluster, corpus: Path, working_dir: Path, tmp_path: Path) -> None:
    """Trained on both nodes, stopped, submitted again and finished."""
    notes, run_dir = tmp_path / "notes", tmp_path / "run"
    notes.mkdir()
    client = cluster.jobs()
    variables = {"OF_THE_JOB": "yes", "NOTES": str(notes), "RAY_JOB_STOP_WAIT_TIME_S": "200"}
    entrypoint = command(
        corpus,
        run_dir,
        "recipe=[quickstart,mine]",
        "trainer.save_freq=100000",
        "trainer.test_freq=-1",
        "+ray_kwargs.ray_init.runtime_env.env_vars.OF_THE_RUN=yes",
    ).replace("'recipe=quickstart' ", "")
    job = submit(client, f"{entrypoint} trainer.total_training_steps=100000", working_dir, **variables)
    wait_for(lambda: last_step(run_dir / "metrics.jsonl") >= 1 or None, "first step", 400)
    client.stop_job(job)
    status, log = finish(client, job)
    assert status == JobStatus.STOPPED and "stops after this step, with a checkpoint" in log, log
    stopped = last_step(run_dir / "metrics.jsonl")
    assert (run_dir / "latest_checkpointed_iteration.txt").read_text() == str(stopped)
    files = sorted(file.name for file in (run_dir / f"global_step_{stopped}" / "actor").glob("model_world_size_2_*.pt"))
    assert files == ["model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"]
    _worked_on_both_nodes(notes)

    job = submit(client, f"{entrypoint} trainer.total_training_steps={stopped + 1}", working_dir, **variables)
    status, log = finish(client, job)
    assert status == JobStatus.SUCCEEDED, log
    assert "The run is in" in log and client.get_job_info(job).driver_exit_code == 0
    assert sorted(step for step in read_steps(run_dir) if step) == list(range(1, stopped + 2))
    assert (run_dir / "model" / "config.json").is_file() and not list(run_dir.glob(".seen-by*"))


def _worked_on_both_nodes(notes: Path) -> None:
    """One worker on each, with what the node, the job and the run put into its environment."""
    noted = [json.loads(file.read_text()) for file in notes.iterdir()]
    assert len({note["node"] for note in noted}) == len(noted) == 2, noted
    for note in noted:
        assert (note["OF_THE_NODE"], note["OF_THE_JOB"], note["OF_THE_RUN"]) == ("yes", "yes", "yes")


def test_what_cannot_run_is_a_failed_job(cluster: Cluster, corpus: Path, working_dir: Path, tmp_path: Path) -> None:
    client = cluster.jobs()
    job = submit(client, command(corpus, tmp_path / "run", "refine.nsp.chunks=0"), working_dir)
    status, log = finish(client, job)
    assert status == JobStatus.FAILED and "error: refine.nsp.chunks: must be at least 1" in log, log
    assert client.get_job_info(job).driver_exit_code == 2
    assert not (tmp_path / "run").exists()


def test_the_dashboard_asks_for_the_token(cluster: Cluster) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{cluster.dashboard}/api/jobs/", timeout=20)
    assert refused.value.code in (401, 403)
    assert cluster.node_count() >= 2


def test_a_cluster_that_is_too_small(cluster: Cluster, tmp_path: Path) -> None:
    assert "has room for 2 of them" in ask_directly(cluster, tmp_path / "run", nodes=3)
    assert list(tmp_path.iterdir()) == []


def test_a_busy_cluster_is_not_waited_for(cluster: Cluster, tmp_path: Path) -> None:
    client = cluster.jobs()
    hold = "import ray, time; ray.init(); ray.get(ray.remote(num_cpus=1)(lambda: time.sleep(600)).remote())"
    holder = client.submit_job(entrypoint=f'{sys.executable} -c "{hold}"')
    try:
        wait_for(lambda: free_cpus(cluster) < 2 or None, "busy CPU")
        done = ask_directly(cluster, tmp_path / "run", "cluster.SECONDS_FOR_RESOURCES = 3", nodes=2)
        assert "others hold a part of it: 1 of 2 nodes" in done
    finally:
        client.stop_job(holder)
        wait_for(lambda: free_cpus(cluster) == 2 or None, "free CPUs")


def free_cpus(cluster: Cluster) -> float:
    script = "import ray; ray.init(log_to_driver=False); print(ray.available_resources().get('CPU', 0))"
    return float(run_python(cluster, script).splitlines()[-1])


def ask_directly(cluster: Cluster, run_dir: Path, *lines: str, nodes: int) -> str:
    """What `inspect_cluster` finds."""
    script = [
        "from refine_verl.preflight import cluster",
        *lines,
        f"print(cluster.inspect_cluster(cluster.Request('CPU', 1, {nodes}, {str(run_dir)!r}, None)))",
    ]
    return run_python(cluster, "\n".join(script))


def run_python(cluster: Cluster, script: str) -> str:
    environment = {**cluster.env, **cluster.variables}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def can_hide_directories() -> bool:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], check=False).returncode == 0


@pytest.mark.skipif(not can_hide_directories(), reason="needs the right to mount: a node that does not see a directory")
def test_a_node_that_does_not_see_the_run_directory(
    cluster: Cluster, corpus: Path, working_dir: Path, tmp_path: Path
) -> None:
    """Last: a third node, in whose file system the directory of the runs is another one."""
    runs = tmp_path / "runs"
    runs.mkdir()
    hide = f'mount -t tmpfs none {runs} && exec "$@"'
    cluster.add_node(["unshare", "--mount", "sh", "-c", hide, "sh"])
    client = cluster.jobs()
    job = submit(client, command(corpus, runs / "first"), working_dir)
    status, log = finish(client, job)
    assert status == JobStatus.FAILED, log
    assert f"error: trainer.default_local_dir: {runs / 'first'} is not shared by all nodes: node" in log, log
    assert "(127.0.0.3)" in log and client.get_job_info(job).driver_exit_code == 2
    assert list(runs.iterdir()) == []
