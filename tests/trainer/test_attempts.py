"""Which errors count as a lost worker, how often a run starts again, and from what."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from ray._private.worker import _unhandled_error_handler
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError, WorkerCrashedError

from refine_verl.trainer import attempts
from refine_verl.trainer.attempts import (
    WorkerLost,
    run_attempts,
    silence_further_losses,
    wait_for_capacity,
    worker_lost,
)
from refine_verl.trainer.refine_trainer import ResourceError
from refine_verl.trainer.signals import Stopped, StopSignals
from refine_verl.workers.failures import lost_connection

DEATH = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: NSPRolloutWorker\n\tactor_id: 0a1b\n"
    "\tpid: 4711\n\tname: xNSPRolloutWorker_0:1\n\tnamespace: 1\n\tip: 10.0.0.7\n"
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: ..."
)
PEER = "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.7]:41234"


def task_error(cause: Exception) -> RayTaskError:
    """As the driver sees what a worker raised."""
    error = RayTaskError("update", "Traceback ...", cause, pid=1, ip="10.0.0.7")
    dual = error.as_instanceof_cause()
    assert isinstance(dual, type(cause)) and isinstance(dual, RayTaskError)
    return dual


def test_a_process_that_died_is_named() -> None:
    lost = worker_lost(RayActorError("0a1b", DEATH), None)
    assert str(lost) == (
        "a worker (process 4711 on 10.0.0.7) died: The actor is dead because its worker process has died"
    )


def test_a_broken_connection_is_a_lost_worker() -> None:
    """Often the surviving workers notice first."""
    assert "Connection closed by peer" in str(worker_lost(task_error(RuntimeError(PEER)), None))
    assert "lost" in str(worker_lost(WorkerCrashedError(), None))


@pytest.mark.parametrize(
    "error",
    [
        task_error(ValueError("the reward function has a bug")),
        task_error(RuntimeError("CUDA out of memory")),
        task_error(RuntimeError("[gloo] enforce fail: sizes differ")),
        ActorDiedError(RayTaskError("__init__", "Traceback", ValueError("no such model"), pid=1, ip="10.0.0.7")),
        ValueError("Connection closed by peer"),
        RuntimeError("Connection reset by peer"),  # of the driver itself: a logger's, say
    ],
    ids=["reward", "memory", "sizes", "constructor", "not a socket", "driver"],
)
def test_what_would_happen_again_does_not_count(error: Exception) -> None:
    assert worker_lost(error, None) is None


def test_messages_of_lost_connections() -> None:
    assert lost_connection(ConnectionResetError("x"))
    assert lost_connection(RuntimeError("NCCL error: remote process exited or there was a network error"))
    assert not lost_connection(RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"))
    assert not lost_connection(OSError(28, "No space left on device"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RayTaskError("update", f"ray::update()\nRuntimeError: {PEER}", RuntimeError(PEER), pid=1, ip="::1"), False),
        (RayActorError("0a1b", DEATH), False),
        (WorkerCrashedError(), False),
        (RayTaskError("update", "ray::update()\nValueError: a bug", ValueError("a bug"), pid=1, ip="::1"), True),
        (ActorDiedError(RayTaskError("__init__", "Traceback", ValueError("no"), pid=1, ip="10.0.0.7")), True),
    ],
    ids=["connection", "death", "crash", "reward", "constructor"],
)
def test_what_a_loss_does_to_other_workers_is_not_printed(
    error: Exception, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As Ray does with results that nobody asked for; what has another reason is."""
    with silence_further_losses():
        _unhandled_error_handler(error)
    assert ("Unhandled error" in caplog.text) == said
    caplog.clear()
    _unhandled_error_handler(error)
    assert "Unhandled error" in caplog.text


class Trainer:
    """Raises what it is given, if anything, in `fit`."""

    def __init__(self, error: Exception | None, left_something: bool) -> None:
        self.error, self.left_something = error, left_something
        self.signals = StopSignals()

    def init(self) -> None:
        return None

    def fit(self) -> None:
        if self.error is not None:
            raise self.error


Play = Callable[..., tuple[list[DictConfig], list[int]]]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Attempts that end as told; returns their configurations and when the files were put in order."""
    monkeypatch.setattr(attempts, "wait_for_capacity", lambda workers: None)

    def run(errors: list[Exception | None], left: bool = True, **trainer: Any) -> tuple[list[DictConfig], list[int]]:
        keys = {"max_restarts": 2, "resume_mode": "auto", "n_gpus_per_node": 1, "nnodes": 1, **trainer}
        seen: list[DictConfig] = []
        tidied: list[int] = []

        def attempt(config: DictConfig) -> Any:
            seen.append(config)
            return Trainer(errors[len(seen) - 1], left)

        try:
            run_attempts(OmegaConf.create({"trainer": keys}), attempt, after=lambda: tidied.append(len(seen)))
        finally:
            run.seen, run.tidied = seen, tidied  # type: ignore[attr-defined]
        return seen, tidied

    return run


LOST = RayActorError("0a1b", DEATH)


def test_a_lost_worker_starts_the_next_attempt(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="refine_verl"):
        seen, tidied = play([LOST, LOST, None])
    assert len(seen) == 3 and tidied == [1, 2, 3]
    assert "process 4711 on 10.0.0.7" in caplog.text and "Restart 2 of 2" in caplog.text


def test_without_a_checkpoint_it_starts_at_the_start(
    play: Play, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.WARNING, logger="refine_verl"):
        play([LOST, None], False, default_local_dir=str(tmp_path))
    assert "Restart 1 of 2, from the start: there is no checkpoint yet" in caplog.text


def test_once_too_often_is_the_end(play: Play) -> None:
    with pytest.raises(WorkerLost, match=r"4711.*The run ends after 2 restart\(s\) \(trainer.max_restarts=2\)"):
        play([LOST, LOST, LOST, None])
    with pytest.raises(WorkerLost, match=r"The run ends \(trainer.max_restarts=0\)"):
        play([LOST, None], max_restarts=0)


def test_other_errors_end_the_run_at_once(play: Play) -> None:
    with pytest.raises(ValueError):
        play([task_error(ValueError("a bug")), None])
    assert len(play.seen) == 1 and play.tidied == [1]  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        play([KeyboardInterrupt(), None])  # type: ignore[list-item]
    assert play.tidied == [1]  # type: ignore[attr-defined]


def test_a_run_that_was_asked_to_stop_is_not_started_again(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a signal goes to every process workers end, too."""
    monkeypatch.setattr(StopSignals, "__init__", lambda self: setattr(self, "received", signal.SIGTERM))
    with pytest.raises(Stopped, match=r"stopped by SIGTERM within a step \(a worker .*4711"):
        play([LOST, None])


@pytest.mark.parametrize(("left", "mode"), [(True, "auto"), (False, "disable")])
def test_a_run_told_to_start_over_does_so_once(play: Play, left: bool, mode: str) -> None:
    """Its second attempt resumes from the first one's checkpoint, never from what was there before."""
    seen, _ = play([LOST, None], left=left, resume_mode="disable")
    assert [config.trainer.resume_mode for config in seen] == ["disable", mode]


def test_a_node_that_does_not_come_back(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    there = iter([{"CPU": 2.0}, {"CPU": 3.0}])
    monkeypatch.setattr(attempts, "get_resource_name", lambda: "CPU")
    monkeypatch.setattr(attempts.ray, "cluster_resources", lambda: next(there, {"CPU": 2.0}))
    monkeypatch.setattr(attempts.time, "sleep", lambda _: None)
    wait_for_capacity(3)
    assert "waiting up to 300 s for 3 CPUs" in caplog.text
    monkeypatch.setattr(attempts, "CAPACITY_SECONDS", 0.0)
    with pytest.raises(ResourceError) as error:
        wait_for_capacity(3)
    assert str(error.value).startswith("a node left the Ray cluster and did not come back within 0 s: 2 CPUs are left")
    assert "the run needs 3 " in str(error.value) and "resumes from the last checkpoint" in str(error.value)
