"""Commands of the package as processes, and what they print without what depends on the machine and the moment."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
TIMEOUT = 600  # seconds, of a command that hangs: a busy machine needs minutes to import and start

FIXED = {
    # sums are added up in another order by another number of threads
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    # nothing is asked of a network that may or may not be there
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "160",
    "LC_ALL": "C.UTF-8",
    "TERM": "dumb",
}
DROPPED = ("RAY_ADDRESS", "REFINE_RECIPES_PATH", "HYDRA_FULL_ERROR", "FORCE_COLOR", "VERL_LOGGING_LEVEL")


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    stdout: str
    stderr: str


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A short path that is always as long: sockets lie below it, and tables are as wide as their paths."""
    directory = Path(tempfile.mkdtemp(prefix="rv", dir="/tmp")).resolve()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def environment(scratch: Path) -> dict[str, str]:
    """Of a command: PYTHONPATH as given, or this checkout; caches and Ray's files below ``scratch``."""
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED}
    kept.setdefault("PYTHONPATH", str(ROOT))
    return {**kept, **FIXED, "XDG_CACHE_HOME": str(scratch / "xdg"), "RAY_TMPDIR": str(scratch / "ray")}


def run_module(module: str, arguments: Sequence[str], cwd: Path, scratch: Path, stdin: str = "") -> Done:
    """`python -m MODULE ARGUMENTS`; whatever is left of it is killed afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env=environment(scratch),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(stdin, timeout=TIMEOUT)
    finally:
        _kill_tree(process)
    return Done(process.returncode, stdout, stderr)


def _kill_tree(process: subprocess.Popen[str]) -> None:
    if process.poll() is not None:
        return
    below = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    for child in below:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def package_directory(scratch: Path) -> Path:
    """Where the commands find refine_verl."""
    done = subprocess.run(
        [sys.executable, "-c", "import refine_verl; print(refine_verl.__path__[0])"],
        cwd=scratch,
        env=environment(scratch),
        capture_output=True,
        text=True,
        check=True,
    )
    return Path(done.stdout.strip())


_CHANGING: tuple[tuple[str, str], ...] = (
    (r"\d+:\d\d:\d\d left", "TIME left"),
    (r"tokens/s \S+", "tokens/s N"),
    # of the path and the time of a file
    (r"(sequences|prompts)-[0-9a-f]{12,}", r"\1-HASH"),
    (r'"key": "[0-9a-f]{20}"', '"key": "HASH"'),
    (r"[\d.]+ [KMGT]iB free at", "SIZE free at"),
    (r"(free  +)[\d,.]+ [KMGT]iB at", r"\1SIZE at"),
    (r"has [\d.]+ GiB", "has SIZE"),
    (r"at most \d+$", "at most N"),
    (r"over port \d+", "over port N"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d( [+-]\d{4})?", "DATE"),
)
"""Times, speeds, sizes of disk and memory, limits and ports of this machine."""

_LINES_LEFT_OUT = (
    # of Ray, where its release says it
    "Token authentication is enabled",
    # on a busy machine
    "WARNING refine_verl.trainer.launch: Ray was not up",
    # a progress bar of transformers, with its speed
    "Loading weights",
)


def normal_lines(text: str, scratch: Path, package: Path) -> list[str]:
    """Lines of an output that are the same on every run: paths, times and sizes have names, spaces come in pairs."""
    text = text.replace(str(scratch), "SCRATCH").replace(str(package.parent), "CHECKOUT")
    lines = []
    for line in text.splitlines():
        if line.startswith(_LINES_LEFT_OUT):
            continue
        line = re.sub(r"(?<=\S) {2,}", "  ", line).rstrip()
        for pattern, name in _CHANGING:
            line = re.sub(pattern, name, line)
        lines.append(line)
    return lines
