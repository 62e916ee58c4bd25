"""SIGTERM and SIGINT before, during and after training, sent to this process or to a small one of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from reference.runs import ROOT, environment

from refine_verl.command.front import interruptible
from refine_verl.main import main
from refine_verl.trainer import signals as module
from refine_verl.trainer.signals import StopSignals


@pytest.fixture
def stop() -> Iterator[StopSignals]:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        yield signals
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_before_training_a_signal_stops_at_once(stop: StopSignals, number: signal.Signals, code: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    assert stop.received is number and stop.exit_code == code


def test_what_an_import_makes_of_a_signal_is_the_signal(stop: StopSignals) -> None:
    with pytest.raises(ValueError, match="a bug"), interruptible(lambda: stop.raised):
        raise ValueError("a bug")
    with pytest.raises(KeyboardInterrupt), interruptible(lambda: stop.raised):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("no AutoModel") from error
    with stop.deferred():  # remembered only: what goes wrong then is something else
        stop.raised, stop.received = False, None
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(ValueError, match="a bug"), interruptible(lambda: stop.raised):
            raise ValueError("a bug")


def test_while_it_trains_the_first_one_is_remembered_and_said(
    stop: StopSignals, capfd: pytest.CaptureFixture[str]
) -> None:
    with stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received is signal.SIGTERM
    assert "SIGTERM: stops after this step, with a checkpoint" in capfd.readouterr().err


def test_the_second_one_stops_at_once_but_a_double_one_is_one(
    stop: StopSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`timeout` signals the process and then its group."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        now[0] += 0.5
        os.kill(os.getpid(), signal.SIGTERM)
        now[0] += 0.6
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.received is signal.SIGTERM


def test_handlers_that_ray_replaced_are_taken_back(stop: StopSignals) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stop.install()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def test_another_thread_leaves_signals_alone() -> None:
    before = signal.getsignal(signal.SIGINT)

    def use() -> None:
        with StopSignals() as signals:
            signals.install()

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before


def test_the_command_ends_with_the_code_of_the_signal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """While a configuration is composed, long before Ray."""
    monkeypatch.setattr("refine_verl.command.jobs.register_configs", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["recipe=quickstart"]) == 143
    said = capfd.readouterr().err
    assert "stopped at once by SIGTERM" in said and "Traceback" not in said


TWO_CHILDREN = """
import os, signal, subprocess, sys
from refine_verl.trainer.signals import group_of_its_own
home = os.getpgrp()
with group_of_its_own():
    apart = subprocess.Popen(["sleep", "60"])
beside = subprocess.Popen(["sleep", "60"])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(home == os.getpgrp(), os.getpgid(apart.pid) != home, os.getpgid(beside.pid) == home, flush=True)
sys.stdin.readline()
print(beside.wait(20) == -signal.SIGTERM, apart.poll() is None, flush=True)
apart.kill()
"""


def test_what_is_started_apart_does_not_get_the_signals_of_the_group() -> None:
    """Ray's servers do not, so that workers can finish the step."""
    # below a shell that waits: the leader of a session cannot leave its group
    process = subprocess.Popen(
        ["sh", "-c", 'trap : TERM; "$@"; :', "sh", sys.executable, "-c", TWO_CHILDREN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None and process.stdin is not None
        try:
            assert process.stdout.readline().split() == ["True"] * 3
            os.killpg(process.pid, signal.SIGTERM)
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline().split() == ["True"] * 2
        finally:
            os.killpg(process.pid, signal.SIGKILL)
