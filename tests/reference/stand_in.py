"""An interpreter without the seconds of imports: what it is asked to run goes on as a fork of a process that has them.

`stand_in` writes a program to be put in place of `python`. For what it is meant for, it hands its arguments,
environment, working directory and open files to `serve`, which forks; the two end together. For all else it is the real
interpreter.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

_LENGTH = 8
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG

# Started for every process: it imports next to nothing.
_PROGRAM = """#!{python} -SEs
import os, sys
if not ({condition}):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
import json, signal, socket
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
asked = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
socket.send_fds(server, [len(asked).to_bytes({length}, "big")], [0, 1, 2])
server.sendall(asked)
status = json.loads(server.recv(100) or "-9")
if status < 0:
    os.kill(os.getpid(), -status)
    signal.pause()
os._exit(status)
"""

GoOn: TypeAlias = Callable[[list[str]], None]
"""Does in a fork what the interpreter would do with these arguments."""


def stand_in(directory: Path, condition: str) -> tuple[Path, socket.socket]:
    """The program, and where it asks.

    Args:
        directory: with a short path, for the program and its socket.
        condition: an expression of `sys` and `os`: what it is meant for.
    """
    address, program = directory / "asked", directory / "python"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen(64)
    python = sys.executable
    program.write_text(_PROGRAM.format(python=python, address=str(address), length=_LENGTH, condition=condition))
    program.chmod(0o755)
    return program, listener


def die_with_parent() -> None:
    """This process is killed when the one that started it ends."""
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)


def serve(listener: socket.socket, go_on: GoOn) -> None:
    """Fork what is asked for, for ever; a program that is killed takes its fork with it.

    Each fork has a process group of its own, as Ray's workers have, which ends what is left of a worker by its group.
    """
    forks: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([listener, *forks.values()], [], [], 0.05)
        if listener in ready:
            program, _ = listener.accept()
            content, files = _receive(program)
            pid = os.fork()
            if pid == 0:
                for other in (listener, program, *forks.values()):
                    other.close()
                _become(content, files, go_on)
            for file in files:
                os.close(file)
            forks[pid] = program
        for pid, program in list(forks.items()):
            if program in ready:  # it says nothing: it has ended
                os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                with contextlib.suppress(OSError):  # nobody waits for it
                    program.sendall(json.dumps(os.waitstatus_to_exitcode(status)).encode())
                program.close()
                del forks[pid]


def _receive(program: socket.socket) -> tuple[bytes, list[int]]:
    head, files, _, _ = socket.recv_fds(program, _LENGTH, 3)
    content = b""
    while len(content) < int.from_bytes(head, "big"):
        content += program.recv(1 << 16)
    return content, files


def _become(content: bytes, files: list[int], go_on: GoOn) -> None:
    die_with_parent()
    os.setpgrp()
    arguments, environment, directory = json.loads(content)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    code = 0
    try:
        go_on(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    os._exit(code)
