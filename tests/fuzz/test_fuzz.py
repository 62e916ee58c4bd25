"""Mutated input: whatever it is, it acts, or it is refused with its name and exit code 2, and nothing is written."""

from __future__ import annotations

import dataclasses
import os
import shutil

import pytest
from fuzz.cases import Case
from fuzz.files import file_cases
from fuzz.keys import drawn, key_cases
from fuzz.known import KNOWN
from fuzz.runner import Checks, Outcome, fault, run, value_of
from fuzz.stored import stored_cases
from fuzz.world import World, make_world

CASES = {case.id: case for case in [*key_cases(), *file_cases(), *stored_cases()]}
BASES = ("main", "posttrain", "ttt")
ALL = "REFINE_FUZZ_ALL"
SHARE = 0.55


def chosen() -> list[str]:
    """The cases of this run: a draw that fits into two minutes, or all of them where the variable `ALL` is set."""
    share = 1.0 if os.environ.get(ALL) else SHARE
    return [name for name, case in CASES.items() if case.always or drawn(name, share)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def checks(world: World) -> Checks:
    return Checks([world.base(name) for name in BASES])


@pytest.fixture(autouse=True)
def ordinary_surroundings(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    for name in ("RAY_ADDRESS", "REFINE_RECIPES_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(world.root / "cache"))
    shutil.rmtree(world.inputs)
    world.inputs.mkdir()


def judge(case: Case, world: World, checks: Checks | None = None) -> str:
    """What is wrong, or an empty string."""
    if case.make is not None:
        case.make(world)
    quick = checks if case.base in BASES and not case.front else None
    outcome = run(case.command, case.arguments(world), world.here, world.inputs, quick)
    found = fault(outcome, names=case.names, may_act=case.may_act, must_act=case.must_act)
    if not found and outcome.accepted and case.says and not any(words in outcome.errors for words in case.says):
        return f"does not say {' or '.join(case.says)}: {outcome.errors[-300:]!r}"
    if not found and case.has_value and outcome.config is not None and value_of(outcome, case.key) != case.value:
        return f"{case.key}={value_of(outcome, case.key)!r} would run"
    return found


@pytest.mark.parametrize("base", [*BASES, "plan", "evaluate", "inspect", "remember"])
def test_what_nothing_is_wrong_with_acts(base: str, world: World) -> None:
    assert judge(Case(id=base, base=base, must_act=True), world) == ""


@pytest.mark.parametrize("name", chosen())
def test_a_mutation_acts_or_is_refused(name: str, world: World, checks: Checks) -> None:
    found = judge(CASES[name], world, checks)
    if name in KNOWN:
        assert found, f"{name!r} is mended: take it off tests/fuzz/known.py"
        pytest.xfail(found)
    assert found == ""


def test_every_known_failure_is_a_case() -> None:
    assert set(KNOWN) <= CASES.keys()


def test_the_judgement_sees_what_is_wrong(world: World, checks: Checks) -> None:
    """Controls: an outcome of each kind that must not pass."""
    sound = judge(Case(id="x", base="main", changed=("data.seed=7",), names=("data.seed",)), world, checks)
    assert sound == "accepted"
    nameless = Case(id="x", base="main", changed=("refine.nsp.chunks=-1",), names=("trainer.nnodes",))
    assert judge(nameless, world, checks).startswith("does not name trainer.nnodes")
    other = Case(id="x", base="main", changed=("data.seed=7",), key="data.seed", value=8, may_act=True)
    assert judge(other, world, checks) == "data.seed=7 would run"
    refused = Outcome(code=2, config=None, output="", errors="error: a: no.", problem="", written=())
    assert fault(refused, names=("a",), may_act=False) == ""
    for change, found in (
        ({"written": ("here/run",)}, "refused, but wrote here/run"),
        ({"code": 1}, "exit code 1"),
        ({"errors": "error: a.\nerror: a."}, "2 messages"),
        ({"errors": "Traceback (most recent call last)\nerror: a"}, "traceback"),
        ({"problem": "traceback: ValueError: a"}, "traceback: ValueError: a"),
    ):
        assert fault(dataclasses.replace(refused, **change), names=("a",), may_act=False).startswith(found)
