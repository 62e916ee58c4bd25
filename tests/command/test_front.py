"""The eight commands answer help, unknown options and Ctrl-C in the same way, before anything heavy is loaded."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

import refine_verl
from refine_verl.command import front
from refine_verl.command.keys import list_keys, read_keys
from refine_verl.command.show import typed
from refine_verl.config import ConfigError, NSPSettings, Refusal, RunFailed, Settings, option

PREFIX = {
    "prepare": ["documents"],
    "remember": ["read"],
    **{name: [] for name in ("evaluate", "export", "main", "plan", "inspect", "report", "doctor")},
}
ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "verl", "ray", "fla", "datasets"}


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "refine_verl", *arguments], capture_output=True, text=True, timeout=300
    )


def test_the_list_names_every_command() -> None:
    done = call()
    assert (done.returncode, done.stderr) == (0, "")
    for name, meaning in front.COMMANDS.items():
        assert f"  {name:<10}{meaning}\n" in done.stdout
    assert call("--help").stdout == done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plna"], "error: unknown command 'plna'. Allowed: main, plan, "),
        (["plna"], "Did you mean 'plan'?"),
        (["--hepl"], "error: unknown option --hepl. Did you mean '--help'? See --help."),
        (["plan", "--jsno"], "error: unknown option --jsno. Did you mean '--json'? See --help."),
    ],
)
def test_the_list_refuses(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert front.main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", front.COMMANDS)
def test_an_unknown_option_is_refused_alike(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With the nearest one, which each of them has."""
    assert front.main([name, *PREFIX[name], "--hepl"]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: unknown option --hepl. Did you mean '--help'? See --help.\n")


@pytest.mark.parametrize("name", front.COMMANDS)
def test_help_is_given_anywhere_and_loads_nothing_heavy(name: str) -> None:
    """And is what `python -m refine_verl.NAME` says."""
    script = (
        "import sys; from refine_verl.command.front import main\n"
        f"codes = [main([{name!r}, *words]) for words in (['--help'], ['a=1', 'compare', '-h'])]\n"
        f"found = sorted({HEAVY!r} & set(sys.modules))\n"
        "sys.exit(str(found) if found or codes != [0, 0] else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"python -m refine_verl.{name}" in done.stdout
    assert done.stdout[: len(done.stdout) // 2] == done.stdout[len(done.stdout) // 2 :]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (Refusal("no such thing"), 2, "error: no such thing\n"),
        (FileNotFoundError("gone"), 2, "error: gone\n"),
        (RunFailed("lost a worker"), 1, "error: lost a worker\n"),
        (KeyboardInterrupt(), 130, "interrupted; give the same command again to resume\n"),
    ],
)
def test_exit_codes(error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run(_: list[str]) -> None:
        raise error

    assert front.run_command([], help=lambda _: "", run=run, keeps_work=True) == code
    assert capsys.readouterr() == ("", said)


def test_other_errors_are_ours_and_keep_their_traceback() -> None:
    def run(_: list[str]) -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        front.run_command([], help=lambda _: "", run=run)


STOP_AT = """
import os, signal, sys

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["STOP_AT"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Stop())
"""


@pytest.mark.parametrize("imported", ["refine_verl.command", "refine_verl.config", "refine_verl.data"])
@pytest.mark.parametrize(
    "command",
    [
        "plan recipe=quickstart",
        "prepare documents input=x tokenizer=bytes min_tokens=1 out=x",
        "main recipe=quickstart",
    ],
)
def test_ctrl_c_while_it_imports(command: str, imported: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(STOP_AT)
    (tmp_path / "x").write_text("")
    name, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, "-m", f"refine_verl.{name}", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "STOP_AT": imported},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 130, done.stderr
    said = [line for line in done.stderr.splitlines() if "fla.utils" not in line]  # which warns of Python 3.10
    assert len(said) == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("turned_into", [ModuleNotFoundError("no AutoModel"), RecursionError(), Refusal("unreadable")])
def test_ctrl_c_that_an_import_turns_into_something_else(
    turned_into: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: list[str]) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt as error:
            raise turned_into from error

    before = signal.signal(signal.SIGINT, refine_verl.end_while_importing)
    try:
        assert front.run_command([], help=lambda _: "", run=run) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted\n"


def test_the_exit_code_is_a_code_wherever_ctrl_c_falls(tmp_path: Path) -> None:
    (tmp_path / "stopped.py").write_text(
        "import sys; from refine_verl.command.front import run_command\n"
        "stop = 'import os, signal; os.kill(os.getpid(), signal.SIGINT)'\n"
        "sys.exit(run_command([], help=lambda _: '', run=lambda _: exec(stop)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "stopped"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_refusals_call_keys_what_the_command_calls_them(capsys: pytest.CaptureFixture[str]) -> None:
    def run(_: list[str]) -> None:
        raise Refusal("model.path: no such thing. Set model.path, not model.path_of or actor.model.path.")

    assert front.run_command([], help=lambda _: "", run=run, typed_as={"model.path": "model"}) == 2
    said = "error: model: no such thing. Set model, not model.path_of or actor.model.path.\n"
    assert capsys.readouterr().err == said


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    script = f"{sys.executable} -m refine_verl main --help | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stderr == "" and done.stdout.splitlines()[-1] in ("0", "1")


# Keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(Settings):
    SECTION: ClassVar[str] = "example"

    name: str = option(dataclasses.MISSING, "a name")
    count: int | None = option(None, "how many", at_least=1)
    share: float = option(0.5, "a share")
    on: bool = option(False, "a switch")
    tasks: tuple[str, ...] = option((), "several")
    text_key: str = option("text", "a column")
    more: dict | None = option(None, "any keys")
    nsp: NSPSettings = dataclasses.field(default_factory=lambda: NSPSettings(chunks=4))


def read(*arguments: str) -> Example:
    return read_keys(arguments, Example)[0]


def test_both_spellings_mean_the_same() -> None:
    one = read("name=a=b", "count=3", "share=1e-1", "on=true", "tasks=x,y", "text_key=1", "refine.nsp.chunks=2")
    assert read("name=a", "--tasks", "x,y").tasks == one.tasks
    two = read(
        *("--name=a=b", "--count", "3", "--share", "1e-1", "--on", "--tasks", "x", "y", "--text-key", "1"),
        *("--refine.nsp.chunks", "2"),
    )
    rest = ["count=3", "share=0.1", "text_key=1", "refine.nsp.chunks=2"]
    assert one == two == read("--tasks", "x", "y", "name=a=b", "--on", *rest)
    assert (one.name, one.count, one.share, one.on, one.tasks, one.text_key) == ("a=b", 3, 0.1, True, ("x", "y"), "1")
    assert one.nsp.chunks == 2 and read("name=1").nsp.chunks == 4


def test_text_stays_as_it_was_typed() -> None:
    settings = read("name=007", "count=null", "text_key=null", "tasks=[1e3,null]", "more.a.b=1e-3", "more.c=x")
    assert (settings.name, settings.count, settings.text_key) == ("007", None, "null")
    assert settings.tasks == ("1e3", "null") and settings.more == {"a": {"b": 1e-3}, "c": "x"}
    assert read("name=x", "more={a: 1}").more == {"a": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"name: is missing: give name=\.\.\. \(a name\)"),
        (["name="], "name: is missing"),
        (["name=x", "count=0"], "^count: must be at least 1, got 0"),
        (["name=x", "count=many"], "^count: must be an integer or null, got 'many'"),
        (["name=x", "on=yes"], "^on: must be true or false, got 'yes'"),
        (["name=x", "--count", "1", "count=2"], "count: is given twice"),
        (["name=x", "--count"], "--count needs a value: --count VALUE, or count=VALUE"),
        (["name=x", "--count", "--on"], "--count needs a value"),
        (["name=x", "cuont=1"], r"cuont: unknown key. Allowed: name, .*, refine.nsp.\*. Did you mean 'count'"),
        (["name=x", "chunks=1"], "Did you mean 'refine.nsp.chunks'"),
        (["name=x", "--text-kye", "a"], "unknown option --text-kye. Did you mean '--text-key'"),
        (["name=x", "-c"], "unknown option -c"),
        (["name=x", "count"], "'count' is not of the form key=value. Did you mean 'count'"),
        (["name=x", "more=null", "more.a=1"], "more: and more.a are both given"),
        (["name=x", "refine.nsp.chunks=0"], "^refine.nsp.chunks: must be at least 1"),
    ],
)
def test_keys_that_cannot_be_used(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(*arguments)


def test_words_beside_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run directories of a sweep have an equals sign in their names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run_chunks=2").mkdir()
    given = ["a", "run_chunks=2", "runs/x_chunks=4", "--count", "2", "-"]
    settings, words = read_keys([*given, "name=x"], Example, words=True)
    assert words == ["a", "run_chunks=2", "runs/x_chunks=4", "-"] and settings.count == 2
    with pytest.raises(ConfigError, match="run_chunks: unknown key"):
        read_keys(["run_chunks=3", "name=x"], Example, words=True)


def test_listing() -> None:
    said = list_keys(Example, without=["count"])
    assert said.startswith("  name=... ") and "  refine.nsp.chunks=4 " in said and "count=" not in said


@pytest.mark.parametrize(
    "path", ["runs/a", "my runs/a=b, c", "it's", 'say "a"', "1e-5", "null", "[a]", "(x)", "a#b", "ü"]
)
def test_a_path_is_shown_as_it_is_typed(path: str) -> None:
    """The shell and Hydra read back the same path."""
    (word,) = shlex.split(typed("model.path", path))
    (override,) = OverridesParser.create().parse_overrides([word])
    assert override.get_key_element() == "model.path" and str(override.value()) == path
