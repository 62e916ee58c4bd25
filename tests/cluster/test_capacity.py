"""Whether a cluster could hold a run, and what is said where it could not; no Ray."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from refine_verl.config import ConfigError
from refine_verl.preflight import cluster
from refine_verl.preflight.cluster import Request, check_cluster, find_missing_capacity, joins_cluster, suited_nodes


def node(name: str, **resources: float) -> dict[str, Any]:
    return {
        "NodeID": name,
        "NodeManagerHostname": name,
        "NodeManagerAddress": "10.0.0.1",
        "Alive": True,
        "Resources": resources,
    }


def request(resource: str = "GPU", per_node: int = 8, nodes: int = 2) -> Request:
    return Request(resource, per_node, nodes, "run", None)


@pytest.mark.parametrize(
    ("nodes", "asked"),
    [
        ([node("a", GPU=8, CPU=64), node("b", GPU=8, CPU=64)], request()),
        ([node("a", GPU=16, CPU=64)], request()),
        ([node("a", CPU=2), node("b", CPU=2)], request("CPU", 2)),
        ([node("head", CPU=4), node("b", GPU=8, CPU=8)], request(nodes=1)),
    ],
)
def test_enough(nodes: list[dict[str, Any]], asked: Request) -> None:
    assert find_missing_capacity(nodes, asked) is None


@pytest.mark.parametrize(
    ("nodes", "asked", "room"),
    [
        ([node("a", GPU=8, CPU=64)], request(), 1),
        # as many GPUs as asked for, but not eight to a node
        ([node("a", GPU=12, CPU=64), node("b", GPU=4, CPU=64)], request(), 1),
        ([node("a", GPU=8, CPU=4), node("b", GPU=8, CPU=64)], request(), 1),
        ([node("a", CPU=64)], request(), 0),
        ([], request("CPU", 1), 0),
    ],
)
def test_too_little(nodes: list[dict[str, Any]], asked: Request, room: int) -> None:
    finding = find_missing_capacity(nodes, asked)
    assert finding is not None and finding.key == "trainer.nnodes"
    assert f"room for {room} of them" in finding.message
    assert all(item["NodeManagerHostname"] in finding.message for item in nodes)


def test_only_nodes_that_can_get_workers_are_asked() -> None:
    suited = suited_nodes([node("head", CPU=4), node("b", GPU=8, CPU=8)], request(nodes=1))
    assert [item.id for item in suited] == ["b"]


def a_run(tmp_path: Path, **trainer: Any) -> DictConfig:
    return OmegaConf.create(
        {
            "trainer": {
                "device": "cpu",
                "n_gpus_per_node": 1,
                "nnodes": 2,
                "default_local_dir": str(tmp_path / "run"),
                **trainer,
            },
            "model": {"path": None},
            "ray_kwargs": {"ray_init": {"num_cpus": None}},
        }
    )


def test_a_ray_of_its_own_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "_answer_of", lambda _: pytest.fail("asked"))
    check_cluster(a_run(tmp_path))
    named = a_run(tmp_path)
    named.ray_kwargs.ray_init.address = "head:6379"
    assert joins_cluster(named) and not joins_cluster(a_run(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert joins_cluster(a_run(tmp_path))


@pytest.mark.parametrize(("there", "said"), [(8, None), (4, "asks for 8 GPU.* torch sees 4 on this machine")])
def test_gpus_of_this_machine(tmp_path: Path, there: int, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    config = a_run(tmp_path, device="cuda", n_gpus_per_node=8, nnodes=1)
    if said is None:
        check_cluster(config)
    else:
        with pytest.raises(ConfigError, match=said):
            check_cluster(config)


@pytest.mark.slow
def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(ConfigError, match="RAY_ADDRESS: cannot join the Ray cluster 127.0.0.1:.*refused"):
            check_cluster(a_run(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_an_answer_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(cluster, "SECONDS", 0.05)
    with pytest.raises(ConfigError, match="trainer.nnodes: the Ray cluster did not answer"):
        check_cluster(a_run(tmp_path))
