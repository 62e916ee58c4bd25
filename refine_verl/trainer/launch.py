"""From a checked configuration to a finished run: Ray, the trainer, and what the run directory holds afterwards."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from omegaconf import DictConfig, OmegaConf
from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

from refine_verl.plugin import check_plugin
from refine_verl.report import ReportError, write_report
from refine_verl.schema import leaves
from refine_verl.trainer.posttrain import PosttrainTrainer
from refine_verl.trainer.refine_trainer import RefineTrainer
from refine_verl.trainer.ttt import TTTTrainer

logger = logging.getLogger(__name__)

TRAINERS: dict[str, type[RefineTrainer]] = {
    "documents": RefineTrainer,
    "posttrain": PosttrainTrainer,
    "ttt": TTTTrainer,
}
"""By `refine.phase`."""

_PACKAGES = ("refine_verl", "verl", "ray", "torch", "transformers", "flash-linear-attention", "triton", "datasets")


def train(config: DictConfig) -> Path:
    """Run the training that ``config`` describes, from its last checkpoint if there is one.

    Args:
        config: resolved and validated; ``data.train_files`` and ``data.val_files`` name prepared directories and
            ``actor_rollout_ref.model.path`` a model directory.

    Returns:
        The run directory, with ``config.yaml``, ``environment.json``, ``metrics.jsonl``, ``report.html``, ``model/``
        (unless ``trainer.val_only``) and the checkpoints.

    Raises:
        TrainingDiverged, ResourceError, PluginError: see there.
    """
    check_plugin()
    run_dir = Path(config.trainer.default_local_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    _say_what_changed(run_dir / "config.yaml", config)
    OmegaConf.save(config, run_dir / "config.yaml", resolve=True)
    (run_dir / "environment.json").write_text(json.dumps(environment(config), indent=2) + "\n")
    with ray_session(config):
        trainer = TRAINERS[config.refine.phase](config)
        with contextlib.redirect_stdout(_Debug()):  # verl announces what it reads with print
            trainer.init()
        try:
            trainer.fit()
        finally:
            _report(run_dir)
    return run_dir


def _report(run_dir: Path) -> None:
    """Write ``report.html``, also for a run that failed; a run without a single metric has none."""
    try:
        write_report(run_dir)
    except ReportError as error:
        logger.warning("no report: %s", error)


class _Debug(io.TextIOBase):
    """A stream that logs what is printed to it."""

    def write(self, text: str) -> int:
        if text.strip():
            logger.debug("%s", text.rstrip())
        return len(text)


@contextmanager
def ray_session(config: DictConfig) -> Iterator[None]:
    """A Ray of our own on this machine, or the cluster that RAY_ADDRESS or ``ray_kwargs`` name."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = OmegaConf.to_container(config.ray_kwargs.ray_init, resolve=True)  # type: ignore[assignment]
    runtime_env = OmegaConf.merge(
        get_ppo_ray_runtime_env(config),
        {"env_vars": _worker_environment(config)},
        options.pop("runtime_env", None) or {},
    )
    options = {name: value for name, value in options.items() if value is not None}
    if "address" not in options and "RAY_ADDRESS" not in os.environ:
        options.setdefault("include_dashboard", False)
        if config.trainer.device == "cpu":
            # one Ray CPU per worker, also where workers outnumber cores
            workers = config.trainer.n_gpus_per_node * config.trainer.nnodes
            options.setdefault("num_cpus", max(workers, os.cpu_count() or 1))
    # the driver draws its own display; what workers print about themselves would tear it
    ray.init(
        runtime_env=OmegaConf.to_container(runtime_env),
        **{"log_to_driver": False, "configure_logging": False, **options},
    )
    try:
        yield
    finally:
        ray.shutdown()


def _worker_environment(config: DictConfig) -> dict[str, str]:
    if config.trainer.device != "cpu":
        return {}
    # OpenMP threads that spin while they wait for each other come to a standstill on a core that is shared with
    # anything else; sleeping costs them microseconds.
    return {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}


def _say_what_changed(path: Path, config: DictConfig) -> None:
    """Log the settings in which this start of a run differs from the one before, which it may resume."""
    if not path.is_file():
        return
    written = DictConfig(OmegaConf.load(path))
    before, now = dict(leaves(written)), dict(leaves(DictConfig(OmegaConf.create(OmegaConf.to_yaml(config)))))
    changed = [
        f"{key}: {before.get(key)} -> {now.get(key)}" for key in {**before, **now} if before.get(key) != now.get(key)
    ]
    if changed:
        logger.warning("%s was used before, with other settings: %s", path.parent, "; ".join(changed))


def environment(config: DictConfig) -> dict[str, Any]:
    """Versions and hardware of the run, for its report."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "python": platform.python_version(),
        **versions,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({os.cpu_count()} cores)",
        "workers": f"{config.trainer.nnodes} x {config.trainer.n_gpus_per_node}",
    }
