"""Whether a cluster could hold a run, and what is said where it could not; no Ray."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from omegaconf import DictConfig, OmegaConf
from packaging.version import Version

from refine_verl.config import ConfigError
from refine_verl.kernels import versions
from refine_verl.preflight import cluster
from refine_verl.preflight.cluster import Request, check_cluster, find_missing_capacity, joins_cluster, suited_nodes

GATED = SimpleNamespace(model_type="gated_deltanet")
FIRST, SECOND = "a" * 56, "b" * 56
"""Ids of nodes."""


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
    check_cluster(a_run(tmp_path), GATED)
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
        check_cluster(config, GATED)
    else:
        with pytest.raises(ConfigError, match=said):
            check_cluster(config, GATED)


@pytest.mark.slow
def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(ConfigError, match="RAY_ADDRESS: cannot join the Ray cluster 127.0.0.1:.*refused"):
            check_cluster(a_run(tmp_path), GATED)
    assert list(tmp_path.iterdir()) == []


def test_an_answer_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(cluster, "SECONDS", 0.05)
    with pytest.raises(ConfigError, match="trainer.nnodes: the Ray cluster did not answer"):
        check_cluster(a_run(tmp_path), GATED)


class FakeRay:
    """Nodes whose tasks run here; a task with GPUs sees those of its node, one without sees none, as Ray has it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, triton: str, gpus: dict[str, tuple[int, int]]) -> None:
        self.asked: list[tuple[str, int]] = []
        seen: list[tuple[int, int]] = []
        monkeypatch.setattr(versions, "installed", lambda: versions.Installed(Version(triton), tilelang=False))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(seen))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: seen[index])

        def remote(**resources: Any) -> Callable[[Callable[..., Any]], Any]:
            def task(function: Callable[..., Any]) -> Any:
                def options(scheduling_strategy: Any) -> Any:
                    def run(*arguments: Any) -> Any:
                        name = scheduling_strategy.node_id
                        self.asked.append((name, resources["num_gpus"]))
                        seen[:] = [gpus[name]] * resources["num_gpus"]
                        return function(*arguments)

                    return SimpleNamespace(remote=run)

                return SimpleNamespace(options=options)

            return task

        monkeypatch.setattr(ray, "remote", remote)
        monkeypatch.setattr(ray, "get", lambda found, timeout: found)


@pytest.mark.parametrize(
    ("triton", "resource", "family", "refused"),
    [
        ("3.6.0", "GPU", "gated_deltanet", True),
        ("3.7.1", "GPU", "gated_deltanet", False),
        ("3.6.0", "GPU", "delta_net", False),
        ("3.6.0", "CPU", "gated_deltanet", False),
    ],
)
def test_what_fla_refuses_on_a_node_is_refused_by_a_driver_without_a_gpu(
    triton: str, resource: str, family: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second node has a Hopper, the first an Ampere."""
    fake = FakeRay(monkeypatch, triton, {FIRST: (8, 0), SECOND: (9, 0)})
    nodes = [cluster.Node(FIRST, "a (10.0.0.1)"), cluster.Node(SECOND, "b (10.0.0.2)")]
    device = {"GPU": "cuda", "CPU": "cpu"}[resource]
    asked = cluster._request(a_run(tmp_path, device=device, n_gpus_per_node=4), SimpleNamespace(model_type=family))
    finding = cluster._ask_nodes(nodes, Request(**json.loads(json.dumps(asdict(asked)))))
    assert fake.asked == [(FIRST, 0), (SECOND, 0), *([(FIRST, 4), (SECOND, 4)] if resource == "GPU" else [])]
    if refused:
        assert finding is not None and finding.key == "model"
        assert finding.message.startswith("node b (10.0.0.2): the gradients of a gated_deltanet are wrong on this GPU")
    else:
        assert finding is None
