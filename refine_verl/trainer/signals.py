"""SIGTERM and SIGINT: at once before training, at the end of the step while it trains. Standard library only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM)
SAME_SIGNAL = 1.0
"""Seconds in which signals count as one: `timeout` and schedulers send SIGTERM to a process and to its group."""


class Stopped(KeyboardInterrupt):
    """The run was asked to stop and did; the message says from where it can resume."""


class StopSignals:
    """Handlers of SIGINT and SIGTERM for as long as the context lasts; without effect outside the main thread.

    A signal raises KeyboardInterrupt at once (Ray hands on that exception and no other). Within :meth:`deferred` the
    first one is only remembered in :attr:`received`, and one that comes :data:`SAME_SIGNAL` seconds later or more
    raises.

    Attributes:
        received: the first signal, None before it.
        raised: one has raised.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.raised = False
        self._since = 0.0
        self._deferred = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in STOPS}
            self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def install(self) -> None:
        """Take the signals (back): ``ray.init`` installs a handler of its own for SIGTERM."""
        if self._before:
            for number in STOPS:
                signal.signal(number, self._handle)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, the first signal lets the work in hand finish."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    @property
    def exit_code(self) -> int:
        """128 and the number of the signal, as shells and schedulers expect: 130 or 143."""
        return 128 + (self.received or signal.SIGINT)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = signal.Signals(number), now
            if self._deferred:
                # a logger or a console may be in the middle of a line; this cannot wait for them
                what = "stops after this step, with a checkpoint; a second signal stops at once"
                os.write(2, f"\n{self.received.name}: {what}\n".encode())
                return
        elif now - self._since < SAME_SIGNAL:
            return
        self.raised = True
        raise KeyboardInterrupt


@contextmanager
def group_of_its_own() -> Iterator[None]:
    """Processes started within do not get the signals that are sent to the process group of this one.

    A terminal sends SIGINT to the whole group, ``timeout`` and some schedulers SIGTERM: Ray's servers would end, and
    its workers with them, before the step is finished and saved. A process cannot move its children once they run, so
    this one joins a new group while it starts them, and returns. The leader of a session cannot move and stays.
    """
    home = os.getpgrp()
    if os.getsid(0) == os.getpid() or sys.platform == "win32":
        yield
        return
    # the group exists from the start of this process until the last of those it is for
    holder = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, preexec_fn=os.setpgrp)
    try:
        os.setpgid(0, holder.pid)
        yield
    finally:
        try:
            os.setpgid(0, home)
        except PermissionError:  # nobody is left in it
            os.setpgid(0, 0)
        holder.communicate()
