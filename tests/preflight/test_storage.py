"""Directories that nodes do or do not share; a node is a directory that stands for its root."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from refine_verl.preflight.storage import Node, NodeView, digest, find_unshared, look

Ask = Callable[[Node, str, str, "str | None"], NodeView]


def asking(driver: Path, roots: dict[str, Path]) -> Ask:
    """Every node looks below its own root where the driver looks below ``driver``."""

    def ask(node: Node, token: str, answer: str, model: str | None) -> NodeView:
        there = roots[node.name]
        translated = str(there / Path(token).relative_to(driver))
        return look(translated, answer, model and str(there / Path(model).relative_to(driver)), patience=0)

    return ask


def nodes(*names: str) -> list[Node]:
    return [Node(name, name) for name in names]


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    root = tmp_path / "driver"
    model = root / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_text("weights")
    return root


def node_root(tmp_path: Path, driver: Path, *, shared: bool) -> Path:
    """The root of a node: the driver's files, or copies of them."""
    root = tmp_path / f"node{len(list(tmp_path.iterdir()))}"
    if shared:
        root.symlink_to(driver)
        return root
    (root / "model").mkdir(parents=True)
    for file in (driver / "model").iterdir():
        (root / "model" / file.name).write_text(file.read_text())
    return root


def find(driver: Path, roots: dict[str, Path], model: bool = True) -> str | None:
    finding = find_unshared(
        driver / "runs" / "first", driver / "model" if model else None, nodes(*roots), asking(driver, roots), 0
    )
    return None if finding is None else f"{finding.key}: {finding.message}"


def test_shared_by_all(tmp_path: Path, driver: Path) -> None:
    assert find(driver, {"a": driver, "b": node_root(tmp_path, driver, shared=True)}) is None
    assert sorted(item.name for item in driver.iterdir()) == ["model"]  # runs/first is gone again


def test_what_is_in_the_run_directory_stays(driver: Path) -> None:
    run = driver / "runs" / "first"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    assert find(driver, {"a": driver}) is None
    assert [item.name for item in run.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(("exists", "what"), [(False, "has no such directory"), (True, "a directory of its own")])
def test_a_node_with_its_own_disk(tmp_path: Path, driver: Path, exists: bool, what: str) -> None:
    other = node_root(tmp_path, driver, shared=False)
    if exists:
        (other / "runs" / "first").mkdir(parents=True)
    said = find(driver, {"a": driver, "b": other})
    assert said is not None and said.startswith("trainer.default_local_dir: ") and "node b" in said and what in said
    assert str(driver / "runs" / "first") in said
    assert not (driver / "runs").exists()
    assert not [file for file in other.rglob("*") if "seen-by" in file.name]


def test_a_node_whose_files_do_not_come_back(tmp_path: Path, driver: Path) -> None:
    """It reads a copy of what the driver writes, as one with a one-way mirror would."""
    other = node_root(tmp_path, driver, shared=False)
    plain = asking(driver, {"b": other})

    def mirror(node: Node, token: str, answer: str, model: str | None) -> NodeView:
        copy = other / Path(token).relative_to(driver)
        copy.parent.mkdir(parents=True)
        copy.write_text(Path(token).read_text())
        return plain(node, token, answer, model)

    finding = find_unshared(driver / "runs" / "first", None, nodes("b"), mirror, 0)
    assert finding is not None and "does not see what the node writes" in finding.message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_node_that_may_not_write(driver: Path) -> None:
    plain = asking(driver, {"a": driver})

    def read_only(node: Node, token: str, answer: str, model: str | None) -> NodeView:
        directory = Path(token).parent
        directory.chmod(0o555)
        try:
            return plain(node, token, answer, model)
        finally:
            directory.chmod(0o755)

    finding = find_unshared(driver / "runs" / "first", None, nodes("a"), read_only, 0)
    assert finding is not None and "cannot write there (Permission denied)" in finding.message


def test_why_a_node_cannot_write_is_passed_on(driver: Path) -> None:
    def read_only(_: Node, token: str, __: str, ___: str | None) -> NodeView:
        return NodeView(True, Path(token).read_text(), "Read-only file system", None)

    finding = find_unshared(driver / "runs" / "first", None, nodes("a"), read_only, 0)
    assert finding is not None and "node a cannot write there (Read-only file system)" in finding.message


def test_a_node_without_the_model(tmp_path: Path, driver: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "runs").symlink_to(driver / "runs")
    (driver / "runs").mkdir()
    said = find(driver, {"b": other})
    assert said is not None and said.startswith("model.path: ") and "node b has no such directory" in said
    assert find(driver, {"b": other}, model=False) is None


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_node_with_another_model(tmp_path: Path, driver: Path, file: str) -> None:
    other = node_root(tmp_path, driver, shared=False)
    (driver / "runs").mkdir()
    (other / "runs").symlink_to(driver / "runs")
    assert find(driver, {"b": other}) is None
    (other / "model" / file).write_text('{"hidden_size": 64}')
    said = find(driver, {"b": other})
    assert said is not None and "node b has other files in it" in said


def test_a_file_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    import threading

    token = tmp_path / "token"
    timer = threading.Timer(0.3, token.write_text, ("abc",))
    timer.start()
    view = look(str(token), "answer", None, patience=20)
    timer.join()
    assert view == NodeView(True, "abc", "", None) and (tmp_path / "answer").read_text() == "abc"


def test_digest_of_nothing(tmp_path: Path) -> None:
    assert digest(tmp_path / "none") == "" and digest(tmp_path) != ""
