"""Whether the cluster that a run would join can hold it. Asked before documents are tokenised and anything is written.

Enough nodes with enough GPUs (or CPUs), free now; GPUs for which fla's kernels are right with what is installed there;
one run directory and one model for all of them. The question is put by a process of its own
(`python -m refine_verl.preflight.cluster`, a JSON request on its input, the answer on its output): documents are
tokenised by forked processes afterwards, and a process that has talked to Ray should not fork.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from refine_verl.config import ConfigError
from refine_verl.kernels.versions import facts_of, refused_here
from refine_verl.preflight.start import check_own_ray
from refine_verl.preflight.storage import Finding, Node, NodeView, find_unshared, look

RESOURCES = {"cuda": "GPU", "cpu": "CPU"}
"""What Ray calls what one worker needs, by `trainer.device`."""
ADDRESS = "RAY_ADDRESS"
SECONDS_TO_CONNECT = 10
SECONDS_FOR_RESOURCES = 30
SECONDS_PER_NODE = 60
SECONDS = 300
"""For all of it, before it is given up."""
NODES = "trainer.nnodes"


@dataclass(frozen=True)
class Request:
    """What a run needs of a cluster.

    Attributes:
        ray_init: options for `ray.init`.
        resource: `GPU` or `CPU`.
        per_node, nodes: workers of a node and number of nodes.
        run_dir: the run directory.
        model: the model directory, None for random weights or a model of a hub.
        facts: `kernels.versions.facts_of` the model.
    """

    resource: str
    per_node: int
    nodes: int
    run_dir: str
    model: str | None
    facts: dict[str, Any] = field(default_factory=dict)
    ray_init: dict[str, Any] = field(default_factory=dict)


def joins_cluster(config: DictConfig) -> bool:
    """Whether the run joins a cluster that is there instead of starting a Ray of its own."""
    return bool(os.environ.get(ADDRESS) or config.ray_kwargs.ray_init.get("address"))


def check_cluster(config: DictConfig, model: Any) -> None:
    """Check the cluster that a run would join, or the GPUs of this machine.

    Args:
        config: resolved and validated.
        model: the model's configuration.

    Raises:
        ConfigError: no cluster answers, it is too small or busy, a node does not see the run directory or the model, or
            fla refuses to train it on a node's GPUs.
    """
    if not joins_cluster(config):
        _check_this_machine(config)
        return
    finding = _answer_of(_request(config, model))
    if finding is not None:
        raise ConfigError(finding.key, finding.message)


def _check_this_machine(config: DictConfig) -> None:
    import torch

    workers = config.trainer.n_gpus_per_node * config.trainer.nnodes
    if config.trainer.device == "cuda" and torch.cuda.device_count() < workers:
        raise ConfigError(
            "trainer.n_gpus_per_node",
            f"the run asks for {workers} GPU(s) (trainer.n_gpus_per_node={config.trainer.n_gpus_per_node} x "
            f"trainer.nnodes={config.trainer.nnodes}) and torch sees {torch.cuda.device_count()} on this machine. "
            f"Lower them, or set {ADDRESS} to join a Ray cluster.",
        )
    check_own_ray(config)


def _request(config: DictConfig, model: Any) -> Request:
    options: dict[str, Any] = OmegaConf.to_container(config.ray_kwargs.ray_init, resolve=True)  # type: ignore[assignment]
    path = config.model.path
    return Request(
        resource=RESOURCES[config.trainer.device],
        per_node=int(config.trainer.n_gpus_per_node),
        nodes=int(config.trainer.nnodes),
        run_dir=str(config.trainer.default_local_dir),
        model=path if isinstance(path, str) and os.path.isdir(path) else None,
        facts=facts_of(model),
        ray_init={name: options[name] for name in ("address", "namespace") if options.get(name) is not None},
    )


def _answer_of(request: Request) -> Finding | None:
    """Ask in a process of its own."""
    command = [sys.executable, "-m", "refine_verl.preflight.cluster"]
    try:
        done = subprocess.run(
            command, input=json.dumps(asdict(request)), capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding(NODES, f"the Ray cluster did not answer within {SECONDS} s. Does `ray status` work here?")
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise RuntimeError(f"looking at the Ray cluster failed:\n{done.stderr[-3000:]}")
    answer = json.loads(lines[-1])
    return Finding(**answer) if answer else None


# In the process that asks


def main() -> int:
    """Read a `Request`, print a `Finding` or null."""
    request = Request(**json.load(sys.stdin))
    finding = inspect_cluster(request)
    sys.stdout.write("\n" + json.dumps(None if finding is None else asdict(finding)) + "\n")
    return 0


def inspect_cluster(request: Request) -> Finding | None:
    """Connect and look at capacity, what is free, and storage."""
    import ray

    address = str(request.ray_init.get("address") or os.environ.get(ADDRESS))
    try:
        _reach(address)
        ray.init(**{"log_to_driver": False, "configure_logging": False, "logging_level": "ERROR", **request.ray_init})
    except Exception as error:  # ConnectionError, RuntimeError, AuthenticationError ...: whatever Ray comes up with
        return Finding(
            ADDRESS,
            f"cannot join the Ray cluster {address}: {_first_line(error)}. Is it up (`ray status`), and does it ask "
            f"for a token? Without {ADDRESS} the run starts a Ray of its own.",
        )
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        suited = suited_nodes(nodes, request)
        return find_missing_capacity(nodes, request) or _find_busy(request) or _ask_nodes(suited, request)
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Knock at HOST:PORT first: Ray itself tries for minutes.

    Raises:
        OSError: nobody answers.
    """
    host, _, port = address.rpartition(":")
    if port.isdigit() and "://" not in address:
        socket.create_connection((host.strip("[]"), int(port)), SECONDS_TO_CONNECT).close()


def suited_nodes(nodes: Sequence[Mapping[str, Any]], request: Request) -> list[Node]:
    """The nodes that can hold ``per_node`` workers, as `ray.nodes` lists them."""
    return [
        Node(node["NodeID"], f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})")
        for node in nodes
        if places(node, request)
    ]


def places(node: Mapping[str, Any], request: Request) -> int:
    """How many times ``per_node`` workers fit on a node; each takes one CPU, too."""
    have = node["Resources"]
    return int(min(have.get(name, 0) // request.per_node for name in {request.resource, "CPU"}))


def find_missing_capacity(nodes: Sequence[Mapping[str, Any]], request: Request) -> Finding | None:
    """What the cluster would lack even if nobody else used it."""
    total = sum(places(node, request) for node in nodes)
    if total >= request.nodes:
        return None
    there = ", ".join(
        f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}): "
        + " and ".join(f"{node['Resources'].get(name, 0):g} {name}s" for name in sorted({request.resource, "CPU"}))
        for node in nodes
    )
    return Finding(
        NODES,
        f"the run asks for {request.nodes} node(s) with {request.per_node} {request.resource}(s) each "
        f"(trainer.n_gpus_per_node={request.per_node}), and one CPU for each worker; the Ray cluster has room for "
        f"{total} of them ({there}). Lower trainer.nnodes or trainer.n_gpus_per_node, or wait until all nodes have "
        "joined (`ray status`).",
    )


def _find_busy(request: Request) -> Finding | None:
    """Reserve what the run will reserve, and give it back: verl waits for ever for what somebody else holds."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    bundle = {name: 1.0 for name in {request.resource, "CPU"}}
    groups = [placement_group([bundle] * request.per_node, strategy="STRICT_PACK") for _ in range(request.nodes)]
    ready, _ = ray.wait([group.ready() for group in groups], num_returns=len(groups), timeout=SECONDS_FOR_RESOURCES)
    for group in groups:
        remove_placement_group(group)
    if len(ready) == len(groups):
        return None
    free = ray.available_resources()
    return Finding(
        NODES,
        f"the Ray cluster is large enough, but others hold a part of it: {len(ready)} of {request.nodes} nodes with "
        f"{request.per_node} {request.resource}(s) came free within {SECONDS_FOR_RESOURCES} s, now "
        f"{free.get(request.resource, 0):g} {request.resource}s and {free.get('CPU', 0):g} CPUs are free in all. Wait "
        "for the other jobs or stop them (`ray status`, `ray job list`).",
    )


def _ask_nodes(nodes: Sequence[Node], request: Request) -> Finding | None:
    """What only the nodes themselves know."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked = ""

    def ask(function: Callable[..., Any], node: Node, *arguments: Any, gpus: int = 0) -> Any:
        nonlocal asked
        asked = node.name
        affinity = NodeAffinitySchedulingStrategy(node.id, soft=False)
        task = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0)(function)
        return ray.get(task.options(scheduling_strategy=affinity).remote(*arguments), timeout=SECONDS_PER_NODE)

    def look_there(node: Node, *arguments: Any) -> NodeView:
        view: NodeView = ask(look, node, *arguments)
        return view

    model = None if request.model is None else Path(request.model)
    try:
        finding = find_unshared(Path(request.run_dir), model, nodes, look_there)
        for node in nodes if finding is None and request.resource == "GPU" else ():
            # without GPUs of its own a task of Ray's sees none
            if refused := ask(refused_here, node, request.facts, gpus=request.per_node):
                return Finding("model", f"node {node.name}: {refused}")
    except ray.exceptions.RayError as error:
        return Finding(
            NODES,
            f"node {asked} cannot run a task of this package: {_first_line(error)}. Does it have the same Python "
            "environment?",
        )
    return finding


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


if __name__ == "__main__":
    sys.exit(main())
