"""What keeps a run on one machine to that machine; a whole one is looked at in tests/trainer/test_faults.py."""

from __future__ import annotations

import os
import socket

import pytest
import torch.distributed as dist
from ray._private import ray_constants
from reference.ports import is_loopback, listening

from refine_verl.trainer.launch import on_loopback_only
from refine_verl.workers import rendezvous


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
