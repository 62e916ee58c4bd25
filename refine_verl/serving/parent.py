"""No process of a server outlives the one that started it, however that ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

ENDS_WITH_PARENT = "REFINE_VERL_ENDS_WITH_PARENT"
"""Set to the id of a server of a run: processes that vLLM starts below it are killed when their parent is gone."""

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent ends, in the processes below a server of a run; Linux only.

    vLLM's engine waits for ever for messages of a parent that was killed.
    """
    server = os.environ.get(ENDS_WITH_PARENT)
    if server is None or int(server) == os.getpid() or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:  # it was gone before
        os.kill(os.getpid(), signal.SIGKILL)
