"""Starting Ray; one run per directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from refine_verl.settings import ConfigError
from refine_verl.trainer.launch import _alone_in, _start_ray


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    monkeypatch.setattr(ray, "shutdown", lambda: made.append("shutdown"))
    return made


def failing(calls: list[str], monkeypatch: pytest.MonkeyPatch, *messages: str) -> None:
    errors = iter(messages)

    def init(**options: Any) -> None:
        calls.append("init")
        if message := next(errors, ""):
            raise Exception(message)

    monkeypatch.setattr(ray, "init", init)


def test_a_busy_machine_gets_a_second_chance(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    failing(calls, monkeypatch, "The current node timed out during startup. This could ...")
    _start_ray(num_cpus=1)
    assert calls == ["init", "shutdown", "init"]


def test_but_no_third(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    failing(calls, monkeypatch, *["The current node timed out during startup."] * 2)
    with pytest.raises(Exception, match="timed out during startup"):
        _start_ray(num_cpus=1)
    assert calls == ["init", "shutdown", "init"]


def test_other_errors_are_not_tried_again(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    failing(calls, monkeypatch, "no such cluster")
    with pytest.raises(Exception, match="no such cluster"):
        _start_ray(num_cpus=1)
    assert calls == ["init"]


def test_one_run_per_directory(tmp_path: Path) -> None:
    with _alone_in(tmp_path), pytest.raises(ConfigError, match="another run is at work there"), _alone_in(tmp_path):
        pytest.fail("a second run began")
    with pytest.raises(BlockingIOError, match="the run's own"), _alone_in(tmp_path):
        raise BlockingIOError("the run's own")
