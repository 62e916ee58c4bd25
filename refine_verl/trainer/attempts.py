"""Attempts of a run: what ends one cleanly, and when the next one resumes from the last checkpoint by itself."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import time
from collections.abc import Callable, Iterator

import ray
from omegaconf import DictConfig
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from verl.single_controller.ray import RayWorkerGroup
from verl.utils.device import get_resource_name

from refine_verl.config import RunFailed
from refine_verl.preflight.checkpoints import checkpoint_to_resume
from refine_verl.trainer.refine_trainer import RefineTrainer, ResourceError
from refine_verl.trainer.signals import Stopped
from refine_verl.workers.failures import lost_connection

logger = logging.getLogger(__name__)

NOTICE_SECONDS = 60.0
"""How long Ray may take to say that a node is gone, after a connection to it broke."""
CAPACITY_SECONDS = 300.0
"""How long a restart waits for nodes and GPUs that are missing."""

RAYS_LOGGER = "ray._private.worker"
"""By its name, as a Ray that calls it otherwise only says more."""

_DEATH = re.compile(r"The (actor|worker) died unexpectedly|The actor( \w+)? is (dead|unavailable)|raylet died")
_LOSSES = (RayActorError, NodeDiedError, WorkerCrashedError, OutOfMemoryError, ObjectLostError)


class WorkerLost(RunFailed):
    """A worker process died or its node left; ``trainer.max_restarts`` is about these."""


def run_attempts(config: DictConfig, attempt: Callable[[DictConfig], RefineTrainer], after: Callable[[], None]) -> None:
    """Train; start again from the last checkpoint after a lost worker, ``trainer.max_restarts`` times at most.

    Any other error ends the run: what is wrong with the configuration, the data, a reward or the disk would be wrong
    the next time, too.

    ``attempt`` makes a trainer; ``after`` is called when its processes are gone, however it ended.

    Raises:
        WorkerLost: once more than allowed.
        ResourceError: a lost node did not come back in time for a restart.
        Stopped: the run was asked to stop, and a worker ended before the step did.
    """
    restarts = 0
    while True:
        trainer = attempt(config)
        try:
            with contextlib.redirect_stdout(_Debug()):  # verl announces what it reads with print
                trainer.init()
            trainer.fit()
            return
        except Exception as error:
            lost = worker_lost(error, getattr(trainer, "actor_rollout_wg", None))
            if lost is None:
                raise
            if trainer.signals.received is not None:  # sent to every process, workers too
                raise Stopped(
                    f"stopped by {trainer.signals.received.name} within a step ({lost}); the same command resumes from "
                    "the last checkpoint, if there is one"
                ) from error
            allowed = config.trainer.max_restarts
            if restarts >= allowed:
                tried = f" after {restarts} restart(s)" if restarts else ""
                raise WorkerLost(
                    f"{lost}. The run ends{tried} (trainer.max_restarts={allowed}); the same command resumes from the "
                    "last checkpoint, if there is one."
                ) from error
            restarts += 1
            resumes = trainer.left_something or checkpoint_to_resume(config, warn=False) is not None
            place = "from the last checkpoint" if resumes else "from the start: there is no checkpoint yet"
            logger.warning("%s. Restart %d of %d, %s", lost, restarts, allowed, place)
        finally:
            end_processes(trainer)
            after()
        if trainer.left_something:  # told to start over, or from elsewhere, it resumes from what this attempt left
            config = copy.deepcopy(config)
            config.trainer.resume_mode = "auto"
        wait_for_capacity(config.trainer.n_gpus_per_node * config.trainer.nnodes)


@contextlib.contextmanager
def silence_further_losses() -> Iterator[None]:
    """What the other workers raise because one was lost is not printed; use it for as long as Ray is up.

    A call goes to all workers and the driver raises the first error, which ends the attempt. Ray prints those of the
    others, tracebacks and all, once nobody can ask for them any more, and nobody can where verl made the call. Errors
    of any other kind still appear.
    """
    source = logging.getLogger(RAYS_LOGGER)
    source.addFilter(_is_no_loss)
    try:
        yield
    finally:
        source.removeFilter(_is_no_loss)


def _is_no_loss(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    loss = text.startswith("Unhandled error") and (_DEATH.search(text) or lost_connection(RuntimeError(text)))
    if loss:
        logger.debug("%s", text)
    return not loss


class _Debug(io.TextIOBase):
    """A stream that logs what is printed to it."""

    def write(self, text: str) -> int:
        if text.strip():
            logger.debug("%s", text.rstrip())
        return len(text)


def worker_lost(error: Exception, group: RayWorkerGroup | None) -> WorkerLost | None:
    """The loss behind an error of an attempt, with what is known of it; None for an error of any other kind."""
    if isinstance(error, _LOSSES):
        if getattr(error, "actor_init_failed", False):
            return None  # raised by our own code, which would raise it again
    elif not (isinstance(error, RayTaskError) and lost_connection(_cause(error))):
        return None
    dead = dead_workers(group) if group is not None else {}
    if dead:
        return WorkerLost("; ".join(f"worker {rank} {_how_it_died(reason)}" for rank, reason in sorted(dead.items())))
    if isinstance(error, RayActorError):
        return WorkerLost(f"a worker {_how_it_died(error)}")
    return WorkerLost(f"a worker was lost: {_first_sentence(str(_cause(error)))}")


def dead_workers(group: RayWorkerGroup) -> dict[int, RayActorError]:
    """Ranks whose process is gone, as soon as Ray knows of one; workers that are busy or wait do not answer."""
    deadline = time.monotonic() + NOTICE_SECONDS
    asked = {worker.__ray_ready__.remote(): rank for rank, worker in enumerate(group.workers)}
    dead: dict[int, RayActorError] = {}
    answered = 0
    while not dead and answered < len(group.workers) and time.monotonic() < deadline:
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=1.0)
        for reference in ready:
            rank = asked.pop(reference)
            try:
                ray.get(reference)
                answered += 1
            except ActorUnavailableError:  # not known yet whether it comes back
                asked[group.workers[rank].__ray_ready__.remote()] = rank
                time.sleep(0.5)
            except RayActorError as reason:
                dead[rank] = reason
    return dead


def end_processes(trainer: RefineTrainer) -> None:
    """End the processes of an attempt and give back their places; workers that hang in a collective, too."""
    group, pool = (getattr(trainer, name, None) for name in ("actor_rollout_wg", "pool"))
    if not ray.is_initialized():
        return
    try:
        if (servers := getattr(trainer, "servers", None)) is not None:
            servers.end()
        for worker in group.workers if group is not None else ():
            ray.kill(worker, no_restart=True)
        for placement in (pool.pgs if pool is not None else None) or ():
            ray.util.remove_placement_group(placement)
    except (RayError, ConnectionError) as error:
        logger.warning("workers could not be ended: %s", error)


def wait_for_capacity(workers: int) -> None:
    """Wait for what a lost node took with it.

    Raises:
        ResourceError: it did not come back.
    """
    resource = get_resource_name()
    deadline = time.monotonic() + CAPACITY_SECONDS
    said = False
    while (there := ray.cluster_resources().get(resource, 0)) < workers:
        if time.monotonic() >= deadline:
            raise ResourceError(
                f"a node left the Ray cluster and did not come back within {CAPACITY_SECONDS:.0f} s: {there:g} "
                f"{resource}s are left, the run needs {workers} (trainer.n_gpus_per_node * trainer.nnodes). Bring it "
                "or another one back (`ray status`); the same command then resumes from the last checkpoint."
            )
        if not said:
            logger.warning("waiting up to %.0f s for %d %ss", CAPACITY_SECONDS, workers, resource)
            said = True
        time.sleep(1.0)


def _cause(error: BaseException) -> BaseException:
    return getattr(error, "cause", None) or error


def _how_it_died(error: RayActorError) -> str:
    """``(process 123 on 10.0.0.7) died: reason``, from Ray's paragraph about it."""
    text = str(error)
    process, node = (re.search(rf"^\s*{name}: (\S+)", text, re.MULTILINE) for name in ("pid", "ip"))
    where = " on ".join(part for part in (f"process {process[1]}" if process else "", node[1] if node else "") if part)
    reason = re.sub(r"(?s)^.*?\n(?=\S[^\n]*$)", "", text.strip())
    return f"{f'({where}) ' if where else ''}died: {_first_sentence(reason)}"


def _first_sentence(text: str) -> str:
    line = " ".join(text.split())
    return re.split(r"(?<=[a-z)])\. (?=[A-Z])", line, maxsplit=1)[0][:300].rstrip(".")
