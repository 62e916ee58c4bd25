"""The sweeps over the paper's ablations: what every script calls is accepted, and names the runs that it makes."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException

from refine_verl.command.jobs import exclude_shared, sweep_jobs
from refine_verl.command.keys import read_keys
from refine_verl.compose.composition import compose_config
from refine_verl.compose.naming import run_name
from refine_verl.compose.validate import validate
from refine_verl.config import ConfigError
from refine_verl.evaluate.settings import EvaluateSettings

SWEEPS = Path(__file__).parents[2] / "examples" / "sweeps"
SCRIPTS = sorted(path.name for path in SWEEPS.glob("*.sh") if path.name != "compare.sh")
RECORDER = """#!{python}
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
"""


@pytest.fixture(autouse=True)
def hydra_left_as_it_was() -> Iterator[None]:
    """Composing tells Hydra of a configuration, which other tests must not meet."""
    yield
    HydraConfig.instance().cfg = None


def calls(script: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Arguments of all calls of Python that a script makes."""
    python, record = directory / "python", directory / "calls.jsonl"
    python.write_text(RECORDER.format(python=sys.executable))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    (directory / "model").mkdir()
    (directory / "documents.txt").write_text("text")
    files = {"MODEL": "model", "DATA": "documents.txt", "EVAL": "model", "VALIDATION": "documents.txt"}
    values = {**files, "PROMPTS": "documents.txt", "PYTHON": python, "CALLS": record}
    environment = {**os.environ, **{key: str(directory / value) for key, value in values.items()}}
    monkeypatch.chdir(directory)
    subprocess.run([str(script), "trainer.n_gpus_per_node=1"], env=environment, check=True, timeout=60)
    return [json.loads(line) for line in record.read_text().splitlines()]


def runs_named(made: list[list[str]]) -> set[str]:
    """Run directories that reports and evaluations are asked for."""
    words = {word for call in made if call[1] != "refine_verl.main" for word in call}
    found = {match for word in words for match in re.findall(r"outputs/refine_verl/([^/]+)", word)}
    return found


def accept(made: list[list[str]]) -> set[str]:
    """Names of the runs of all trainings; raises where a configuration, or an evaluation's arguments, is refused.

    Composing costs half a second, so each value is composed once, not each combination of values.
    """
    names: set[str] = set()
    for _, module, *arguments in made:
        if module == "refine_verl.main":
            names |= accept_training(arguments)
        elif module == "refine_verl.evaluate" and arguments[0] != "compare":
            read_keys(arguments, EvaluateSettings)[0].refuse_without_effect(arguments)
    return names


def accept_training(arguments: list[str]) -> set[str]:
    """Of a multirun, or of a single run."""
    jobs = sweep_jobs(arguments[1:]) if arguments[0] == "-m" else None
    apart = [exclude_shared(arguments[1:]), "hydra.mode=MULTIRUN"] if jobs else []
    shared = set.intersection(*map(set, jobs)) if jobs else set(arguments)
    names, seen = set(), set()
    for job in jobs or [arguments]:
        (recipe,) = (item.partition("=")[2] for item in job if item.startswith("recipe="))
        varying = [item for item in job if item not in shared and not item.startswith("recipe=")]
        names.add(run_name([recipe], [(key, value) for key, _, value in (item.partition("=") for item in varying)]))
        if not seen.issuperset(job):
            seen.update(job)
            config = validate(compose_config([*job, *apart])).config
            assert Path(config.trainer.default_local_dir).name in names
            assert config.trainer.n_gpus_per_node == 1  # what is added to a script reaches the run
    return names


def test_every_ablation_of_the_paper_has_a_script() -> None:
    named = " ".join((SWEEPS / script).read_text().splitlines()[1] for script in SCRIPTS)
    for table in ("Figure 4", "Figure 5, left", "Figure 5, right", "Tables 3", "Table 4", "Table 6", "Table 7", "E.2"):
        assert table in named or table in named.replace("Figures", "Figure")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_sweep_is_accepted_and_looks_at_its_own_runs(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = calls(SWEEPS / script, tmp_path, monkeypatch)
    names = accept(made)
    assert len(names) >= 2 and runs_named(made) == names
    assert made[-1][1] in ("refine_verl.report", "refine_verl.evaluate")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("refine.nsp.chunks=8,2,4", "refine.nsp.chunk=8,2,4"),
        ("refine.nsp.chunks=8,2,4", "refine.nsp.chunks=8,2,0"),
        ("recipe=midtrain ", "recipe=midtraining "),
    ],
)
def test_what_does_not_exist_would_be_noticed(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = calls(_changed(SWEEPS / "figure5_chunks.sh", old, new, tmp_path), tmp_path, monkeypatch)
    with pytest.raises((ConfigError, HydraException), match=re.escape(new.rpartition("=")[0].rpartition(".")[2])):
        accept(made)


def test_runs_of_other_names_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = _changed(SWEEPS / "figure5_chunks.sh", "midtrain_refine.nsp.chunks={8,2,4}", "sft_x={8,2,4}", tmp_path)
    made = calls(changed, tmp_path, monkeypatch)
    assert not runs_named(made) & accept(made)


def test_a_task_that_does_not_exist_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = _changed(SWEEPS / "table4_posttraining.sh", "TASKS=ruler_qa", "TASKS=ruler_aq", tmp_path)
    with pytest.raises(ConfigError, match="ruler_aq"):
        accept([call for call in calls(script, tmp_path, monkeypatch) if call[1] == "refine_verl.evaluate"])


def test_a_script_says_what_it_needs(tmp_path: Path) -> None:
    environment: dict[str, Any] = {key: value for key, value in os.environ.items() if key not in ("MODEL", "DATA")}
    done = subprocess.run(
        [str(SWEEPS / "table6_reward.sh")], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and "MODEL: a model directory or hub id" in done.stderr
    assert list(tmp_path.iterdir()) == []


def _changed(script: Path, old: str, new: str, directory: Path) -> Path:
    text = script.read_text()
    assert old in text
    changed = directory / script.name
    changed.write_text(text.replace(old, new))
    changed.chmod(0o755)
    (directory / "compare.sh").write_text((SWEEPS / "compare.sh").read_text())
    (directory / "compare.sh").chmod(0o755)
    return changed
