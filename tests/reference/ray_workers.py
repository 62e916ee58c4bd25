"""Ray's workers without their imports: forked from a copy of the driver, which has made them already.

For runs of `reference.processes`. Ray starts a worker as `PYTHON setup_worker.py default_worker.py ...`, and PYTHON is
here a `reference.stand_in`.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from reference.stand_in import die_with_parent, serve, stand_in

_FIRST_JOB = "01000000"
READ_ONCE = {"RAY_JOB_ID": _FIRST_JOB, "RAY_RAYLET_PID": str(os.getpid())}
"""What Ray's workers read of their environment once, where it is imported: the job, which is the first and only one of
a Ray that a run starts, and whose end is theirs. Here that is the process of the tests: the stand-in sees to it that a
worker ends with its Ray."""
_A_WORKER = (
    'len(sys.argv) > 1 and sys.argv[1].endswith(("/setup_worker.py", "/default_worker.py"))'
    f' and os.environ.get("RAY_JOB_ID", "{_FIRST_JOB}") == "{_FIRST_JOB}"'
)


def fork_workers(scratch: Path) -> None:
    """From now on Ray's workers of this process, which has no other thread yet, are forks of what it is now.

    Args:
        scratch: a directory with a short path.
    """
    program, listener = stand_in(scratch, _A_WORKER)
    driver = os.getpid()
    if os.fork() == 0:
        die_with_parent()
        os.setsid()  # signals to the driver's group are not for workers
        if os.getppid() == driver:
            serve(listener, _be_a_worker)
        os._exit(0)
    listener.close()
    sys.executable = str(program)


def _be_a_worker(arguments: list[str]) -> None:
    """Go on as `python setup_worker.py default_worker.py ...`."""
    from ray._private import ray_constants
    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.utils import update_envs
    from ray._raylet import Config

    # what Ray read when it was imported
    Config.initialize("")
    ray_constants.ENABLE_RAY_CLUSTER = os.environ.get(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR) != "0"

    def go_on(context: RuntimeEnvContext, given: list[str], _: object) -> None:
        update_envs(context.env_vars)
        for entry in reversed(os.environ.get("PYTHONPATH", "").split(os.pathsep)):
            if entry and entry not in sys.path:
                sys.path.insert(0, entry)
        _run(given)

    RuntimeEnvContext.exec_worker = go_on
    _run(arguments)


def _run(arguments: list[str]) -> None:
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
