"""A Ray cluster of two nodes on this machine, with ports and a directory of its own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from ray.job_submission import JobStatus, JobSubmissionClient
from reference.runs import environment, kill_tree

SECONDS_TO_START = 180  # a busy machine
Found = TypeVar("Found")
RAY = Path(sys.executable).with_name("ray")


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Attributes:
        address: of the head, for RAY_ADDRESS.
        dashboard: URL of the dashboard and the Jobs API.
        token: what it asks everybody for.
        env: environment of its nodes.
        scratch: where it keeps its files.
        nodes: its `ray start --block`, the head first.
    """

    address: str
    dashboard: str
    token: str
    env: dict[str, str]
    scratch: Path
    nodes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, options: Sequence[str], prefix: Sequence[str] = ()) -> tuple[subprocess.Popen[str], Path]:
        """A node with one CPU, and its log."""
        names = ("--dashboard-agent-listen-port", "--dashboard-agent-grpc-port", "--runtime-env-agent-port")
        ports = [f"{name}={port}" for name, port in zip(names, free_ports(3), strict=True)]
        common = ["--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats", "--block"]
        log = self.scratch / f"start-{len(self.nodes)}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [*prefix, str(RAY), "start", *options, *common, *ports],
                env=self.env,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self.nodes.append(process)
        return process, log

    def add_node(self, prefix: Sequence[str] = ()) -> None:
        """Another node, 127.0.0.2 and so on.

        Args:
            prefix: a command that runs its `ray start`, such as `unshare ...`.
        """
        number = len(self.nodes) + 1
        process, log = self.start([f"--address={self.address}", f"--node-ip-address=127.0.0.{number}"], prefix)

        def joined() -> bool | None:
            lives(process, log)
            return True if self.node_count() == number else None

        try:
            wait_for(joined, f"node {number}")
        except AssertionError as error:
            raise AssertionError(f"{error}; its log:\n{log.read_text()[-3000:]}") from None

    @property
    def variables(self) -> dict[str, str]:
        """The environment of a driver that joins it."""
        return {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    @property
    def headers(self) -> dict[str, str]:
        """Of a request to the dashboard."""
        return {"Authorization": f"Bearer {self.token}"}

    def jobs(self) -> JobSubmissionClient:
        """The Jobs API, as soon as it answers."""
        return wait_for(lambda: JobSubmissionClient(self.dashboard, headers=self.headers), "the Jobs API")

    def node_count(self) -> int:
        """Nodes that are alive, as the dashboard has it."""
        request = urllib.request.Request(f"{self.dashboard}/nodes?view=summary", headers=self.headers)
        with urllib.request.urlopen(request, timeout=20) as answer:
            summary = json.load(answer)["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in summary)


# A range for each process of pytest-xdist: a port that one has chosen is still free to another until it is taken.
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
_candidates = itertools.count(20000 + 2000 * (_worker % 4) + os.getpid() % 1000)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, no two alike, below those that outgoing connections take."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", next(_candidates)))
            found.append(probe.getsockname()[1])
    return found


def wait_for(attempt: Callable[[], Found | None], what: str, seconds: float = SECONDS_TO_START) -> Found:
    """The first result of ``attempt`` that is not None; its exceptions count as not yet."""
    deadline, last = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        try:
            if (found := attempt()) is not None:
                return found
        except Exception as error:
            last = error
        time.sleep(0.3)
    raise AssertionError(f"no {what} within {seconds} s: {last!r}")


@contextmanager
def two_nodes(variables: dict[str, str] | None = None) -> Iterator[Cluster]:
    """A head and a second node with one CPU each; everything of theirs is killed afterwards.

    Args:
        variables: environment variables of the nodes.
    """
    gcs, dashboard, client = free_ports(3)
    token = secrets.token_hex(32)
    # sockets lie below: their paths are limited to about 100 characters
    scratch = Path(tempfile.mkdtemp(prefix="rc"))
    env = {**environment(), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, **(variables or {})}
    cluster = Cluster(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", token, env, scratch)
    head = [
        *("--head", "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--temp-dir={scratch}"),
        *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        f"--ray-client-server-port={client}",
    ]
    try:
        process, log = cluster.start(head)
        wait_for(partial(listens, gcs, process, log), "Ray head")
        cluster.add_node()
        yield cluster
    finally:
        for node in reversed(cluster.nodes):
            kill_tree(node)
        shutil.rmtree(scratch, ignore_errors=True)


def lives(process: subprocess.Popen[str], log: Path) -> None:
    """An end of the test, with the log of the node, if its process has ended."""
    if process.poll() is not None:
        raise SystemExit(f"a Ray node ended:\n{log.read_text()[-3000:]}")


def listens(port: int, process: subprocess.Popen[str], log: Path) -> bool | None:
    """True once somebody listens."""
    lives(process, log)
    with socket.socket() as probe:
        return True if probe.connect_ex(("127.0.0.1", port)) == 0 else None


def finish(client: JobSubmissionClient, job: str, seconds: float = 400) -> tuple[JobStatus, str]:
    """Status and log of a job that has ended."""

    def ended() -> JobStatus | None:
        status = client.get_job_status(job)
        return status if status.is_terminal() else None

    status = wait_for(ended, f"end of job {job}", seconds)
    return status, client.get_job_logs(job)


__all__ = ["Cluster", "finish", "two_nodes", "wait_for"]
