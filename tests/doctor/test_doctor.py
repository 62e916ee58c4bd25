"""Each check with a machine that has the failure, and one that does not."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import socket
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from refine_verl.doctor import __main__ as command
from refine_verl.doctor import diagnosis, installation, kernels, machine
from refine_verl.doctor.findings import FAIL, OK, WARN, Finding
from refine_verl.doctor.machine import GIB


def only(found: Iterator[Finding]) -> Finding:
    findings = list(found)
    assert len(findings) == 1, findings
    assert bool(findings[0].fix) == (findings[0].status != OK)
    return findings[0]


@pytest.mark.parametrize(("version", "status"), [((3, 9), FAIL), ((3, 10), OK), ((3, 12), OK), ((3, 13), FAIL)])
def test_python(version: tuple[int, int], status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation.sys, "version_info", (*version, 0))
    assert only(installation.check_python()).status == status


def test_the_bounds_of_python_are_those_of_setup() -> None:
    declared = SpecifierSet(importlib.metadata.metadata("refine_verl")["Requires-Python"])
    low, high = (f"{major}.{minor}" for major, minor in installation.PYTHONS)
    assert declared == SpecifierSet(f">={low},<{high}")


def test_versions_here_are_in_bounds() -> None:
    assert [finding.status for finding in installation.check_versions()] == [OK]


@pytest.mark.parametrize(
    ("requirement", "says"), [("torch>=99", "needed: >=99"), ("no-such-package>=1", "not installed")]
)
def test_a_version_out_of_bounds(requirement: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation.importlib.metadata, "requires", lambda _: [requirement, "rich>=1"])
    failed, rest = installation.check_versions()
    assert failed.status == FAIL and says in failed.detail
    assert str(Requirement(requirement).specifier) in failed.fix and rest.detail.startswith("1 ")


def test_extras_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = ['no-such-package>=1; extra == "gpu"']
    monkeypatch.setattr(installation.importlib.metadata, "requires", lambda _: extra)
    assert only(installation.check_versions()).status == OK


def test_a_broken_import(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.import_module

    def broken(name: str) -> Any:
        if name == "ray":
            raise OSError("undefined symbol: _Z1x")
        return original(name) if name == "torch" else None

    monkeypatch.setattr(installation.importlib, "import_module", broken)
    finding = only(installation.check_imports())
    assert finding.name == "import ray" and "undefined symbol" in finding.detail


def test_the_plugin_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        installation.importlib.metadata, "entry_points", lambda group: types.SimpleNamespace(names=set())
    )
    assert only(installation.check_plugin()).status == FAIL


def test_the_plugin_is_overruled(monkeypatch: pytest.MonkeyPatch) -> None:
    import refine_verl.plugin as plugin

    def refuse() -> str:
        raise plugin.PluginError("another plug-in has taken the name")

    monkeypatch.setattr(plugin, "check_plugin", refuse)
    assert "another plug-in" in only(installation.check_plugin()).detail


class Properties(NamedTuple):
    name: str
    total_memory: int
    major: int
    minor: int


@pytest.mark.parametrize(
    ("properties", "status"),
    [
        (Properties("H100", 80 * GIB, 9, 0), OK),
        (Properties("V100", 32 * GIB, 7, 0), FAIL),
        (Properties("A2", 16 * GIB, 8, 6), WARN),
    ],
)
def test_gpus(properties: Properties, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert only(machine.check_gpu()).status == status


@pytest.mark.parametrize(("driver", "cuda", "status"), [(None, None, OK), ("smi", None, FAIL), ("smi", "12.8", FAIL)])
def test_no_gpu(driver: str | None, cuda: str | None, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.shutil, "which", lambda _: driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert only(machine.check_gpu()).status == status


@pytest.mark.parametrize(("size", "status"), [(64 << 20, WARN), (16 * GIB, OK)])
def test_shared_memory(size: int, status: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: types.SimpleNamespace(total=size))
    assert only(machine.check_shared_memory()).status == status


@pytest.mark.parametrize(("free", "status"), [(GIB, FAIL), (5 * GIB, WARN), (500 * GIB, OK)])
def test_disk(free: int, status: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "there"))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
    assert {finding.status for finding in machine.check_disk()} == {status}


@pytest.mark.parametrize(("limit", "status"), [(256, FAIL), (4096, WARN), (65536, OK), (-1, OK)])
def test_open_files(limit: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (limit, limit))
    assert only(machine.check_open_files()).status == status


def test_localhost_here() -> None:
    assert only(machine.check_localhost()).status == OK


def test_localhost_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(machine.socket, "create_connection", refuse)
    assert only(machine.check_localhost()).status == FAIL


def test_a_host_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> None:
        raise socket.gaierror("unknown")

    monkeypatch.setattr(machine.socket, "create_server", lambda *_: socket.socket())
    monkeypatch.setattr(machine.socket, "create_connection", lambda *_: socket.socket())
    monkeypatch.setattr(machine.socket, "getaddrinfo", unknown)
    assert only(machine.check_localhost()).status == WARN


# Kernels


def test_the_kernels_in_use_are_right() -> None:
    findings = list(kernels.check_kernels())
    assert [finding.status for finding in findings] == [OK] * 4


def spoil(what: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The CPU's delta rule with one gradient that is wrong (and right values)."""
    from refine_verl.kernels.delta_rule import chunk_delta_rule

    def spoiled(**inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        inputs[what] = inputs[what] * 0.5 + inputs[what].detach() * 0.5
        return chunk_delta_rule(**inputs)

    return spoiled


@pytest.mark.parametrize("what", ["q", "k", "v", "beta", "initial_state"])
def test_a_wrong_gradient_is_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fla.layers.delta_net as layer

    from refine_verl.kernels import ensure_kernels

    ensure_kernels()
    monkeypatch.setattr(layer, "chunk_delta_rule", spoil(what))
    monkeypatch.setattr(kernels, "LENGTHS", (3,))
    found = {finding.name: finding for finding in kernels.check_kernels()}
    assert found["kernel delta rule"].status == FAIL and found["kernel short convolution"].status == OK
    assert f"gradient of {what.removeprefix('initial_')}," in found["kernel delta rule"].detail


def test_wrong_gradients_of_attention_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from refine_verl.models.hybrid import attention

    right = attention.scaled_dot_product_attention

    def spoiled(query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        return right(query, key * 0.5 + key.detach() * 0.5, *rest, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", spoiled)
    monkeypatch.setattr(kernels, "LENGTHS", (3,))
    *others, found = kernels.check_kernels()
    assert found.name == "kernel attention of hybrids" and found.status == FAIL and "gradient of k" in found.detail
    assert "torch" in found.fix and [finding.status for finding in others] == [OK] * 3


def test_not_a_number_is_found() -> None:
    def nan(x: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        out, last = kernels.sequential_delta_rule(x)
        return out * float("nan"), last

    error, _ = kernels.largest_error(nan, kernels.sequential_delta_rule, kernels._delta_inputs, "cpu")
    assert not error <= kernels.LIMITS["cpu"]


def test_a_kernel_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    import fla.layers.delta_net as layer

    from refine_verl.kernels import ensure_kernels

    ensure_kernels()

    def crash(**_: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(layer, "chunk_delta_rule", crash)
    monkeypatch.setattr(kernels, "LENGTHS", (3,))
    assert "no kernel image" in next(kernels.check_kernels()).detail


# The command


def test_exit_status_and_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> Iterator[Finding]:
        raise ValueError("boo")
        yield

    def fine() -> Iterator[Finding]:
        yield Finding("fine", WARN, "so so", "a fix")

    findings, crashed = diagnosis.diagnose([fine]), diagnosis.diagnose([broken])
    monkeypatch.setattr(diagnosis, "diagnose", lambda: findings)
    assert command.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    findings += crashed
    assert command.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False and "boo" in report["findings"][1]["detail"]
    assert command.main([]) == 1
    shown = capsys.readouterr().out
    assert "a fix" in shown and "1 failed" in shown


def test_every_check_is_run() -> None:
    names = {name for module in (installation, machine, kernels) for name in vars(module) if name.startswith("check_")}
    assert {check.__name__ for check in diagnosis.CHECKS} == names
    assert sys.modules["refine_verl.doctor.machine"] is machine
