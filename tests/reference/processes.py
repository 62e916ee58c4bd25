"""`python -m MODULE` without its ten seconds of imports: forked from a process that has made them already.

Such a process has an environment, a working directory, a session and an output of its own, and runs the module as
`python -m` does. What it does not show is that the module imports what it needs: some runs of the suite are started
as users start them.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from reference import nursery
from reference.nursery import offer

_context: Any = multiprocessing.get_context("forkserver")
# multiprocessing polls all its processes whenever one is started; two threads must not read one exit code
_lock = threading.Lock()
_started_by: list[int] = []


class Forked:
    """What is used of `subprocess.Popen`; standard output and error go to one file."""

    def __init__(
        self,
        module: str,
        arguments: list[str],
        env: dict[str, str],
        cwd: Path,
        output: Path,
        nursery_at: Path | None = None,
    ) -> None:
        """
        Args:
            module: what to run.
            arguments: of the command line.
            env: the whole environment.
            cwd: the working directory.
            output: the file.
            nursery_at: a socket to be made, if the workers of a Ray that it starts are to be forked, too.
        """
        output.touch()
        self.args = [sys.executable, "-m", module, *arguments]
        self.stdout = output.open()
        self.returncode: int | None = None
        self._process = _context.Process(target=_become, args=(module, arguments, env, cwd, output, nursery_at))
        with _lock:
            _start_server(env)
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


def _start_server(env: dict[str, str]) -> None:
    """Once; torch reads the number of its threads when it is imported."""
    if _started_by == [os.getpid()]:
        return
    _started_by[:] = [os.getpid()]
    before = dict(os.environ)
    os.environ.update({name: env[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")})
    try:
        _context.set_forkserver_preload(["reference.preloaded"])
        multiprocessing.forkserver.ensure_running()  # type: ignore[attr-defined]
    finally:
        os.environ.clear()
        os.environ.update(before)


def _fork_workers_too(address: str) -> None:
    """Let the Ray that is started here fork its workers."""
    import ray

    offer(address)
    start = ray.init
    program = f"{sys.executable} -S {Path(nursery.__file__)}"

    def init(*args: Any, runtime_env: dict[str, Any] | None = None, **options: Any) -> Any:
        return start(*args, runtime_env={**(runtime_env or {}), "py_executable": program}, **options)

    ray.init = init


def _become(
    module: str, arguments: list[str], env: dict[str, str], cwd: Path, output: Path, nursery_at: Path | None
) -> None:
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
    sys.argv = [module, *arguments]
    if nursery_at is not None:
        _fork_workers_too(str(nursery_at))
    sys.path[:0] = [str(cwd), *(entry for entry in env.get("PYTHONPATH", "").split(os.pathsep) if entry)]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
