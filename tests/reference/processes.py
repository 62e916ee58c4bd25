"""`python -m MODULE` without its ten seconds of imports: forked from a process that has made them already.

Such a process has an environment, a working directory, a session and an output of its own, and runs the module as
`python -m` does. What it does not show is that the module imports what it needs: some runs of the suite are started
as users start them.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reference.ray_workers import READ_ONCE, fork_workers
from reference.stand_in import serve, stand_in

ROOT = Path(__file__).parents[2]

_context: Any = multiprocessing.get_context("forkserver")
# multiprocessing polls all its processes whenever one is started; two threads must not read one exit code
_lock = threading.Lock()
_started_by: list[int] = []


class Forked:
    """What is used of `subprocess.Popen`; standard output and error go to one file."""

    def __init__(self, module: str, arguments: Sequence[str], env: dict[str, str], cwd: Path, output: Path) -> None:
        """In a process group of its own.

        Args:
            module: what to run.
            arguments: of the command line.
            env: the whole environment.
            cwd: the working directory.
            output: the file.
        """
        output.touch()
        self.args = [sys.executable, "-m", module, *arguments]
        self.stdout = output.open()
        self.returncode: int | None = None
        self._process = _context.Process(target=_become, args=(module, list(arguments), env, cwd, output))
        with _lock:
            _start_server()
            self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit code, as `subprocess` has it, or None."""
        if self.returncode is None:
            with _lock:
                self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """
        Raises:
            subprocess.TimeoutExpired: it is still running.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.02)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for its end; what it has printed."""
        self.wait(timeout)
        return self.stdout.read(), None

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()


def _start_server() -> None:
    """Once; torch reads the number of its threads when it is imported, and Ray what `READ_ONCE` says."""
    if _started_by == [os.getpid()]:
        return
    _started_by[:] = [os.getpid()]
    before = dict(os.environ)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), before.get("PYTHONPATH", "")])
    os.environ.update(PYTHONPATH=path, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", HF_HUB_OFFLINE="1")
    os.environ.update(READ_ONCE)
    try:
        _context.set_forkserver_preload(["reference.preloaded"])
        multiprocessing.forkserver.ensure_running()  # type: ignore[attr-defined]
    finally:
        os.environ.clear()
        os.environ.update(before)


def _become(module: str, arguments: list[str], env: dict[str, str], cwd: Path, output: Path) -> None:
    """Be `python -m module arguments`."""
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    _run_module(module, arguments, output.parent)


def _run_module(module: str, arguments: list[str], scratch: Path) -> None:
    logging.root.handlers.clear()  # of an import: the command sets up logging before it imports that
    sys.argv = [module, *arguments]
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [os.getcwd(), *(entry for entry in path if entry)]
    if module == "refine_verl.main":
        fork_workers(scratch)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@contextmanager
def forking_python(directory: Path) -> Iterator[Path]:
    """A program for scripts that start commands: `-m MODULE ...` is a fork as above, and all else the interpreter.

    Args:
        directory: with a short path, for its files.
    """
    server = _context.Process(target=_serve_commands, args=(directory,))
    with _lock:
        _start_server()
        server.start()
    try:
        while not os.access(directory / "python", os.X_OK):
            assert server.exitcode is None, "it has ended"
            time.sleep(0.02)
        yield directory / "python"
    finally:
        server.kill()
        server.join()


def _serve_commands(directory: Path) -> None:
    _, listener = stand_in(directory, 'sys.argv[1:2] == ["-m"]')

    def run_command(arguments: list[str]) -> None:
        _run_module(arguments[1], arguments[2:], Path(tempfile.mkdtemp(dir=directory)))

    serve(listener, run_command)
