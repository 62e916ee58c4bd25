"""A run on one machine listens to that machine only: Ray's servers, its workers, and the rendezvous of the ranks."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from ray._private import ray_constants
from reference.ray_cluster import wait_for
from reference.runs import last_step, started, toy_overrides, write_corpus

from refine_verl.trainer.launch import on_loopback_only
from refine_verl.workers import rendezvous


def listening(pid: int) -> dict[str, str]:
    """Address and port -> name of the process, for a process and all below it."""
    found = {}
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            name, connections = process.name(), process.net_connections("inet")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        for connection in connections:
            if connection.status == psutil.CONN_LISTEN:
                found[f"{connection.laddr.ip} {connection.laddr.port}"] = name
    return found


def is_loopback(place: str) -> bool:
    return ipaddress.ip_address(place.split()[0].removeprefix("::ffff:")).is_loopback


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_on_one_machine(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    more = ("trainer.total_training_steps=100000", "trainer.n_gpus_per_node=2", "refine.warmup_steps=0")
    with started(toy_overrides(tmp_path, tmp_path / "run", *more), tmp_path) as process:
        wait_for(
            lambda: last_step(tmp_path / "run" / "metrics.jsonl") >= 1 or process.poll() is not None or None, "step"
        )
        assert process.poll() is None, process.stdout and process.stdout.read()
        found = listening(process.pid)
    names = " ".join(found.values())
    assert len(found) > 6 and "raylet" in names and "gcs_server" in names and names.count("ray::") >= 2, found
    assert {place: name for place, name in found.items() if not is_loopback(place)} == {}
    assert not is_loopback(":: 80") and not is_loopback("0.0.0.0 80")


def test_rays_variable_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    monkeypatch.delenv(name, raising=False)
    with on_loopback_only():
        assert os.environ[name] == "0" and not ray_constants.ENABLE_RAY_CLUSTER
    assert name not in os.environ and before == ray_constants.ENABLE_RAY_CLUSTER
    monkeypatch.setenv(name, "1")
    with pytest.raises(RuntimeError), on_loopback_only():
        raise RuntimeError
    assert os.environ[name] == "1"


def test_the_store_listens_where_it_is_told() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = rendezvous._store("127.0.0.1", port, 0, 1)
    store.set("key", "value")
    assert store.get("key") == b"value"
    mine = [place for place in listening(os.getpid()) if place.endswith(f" {port}")]
    assert mine and all(is_loopback(place) for place in mine)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("127.0.0.1", True), ("[::1]", True), ("10.0.0.1", False), ("head", False), ("", False)],
)
def test_other_machines_are_left_to_verl(address: str, loopback: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for name, value in {"MASTER_ADDR": address, "MASTER_PORT": "1", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DIST_INIT_METHOD", raising=False)
    monkeypatch.setattr(rendezvous, "initialize_global_process_group_ray", lambda backend: asked.append("verl"))
    monkeypatch.setattr(rendezvous, "_store", lambda *_: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: asked.append("ours"))
    rendezvous.join_process_group()
    assert asked == ["ours" if loopback else "verl"]
    monkeypatch.setenv("DIST_INIT_METHOD", "file:///tmp/meet")
    rendezvous.join_process_group()
    assert asked[1] == "verl"
