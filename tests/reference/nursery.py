"""Ray's workers without their imports: a process forked off a driver forks them, instead of a new interpreter.

`offered()` is used in a driver that has imported everything. What Ray starts as a worker is then this file as a
program: it asks for a fork that runs Ray's own worker program, waits for it and ends as it does.
"""

from __future__ import annotations

import json
import os
import socket
import sys

SOCKET = "WORKER_NURSERY"


def ask() -> int:
    """Have a worker forked with the arguments, environment, directory and files of this process."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[SOCKET])
        wish = json.dumps({"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}).encode()
        socket.send_fds(connection, [len(wish).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(wish)
        answer = connection.recv(16)
    return int(answer or b"1")


def offer(address: str) -> None:
    """Fork the process that forks workers; it ends with this one."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(16)
    driver = os.getpid()
    if os.fork() == 0:
        try:
            _serve(listener, driver)
        finally:
            os._exit(1)
    listener.close()
    os.environ[SOCKET] = address


def _serve(listener: socket.socket, driver: int) -> None:
    import signal

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that look after one worker each
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # meant for the driver
    listener.settimeout(1.0)
    while os.getppid() == driver:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            listener.close()
            connection.setblocking(True)
            _look_after(connection)
        connection.close()


def _look_after(connection: socket.socket) -> None:
    """Fork a worker and answer with its exit code; the worker ends, too, if who asked for it does."""
    import signal
    import threading

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, files, _, _ = socket.recv_fds(connection, 8, 3)
    wish = b""
    while len(wish) < int.from_bytes(length, "big"):
        wish += connection.recv(1 << 16)
    worker = os.fork()
    if worker == 0:
        connection.close()
        _work(json.loads(wish), files)

    def end_with_the_asker() -> None:
        if not connection.recv(1):
            os.kill(worker, signal.SIGKILL)

    threading.Thread(target=end_with_the_asker, daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    try:
        connection.sendall(str(code if code >= 0 else 128 - code).encode())
    finally:
        os._exit(0)


def _work(wish: dict, files: list[int]) -> None:
    """Be Ray's worker program."""
    import runpy
    import signal

    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(wish["env"])
    os.chdir(wish["cwd"])
    program, *arguments = wish["argv"]
    sys.argv = [program, *arguments]
    sys.path.insert(0, os.path.dirname(program))
    code = 1
    try:
        runpy.run_path(program, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(ask())
