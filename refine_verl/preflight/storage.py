"""Do all nodes of a cluster see the same files? Asked with real files, before anything else is written.

`find_unshared` knows nothing of Ray: how a node is asked is a function it is given
(`refine_verl.preflight.cluster` sends tasks to the nodes).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

RUN_DIRECTORY = "trainer.default_local_dir"
MODEL = "model.path"
PATIENCE = 5.0
"""Seconds in which a file must become visible elsewhere: network file systems remember directories for a while."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster: Ray's id of it, and what people call it."""

    id: str
    name: str


@dataclass(frozen=True)
class Finding:
    """What is wrong, under which key."""

    key: str
    message: str


@dataclass(frozen=True)
class NodeView:
    """What a node sees of the run directory and of the model.

    Attributes:
        directory_exists: whether the run directory is there at all.
        token: content of the driver's token file, None where it is not there.
        write_error: why the node could not write its own file next to it, empty if it could.
        model: a digest of the model directory, empty where it is not there, None if it was not looked for.
    """

    directory_exists: bool
    token: str | None
    write_error: str
    model: str | None


Ask = Callable[[Node, str, str, "str | None"], NodeView]
"""Node, path of the driver's token file, name for the node's own file beside it, model directory -> what it sees."""


def look(token_path: str, answer_name: str, model: str | None, patience: float = PATIENCE) -> NodeView:
    """Read the driver's token, write an answer beside it, look at the model. Runs on the node that is asked."""
    path = Path(token_path)
    token = path.read_text() if _comes_true(path.exists, patience) else None
    refused = ""
    if token is not None:
        try:
            (path.parent / answer_name).write_text(token)
        except OSError as error:
            refused = error.strerror or str(error)
    return NodeView(path.parent.is_dir(), token, refused, None if model is None else digest(Path(model)))


def digest(directory: Path) -> str:
    """Of the names and sizes of a model directory's files and of its configuration; empty if it is missing."""
    if not directory.is_dir():
        return ""
    known = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.is_file():
            known.update(f"{file.name}:{file.stat().st_size}\n".encode())
    with contextlib.suppress(OSError):
        known.update((directory / "config.json").read_bytes())
    return known.hexdigest()


def find_unshared(
    run_dir: Path, model: Path | None, nodes: Sequence[Node], ask: Ask, patience: float = PATIENCE
) -> Finding | None:
    """The first node that does not share the run directory with this process, or has another model; None if all do.

    Args:
        run_dir: where the run is to be; made for the check where it is not there yet, and removed again.
        model: the model directory; None for random weights or a model of a hub.
        nodes: those that may be given workers.
        ask: sends `look` to a node.
        patience: seconds to wait for a node's file.
    """
    with _token_file(run_dir) as (path, token):
        for number, node in enumerate(nodes):
            answer = f"{path.name}.{number}"
            view = ask(node, str(path), answer, None if model is None else str(model))
            finding = _judge_directory(node, run_dir, token, view) or _judge_model(node, model, view)
            if finding:
                return finding
            file = path.parent / answer
            if not _comes_true(functools.partial(_holds, file, token), patience):
                return Finding(
                    RUN_DIRECTORY,
                    f"{run_dir}: node {node.name} sees what the driver writes there, but the driver does not see what "
                    f"the node writes. {_CURE}",
                )
    return None


_CURE = "Checkpoints need one directory for all nodes: name one on storage that every node mounts under this path."


def _judge_directory(node: Node, run_dir: Path, token: str, view: NodeView) -> Finding | None:
    if view.token is None:
        what = "has a directory of its own there" if view.directory_exists else "has no such directory"
        return Finding(RUN_DIRECTORY, f"{run_dir} is not shared by all nodes: node {node.name} {what}. {_CURE}")
    if view.token != token:
        return Finding(RUN_DIRECTORY, f"{run_dir}: node {node.name} reads other bytes than were written. {_CURE}")
    if view.write_error:
        return Finding(
            RUN_DIRECTORY,
            f"{run_dir}: node {node.name} cannot write there ({view.write_error}). Every worker writes its part of a "
            "checkpoint: let the user that runs Ray on all nodes write to it.",
        )
    return None


def _judge_model(node: Node, model: Path | None, view: NodeView) -> Finding | None:
    if model is None or view.model == digest(model):
        return None
    what = "has other files in it than the driver" if view.model else "has no such directory"
    return Finding(
        MODEL,
        f"{model}: node {node.name} {what}. Every worker reads the model: copy it there, or name a directory on "
        "storage that every node mounts under this path.",
    )


def _holds(file: Path, content: str) -> bool:
    return file.is_file() and file.read_text() == content


def _comes_true(condition: Callable[[], bool], patience: float) -> bool:
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.2)
    return True


@contextlib.contextmanager
def _token_file(run_dir: Path) -> Iterator[tuple[Path, str]]:
    """A file with a random text in ``run_dir``; it, the nodes' answers and directories made for it go away again."""
    made = next((p for p in [*reversed(run_dir.parents), run_dir] if not p.exists()), None)
    run_dir.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex
    path = run_dir / f".seen-by-all-nodes-{os.getpid()}-{token[:8]}"
    try:
        path.write_text(token)
        yield path, token
    finally:
        for file in run_dir.glob(f"{path.name}*"):
            file.unlink(missing_ok=True)
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
