"""Starting Ray; one run per directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
from omegaconf import OmegaConf
from ray._private.worker import _unhandled_error_handler
from ray.exceptions import WorkerCrashedError

from refine_verl.config.options import ConfigError
from refine_verl.record.metrics import METRICS_FILE
from refine_verl.trainer import launch
from refine_verl.trainer.launch import _alone_in, _start_ray
from refine_verl.trainer.signals import StopSignals


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


@pytest.mark.parametrize("metrics", [None, "", '{"step": 0, "val'])
def test_a_run_that_ends_before_its_first_metrics_has_no_report_and_no_word_of_it(
    tmp_path: Path, metrics: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    if metrics is not None:
        (tmp_path / METRICS_FILE).write_text(metrics)
    launch._report(tmp_path)
    assert caplog.text == "" and not (tmp_path / "report.html").exists()


def test_a_report_that_cannot_be_written_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "actor/ntp_loss": 2.0}\n')
    (tmp_path / "report.html").mkdir()
    launch._report(tmp_path)
    assert "no report: " in caplog.text


def test_rays_echo_of_a_lost_worker_is_left_out_as_long_as_it_is_up(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = OmegaConf.create({"trainer": {"device": "cuda"}, "ray_kwargs": {"ray_init": {}}})
    monkeypatch.setattr(launch, "joins_cluster", lambda _: True)
    monkeypatch.setattr(launch, "get_ppo_ray_runtime_env", lambda _: {})
    monkeypatch.setattr(launch, "_start_ray", lambda **_: calls.append("start"))
    monkeypatch.setattr(ray, "shutdown", lambda: _unhandled_error_handler(WorkerCrashedError()))
    with launch.ray_session(config, StopSignals()):
        _unhandled_error_handler(WorkerCrashedError())
    assert calls == ["start"] and caplog.text == ""
    _unhandled_error_handler(WorkerCrashedError())
    assert "The worker died unexpectedly" in caplog.text
