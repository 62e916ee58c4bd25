"""Where the stand-ins are put in use, where they are not, and that each one is compared with something."""

from __future__ import annotations

import ast
import importlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from refine_verl.kernels import cpu_kernels, ensure_kernels, patch, use_cpu_kernels


@pytest.fixture(autouse=True)
def restored() -> Any:
    """Start and end every test with fla as installed."""
    patch._restore()
    yield
    patch._restore()


def current() -> dict[str, Any]:
    """What each target resolves to now, without the wrapper around it."""
    return {target: getattr(value, "uncut", value) for target, value in used().items() if target in patch.TARGETS}


def used() -> dict[str, Any]:
    found = {}
    for target in (*patch.TARGETS, *WRAPPED):
        holder, name = patch._resolve(target)
        found[target] = getattr(holder, name)
    return found


WRAPPED = (*patch.OPERATORS, patch.CONVOLUTION)


def test_every_target_has_a_comparison_test() -> None:
    compared = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for call in node.decorator_list:
                    if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "compares":
                        compared.update(ast.literal_eval(argument) for argument in call.args)
    assert compared == set(patch.TARGETS)


def test_use_replaces_everything_once_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    before = current()
    with caplog.at_level(logging.INFO, logger=patch.__name__):
        use_cpu_kernels()
        use_cpu_kernels()
    assert current() == patch.TARGETS
    assert all(before[target] is not patch.TARGETS[target] for target in before)
    assert len(caplog.records) == 1


def test_context_manager_restores() -> None:
    before = current()
    with cpu_kernels():
        assert patch.cpu_kernels_in_use()
        with cpu_kernels():
            pass
        assert current() == patch.TARGETS
    assert current() == before
    assert not patch.cpu_kernels_in_use()


def test_context_manager_leaves_kernels_that_were_in_use() -> None:
    use_cpu_kernels()
    with cpu_kernels():
        pass
    assert current() == patch.TARGETS


def test_kernels_stay_where_there_is_a_gpu_but_can_be_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    before, plain = current(), used()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ensure_kernels()
    wrapped = used()
    ensure_kernels()
    assert current() == before and used() == wrapped
    for target in plain:
        assert (wrapped[target] is plain[target]) == (target not in WRAPPED), target
    assert all(wrapped[target].uncut is plain[target] for target in WRAPPED)
    patch._restore()
    assert used() == plain


def test_stand_ins_can_be_cut_too() -> None:
    use_cpu_kernels()
    for target in set(WRAPPED) & set(patch.TARGETS):
        assert used()[target].uncut is patch.TARGETS[target]


def test_context_manager_leaves_wrappers_that_were_there() -> None:
    patch.wrap_operators()
    before = used()
    with cpu_kernels():
        assert current() == patch.TARGETS
    after = used()
    assert {name: getattr(value, "uncut", value) for name, value in after.items()} == {
        name: getattr(value, "uncut", value) for name, value in before.items()
    }
    assert all(hasattr(after[target], "uncut") for target in WRAPPED)


def test_nothing_happens_where_there_is_another_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    ensure_kernels()
    assert not patch.cpu_kernels_in_use()


def test_kernels_come_into_use_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    ensure_kernels()
    assert patch.cpu_kernels_in_use()


@pytest.mark.parametrize(
    "target", ["fla.layers.delta_net:gone", "fla.gone:f", "fla.modules.fused_cross_entropy.ops:Gone.forward"]
)
def test_a_missing_target_names_the_version_and_changes_nothing(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = current()
    with monkeypatch.context() as patched:
        patched.setattr(patch, "TARGETS", {**patch.TARGETS, target: len})
        with pytest.raises(RuntimeError, match=rf"0\.6\.\d+ has no {target}.*>=0\.6,<0\.7"):
            use_cpu_kernels()
    assert current() == before


def test_importing_the_package_changes_nothing() -> None:
    before = current()
    importlib.reload(importlib.import_module("refine_verl.kernels"))
    assert current() == before
