"""Nothing unpickles, runs remote code or listens to the world unless asked to; dependencies are bounded."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig
from packaging.requirements import Requirement

from refine_verl.compose.composition import base_schema
from refine_verl.compose.schema import leaves

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    path
    for top in ("refine_verl", "benchmarks", "examples", "docker", ".ci")
    for path in sorted((ROOT / top).rglob("*.py"))
    if "__pycache__" not in path.parts
]
UNPICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def dangers(tree: ast.AST) -> Iterator[str]:
    """What a module does that would run code out of a file it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and {alias.name for alias in node.names} == {"UnpicklingError"}:
            continue  # what torch raises of a file with weights_only=True
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"import {name}" for name in names if name.split(".")[0] in UNPICKLES)
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name == "torch.load" and given.get("weights_only") != "True":
            yield f"{name} without weights_only=True"
        if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
            yield f"{name} with allow_pickle"
        if given.get("trust_remote_code", "False") != "False":
            yield f"{name}(trust_remote_code={given['trust_remote_code']})"
        if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system"):
            yield name
        if given.get("shell", "False") != "False":
            yield f"{name}(shell=...)"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_that_is_read_can_run_code(path: Path) -> None:
    assert list(dangers(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "AutoModel.from_pretrained(d, trust_remote_code=True)",
        "AutoModel.from_pretrained(d, trust_remote_code=config.trust)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f)",
        "eval(x)",
        "subprocess.run(c, shell=True)",
    ],
)
def test_the_search_finds(code: str) -> None:
    assert list(dangers(ast.parse(code)))


def test_remote_code_is_off_by_default() -> None:
    found = {key: value for key, value in leaves(base_schema()) if key.endswith("trust_remote_code")}
    assert found
    for key, value in found.items():
        assert value in (False, None) or str(value).startswith("${"), key


def test_everything_is_bounded_above_and_below() -> None:
    code = (
        "import setuptools, runpy; all = lambda k: [*k['install_requires'], *sum(k['extras_require'].values(), [])]; "
    )
    code += "setuptools.setup = lambda **k: print('\\n'.join(all(k))); runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    requirements = [Requirement(line) for line in done.stdout.split("\n") if line]
    assert {"ray", "verl", "pytest", "lm-eval", "nvtx"} <= {requirement.name for requirement in requirements}
    # the dashboard and the Jobs API
    assert "default" in next(requirement for requirement in requirements if requirement.name == "ray").extras
    for requirement in requirements:
        kinds = {item.operator for item in requirement.specifier}
        assert "==" in kinds or (">=" in kinds and "<" in kinds), str(requirement)


def services(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker" / name).read_text())["services"]


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cpu.yaml"])
def test_containers_publish_to_this_machine_only(name: str) -> None:
    for service, content in services(name).items():
        for port in content.get("ports", []):
            host = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", port)
            assert host.startswith("127.0.0.1:"), f"{service}: {port}"
        assert content["cap_drop"] == ["ALL"] and content["user"] not in ("root", "0", "0:0")
        assert "privileged" not in content and content.get("network_mode") != "host"


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cpu.yaml"])
def test_ray_asks_for_a_token(name: str) -> None:
    for service in services(name).values():
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")  # no default


def test_ray_of_a_run_has_no_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    from refine_verl.trainer import launch
    from refine_verl.trainer.signals import StopSignals

    asked: dict[str, Any] = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(launch.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(launch.ray, "init", lambda **options: asked.update(options))
    monkeypatch.setattr(launch.ray, "shutdown", lambda: None)
    config = base_schema()
    assert isinstance(config, DictConfig)
    config.trainer.update(device="cpu", n_gpus_per_node=1, nnodes=1)
    with launch.ray_session(config, StopSignals()):
        assert asked["address"] == "local" and asked["include_dashboard"] is False
        assert "dashboard_host" not in asked  # Ray's own choice is the loopback interface


# The audit of `make check`


@pytest.fixture
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci/audit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package(name: str, fixes: list[str]) -> dict[str, Any]:
    return {"name": name, "version": "1.0", "vulns": [{"id": "CVE-1", "fix_versions": fixes}]}


@pytest.mark.parametrize(
    ("fixes", "bound", "status"),
    [(["1.5"], "<2", 1), (["2.5"], "<2", 0), ([], "<2", 0), (["2.5", "1.9"], "<2", 1), (["9"], None, 1)],
)
def test_only_what_an_upgrade_cures_fails(
    fixes: list[str], bound: str | None, status: int, audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(audit, "run_audit", lambda: ({"dependencies": [package("Thing_A", fixes)]}, ""))
    requires = [f"thing-a{bound}"] if bound else []
    monkeypatch.setattr(audit.importlib.metadata, "requires", lambda _: requires)
    assert audit.main() == status
    assert "CVE-1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "answer", [(None, "ConnectionError"), ({"dependencies": [{"name": "a", "skip_reason": "not found"}]}, "")]
)
def test_without_the_service_it_is_skipped_aloud(
    answer: Any, audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(audit, "run_audit", lambda: answer)
    assert audit.main() == 0
    assert "SKIPPED" in capsys.readouterr().out


def test_a_tool_that_breaks_says_why(audit: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "COMMAND", [sys.executable, "-c", "raise SystemExit('no route to host')"])
    assert audit.run_audit() == (None, "no route to host")
    monkeypatch.setattr(audit, "COMMAND", [sys.executable, "-c", "import time; time.sleep(30)"])
    monkeypatch.setattr(audit, "SECONDS", 0.2)
    assert audit.run_audit()[0] is None
