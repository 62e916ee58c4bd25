"""What can be said of images and compose files without a container engine."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import refine_verl
from refine_verl.compose.composition import compose_config
from refine_verl.compose.recipes import find_configs
from refine_verl.compose.validate import validate

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
COMPOSE = ("compose.yaml", "compose.cpu.yaml")
DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")
SERVICE_KEYS = {
    *("image", "build", "init", "user", "shm_size", "cap_drop", "security_opt", "ulimits", "environment", "volumes"),
    *("command", "ports", "healthcheck", "depends_on", "deploy"),
}


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("try_build", DOCKER / "try_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["try_build"] = module
    spec.loader.exec_module(module)
    return module


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((DOCKER / name).read_text())


def with_defaults(text: str) -> str:
    """Compose's `${NAME:-default}` where nothing is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@pytest.mark.parametrize("name", COMPOSE)
def test_services(name: str) -> None:
    content = load(name)
    assert set(content) == {"name", "x-node", "services"}
    services = content["services"]
    assert set(services) == {"head", "worker", "train"}
    for service in services.values():
        assert set(service) <= SERVICE_KEYS
        build = service["build"]
        assert (DOCKER / build["context"] / build["dockerfile"]).is_file()
        assert set(service.get("depends_on", {})) <= set(services)
    assert {"head", "worker"} == set(services["train"]["depends_on"])
    assert all(item["condition"] == "service_healthy" for item in services["train"]["depends_on"].values())


def test_gpus_are_for_workers_only() -> None:
    services = load("compose.yaml")["services"]
    device = services["worker"]["deploy"]["resources"]["reservations"]["devices"][0]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert "deploy" not in services["head"] and "--num-gpus=0" in services["head"]["command"]
    assert all("deploy" not in service for service in load("compose.cpu.yaml")["services"].values())


@pytest.mark.parametrize("name", COMPOSE)
def test_the_job_composes(name: str) -> None:
    """`train` is one `ray job submit` of a run that the checks let pass."""
    words = shlex.split(with_defaults(load(name)["services"]["train"]["command"]))
    assert words[:2] == ["sh", "-c"]
    words = shlex.split(words[2])
    assert words[:4] == ["exec", "ray", "job", "submit"]
    run = words[words.index("--") + 1 :]
    assert run[:3] == ["python", "-m", "refine_verl.main"]
    overrides = [word.replace("/outputs/", "outputs/") for word in run[3:]]
    assert validate(compose_config(overrides), find_configs()).workers == 1


@pytest.mark.parametrize("name", COMPOSE)
def test_commands_of_ray_are_known_to_ray(name: str) -> None:
    """Every option in the compose files is one of the installed Ray's."""
    import click
    from ray.scripts.scripts import cli

    services = load(name)["services"]
    lines = [services["head"]["command"], " ".join(services["head"]["healthcheck"]["test"][1:])]
    script = (DOCKER / "start_worker.sh").read_text()
    lines.append(next(line.removeprefix("exec ") for line in script.splitlines() if line.startswith("exec ray")))
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "ray" and isinstance(cli, click.Group)
        command = cli.commands[words[1]]
        known = {option for parameter in command.params for option in parameter.opts}
        given = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
        assert given <= known, given - known


@pytest.mark.parametrize("name", DOCKERFILES)
def test_copied_files_exist_and_are_in_the_context(name: str, builder: ModuleType) -> None:
    allowed = [line[1:] for line in (DOCKER / f"{name}.dockerignore").read_text().splitlines() if line[:1] == "!"]
    copied = [step.value.split()[:-1] for step in builder.read_steps(DOCKER / name) if step.name == "COPY"]
    sources = [source for words in copied if not words[0].startswith("--from") for source in words]
    assert "refine_verl" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(Path(source).match(pattern) for pattern in allowed), f"{source} is kept out by .dockerignore"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_are_built_in_stages_and_not_run_by_root(name: str, builder: ModuleType) -> None:
    steps = builder.read_steps(DOCKER / name)
    assert [step.value.split()[-1] for step in steps if step.name == "FROM"] == ["build", "run"]
    images = [step.value for step in steps if step.name == "ARG" and "_IMAGE=" in step.value]
    assert images and all(re.search(r":\d+\.\d+\.\d+-", image) for image in images)
    users = [step.value for step in steps if step.name == "USER"]
    assert users == ["1000:1000"]
    assert {"LABEL", "HEALTHCHECK", "CMD"} <= {step.name for step in steps}
    label = next(step.value for step in steps if step.name == "LABEL")
    assert f'version="{refine_verl.__version__}"' in label


@pytest.mark.parametrize(("name", "torch"), [("constraints-cpu.txt", None), ("constraints-gpu.txt", "2.13.0")])
def test_pinned_versions_are_within_the_bounds(name: str, torch: str | None) -> None:
    import importlib.metadata

    lines = [line for line in (DOCKER / name).read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert pins.get("torch") == torch
    bounds = {r.name.lower(): r for r in map(Requirement, importlib.metadata.requires("refine_verl") or [])}
    for pin, version in pins.items():
        if pin in bounds and "extra" not in str(bounds[pin].marker):
            assert bounds[pin].specifier.contains(version), f"{pin}=={version}"
    assert pins["verl"] == "0.9.1"


def test_the_gpu_image_has_the_vllm_of_the_extra() -> None:
    release = re.search(r'^VLLM = "(.+)"$', (ROOT / "setup.py").read_text(), re.M)
    assert release is not None
    assert f"vllm=={release[1]}\n" in (DOCKER / "constraints-gpu.txt").read_text()
    assert release[1] in (DOCKER / "Dockerfile").read_text() and release[1] in (ROOT / "docs/vllm.md").read_text()


# Building without an engine


def test_steps_are_read(tmp_path: Path, builder: ModuleType) -> None:
    file = tmp_path / "Dockerfile"
    file.write_text('# a comment\nFROM x AS y\nRUN a \\\n  && b\n# another\nCMD ["c"]\n')
    assert [(step.name, step.value) for step in builder.read_steps(file)] == [
        ("FROM", "x AS y"),
        ("RUN", "a && b"),
        ("CMD", '["c"]'),
    ]


def test_steps_are_run_inside_the_place(tmp_path: Path, builder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "ROOT", tmp_path)
    (tmp_path / "LICENSE").write_text("text")
    place = tmp_path / "image"
    place.mkdir()
    made = builder.Builder(place, {"WHAT": "given"})
    for name, value in (
        ("ARG", "WHAT=default"),
        ("ENV", "HERE=/opt/here"),
        ("COPY", "LICENSE /opt/src/"),
        ("RUN", 'mkdir /opt/here && echo "$WHAT" > "$HERE/file" && test -f /opt/src/LICENSE'),
        ("RUN", "useradd somebody"),
        ("CMD", '["sh", "-c", "true"]'),
    ):
        made.run(builder.Step(name, value))
    assert (place / "opt/here/file").read_text() == "given\n"
    assert (made.ran, made.skipped) == (1, ["useradd somebody"])
    with pytest.raises(subprocess.CalledProcessError):
        made.run(builder.Step("RUN", "false"))
    with pytest.raises(FileNotFoundError, match="no_such_program"):
        made.run(builder.Step("CMD", json.dumps(["no_such_program"])))


# The worker's script


def start_worker(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run it with a `ray` that prints what it was given."""
    fake = tmp_path / "ray"
    fake.write_text('#!/bin/sh\necho "ray $* on ${CUDA_VISIBLE_DEVICES-all}"\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **variables}
    return subprocess.run(
        ["bash", str(DOCKER / "start_worker.sh")], env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(("index", "each", "gpus"), [("1", "2", "0,1"), ("3", "2", "4,5"), ("2", "1", "1")])
def test_workers_of_one_machine_share_its_gpus_out(index: str, each: str, gpus: str, tmp_path: Path) -> None:
    done = start_worker(tmp_path, RAY_HEAD="head:6379", WORKER_INDEX=index, GPUS_PER_WORKER=each)
    assert done.stdout.splitlines()[-1] == f"ray start --address=head:6379 --disable-usage-stats --block on {gpus}"


def test_one_worker_takes_all(tmp_path: Path) -> None:
    assert start_worker(tmp_path, RAY_HEAD="head:6379").stdout.endswith("on all\n")
    assert start_worker(tmp_path).returncode != 0


@pytest.mark.parametrize("answer", ["172.18.0.3  refine_verl-worker-3.refine_verl_default", "172.18.0.3 somewhere"])
def test_the_index_is_in_the_name(answer: str, tmp_path: Path) -> None:
    (tmp_path / "getent").write_text(f"#!/bin/sh\necho '{answer}'\n")
    (tmp_path / "getent").chmod(0o755)
    done = start_worker(tmp_path, RAY_HEAD="head:6379", GPUS_PER_WORKER="1")
    if "worker-3" in answer:
        assert done.stdout.endswith("on 2\n")
    else:
        assert done.returncode != 0 and "WORKER_INDEX" in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("path", sorted([*ROOT.glob("docker/*.sh"), *ROOT.glob("examples/*.s*")]), ids=lambda p: p.name)
def test_shell_scripts(path: Path) -> None:
    subprocess.run(["shellcheck", str(path)], check=True)
