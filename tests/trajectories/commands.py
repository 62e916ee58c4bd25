"""What the command lines say: help, plans, small results, and refusals."""

from __future__ import annotations

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trajectories.process import normal_lines, package_directory, run_module, scratch_directory
from trajectories.scenarios import DELTANET, OLD_RUN_RESUMED, unpack_old_run, write_data

AT_A_TIME = 2


@dataclass(frozen=True)
class Case:
    """`python -m refine_verl.MODULE ARGUMENTS` in a directory with data/, model/, run/ and text.txt."""

    name: str
    line: str
    more: tuple[str, ...] = ()
    stdin: str = ""

    @property
    def module(self) -> str:
        return f"refine_verl.{self.line.split()[0]}"

    @property
    def arguments(self) -> list[str]:
        return [*self.line.split()[1:], *self.more]


SMALL = ("data.max_length=64", "data.train_batch_size=8", "refine.ppo_mini_batch_size=4")
HERE = ("trainer.device=cpu", "trainer.n_gpus_per_node=1")
FILES = "data.train_files=data/train.jsonl data.val_files=data/validation.jsonl"
PROMPTS = "data.train_files=data/prompts.jsonl data.val_files=data/test_prompts.jsonl"
QUICK = "main recipe=quickstart model.tokenizer=bytes"
MIDTRAIN = f"main recipe=midtrain model.path=model {FILES}"
TTT = "main recipe=ttt model.path=model data.val_files=data/test_prompts.jsonl"
OTHER_MODEL = tuple(item for item in OLD_RUN_RESUMED.arguments if "hidden_size" not in item)

HELP = (
    Case("help of main", "main --help"),
    Case("help of plan", "plan --help"),
    Case("help of doctor", "doctor --help"),
    Case("help of evaluate", "evaluate --help"),
    Case("help of evaluate compare", "evaluate compare --help"),
    Case("help of inspect", "inspect --help"),
    Case("help of prepare", "prepare --help"),
    Case("help of prepare ruler_qa", "prepare ruler_qa --help"),
    Case("help of prepare longbench", "prepare longbench --help"),
    Case("help of prepare documents", "prepare documents --help"),
    Case("help of report", "report --help"),
)

RESULTS = (
    Case("configuration of midtrain", f"{MIDTRAIN} --cfg job --resolve"),
    Case(
        "refine section of midtrain_many_rollouts",
        "main recipe=midtrain_many_rollouts --cfg job --package refine --resolve",
    ),
    Case("refine section of posttrain", "main recipe=posttrain --cfg job --package refine --resolve"),
    Case("refine section of ttt", "main recipe=ttt --cfg job --package refine --resolve"),
    Case("plan of midtrain", f"plan recipe=midtrain {FILES} throughput=1000", (*DELTANET, *SMALL, *HERE)),
    Case(
        "plan of posttrain",
        f"plan recipe=posttrain model.path=model {PROMPTS}",
        ("data.max_length=96", *SMALL[1:], *HERE),
    ),
    Case("doctor", "doctor"),
    Case("evaluate ntp", "evaluate model=model tasks=ntp data_dir=evaluation lengths=32,48 out=results device=cpu"),
    Case("inspect", "inspect model=model text=text.txt out=page.html refine.nsp.chunks=2"),
    Case(
        "prepare documents",
        "prepare documents --input data/train.jsonl --tokenizer bytes --min-tokens 64 --limit 10 --out documents",
    ),
    Case("report of a run", "report run"),
    Case("report of two runs", "report run other_run --x tokens --out both.html"),
)

REFUSALS = (
    Case("main: no recipe", "main"),
    Case("main: unknown option", "main recipe=quickstart --rsolve"),
    Case("main: options that do not go together", "main -m recipe=quickstart --cfg job"),
    Case("main: unknown recipe", "main recipe=midtran"),
    Case("main: two recipes without -m", "main recipe=midtrain,sft"),
    Case("main: unknown preset", "main recipe=quickstart model=tiny_deltnet"),
    Case("main: unknown key", "main recipe=quickstart refine.nsp.chunk=3"),
    Case("main: key without its section", "main recipe=quickstart lr=3"),
    Case("main: not key=value", "main recipe=quickstart refine.nsp.chunks"),
    Case("main: value out of bounds", "main recipe=quickstart refine.nsp.chunks=0"),
    Case("main: value of another type", "main recipe=quickstart refine.loss.rl_coef=much"),
    Case("main: unknown choice", "main recipe=quickstart refine.nsp.selection=entrpy"),
    Case("main: sizes that do not divide", "main recipe=quickstart refine.ppo_mini_batch_size=3"),
    Case("main: no model", "main recipe=midtrain data.train_files=data/train.jsonl"),
    Case("main: no documents", "main recipe=midtrain model.path=model"),
    Case("main: keys of another phase", f"{TTT} trainer.save_freq=2"),
    Case("main: values that contradict", f"{TTT} refine.outer=grpo"),
    Case("main: verl key without effect", "main recipe=quickstart critic.enable=true"),
    Case("main: bad value in a sweep", "main -m recipe=quickstart refine.nsp.chunks=4,0"),
    Case("main: sweep into one directory", "main -m recipe=quickstart refine.nsp.chunks=2,4 trainer.experiment_name=x"),
    Case("main: missing file", f"{QUICK} model.config.vocab_size=257 data.train_files=nowhere.jsonl"),
    Case(
        "main: checkpoint of another model",
        f"main {' '.join(OTHER_MODEL)} model.config.hidden_size=32 trainer.default_local_dir=run".replace(
            "DATA", "data"
        ),
    ),
    Case("plan: unknown option", "plan recipe=quickstart --jsno"),
    Case("plan: unknown key", "plan recipe=quickstart data.max_lenght=3"),
    Case("plan: not a number", "plan recipe=quickstart throughput=fast"),
    Case("plan: missing measurement", "plan recipe=quickstart measured=nothing.json"),
    Case("plan: a sweep", "plan recipe=quickstart -m"),
    Case("doctor: unknown option", "doctor --jsno"),
    Case("evaluate: nothing", "evaluate"),
    Case("evaluate: unknown key", "evaluate modle=model tasks=ntp out=results"),
    Case("evaluate: missing key", "evaluate model=model tasks=ntp"),
    Case("evaluate: unknown task", "evaluate model=model tasks=longbnech out=results"),
    Case("evaluate: values that contradict", "evaluate model=model tasks=ntp out=results ttt=refine"),
    Case("inspect: no text", "inspect model=model"),
    Case("inspect: unknown key", "inspect model=model text=text.txt chunks=2"),
    Case("inspect: value out of bounds", "inspect model=model text=text.txt max_length=1"),
    Case("prepare: nothing", "prepare"),
    Case("prepare: missing option", "prepare documents --input data/train.jsonl"),
    Case("prepare: unknown choice", "prepare ruler_qa --source sqad --input x --tokenizer bytes --length 64 --out x"),
    Case(
        "prepare: missing file",
        "prepare documents --input nowhere.jsonl --tokenizer bytes --min-tokens 64 --out documents",
    ),
    Case("report: nothing", "report"),
    Case("report: no such run", "report nowhere"),
    Case("report: axis for one run", "report run --x tokens"),
    Case("report: unknown axis", "report run run --x token"),
)

CASES = (*HELP, *RESULTS, *REFUSALS)


def record_commands() -> dict[str, Any]:
    """Run every case; outputs by name."""
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return dict(zip((case.name for case in CASES), pool.map(_record, CASES), strict=True))


def _record(case: Case) -> dict[str, Any]:
    with scratch_directory() as scratch:
        package = package_directory(scratch)
        here = scratch / "here"
        _furnish(here)
        before = _files(here)
        done = run_module(case.module, case.arguments, here, scratch, case.stdin)
        return {
            "command": " ".join([case.module, *case.arguments]),
            "code": done.code,
            "stdout": normal_lines(done.stdout, scratch, package),
            "stderr": normal_lines(done.stderr, scratch, package),
            "written": {name: _digest(here / name, scratch, package) for name in sorted(_files(here) - before)},
            "cached": len(_files(scratch / "xdg")) > 0,
        }


def _furnish(here: Path) -> None:
    unpack_old_run(here)
    write_data(here / "data")
    shutil.copytree(here / "run" / "model", here / "model")
    shutil.copytree(here / "run", here / "other_run")
    (here / "evaluation" / "ntp").mkdir(parents=True)
    shutil.copy(here / "data" / "train.jsonl", here / "evaluation" / "ntp")
    (here / "text.txt").write_text("abcdefghijklmnopqrstuvwxyz" * 3 + "\n")


def _files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def _digest(file: Path, scratch: Path, package: Path) -> str:
    """Of a text without paths and dates; other files hold what their libraries make of it."""
    if file.suffix not in (".html", ".md", ".json", ".jsonl"):
        return "not compared"
    lines = "\n".join(normal_lines(file.read_text(), scratch, package))
    return hashlib.sha256(lines.encode()).hexdigest()[:12]
