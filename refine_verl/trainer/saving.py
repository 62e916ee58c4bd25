"""Checkpoints of a trainer: verl's contents, written so that an interruption never leaves a run without a good one."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from omegaconf import DictConfig
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from refine_verl.preflight.checkpoints import reading_checkpoint
from refine_verl.record.checkpoint_files import (
    STEP,
    CheckpointError,
    FileRecord,
    begin_checkpoint,
    candidates,
    commit_checkpoint,
    damage,
    flushed,
    retain,
)
from refine_verl.record.disk_space import DiskFullError, could_not_write, disk_is_full, size
from refine_verl.record.metrics import METRICS_FILE, read_metrics
from refine_verl.trainer.signals import Stopped, StopSignals
from refine_verl.workers.failures import lost_connection

logger = logging.getLogger(__name__)

STEP_METRICS = "metrics.json"
"""In a checkpoint: what its step had measured until it was written."""
_OF_THE_DRIVER = 1 << 20
"""Bytes that hold what the driver itself writes into a checkpoint: the place in the data and a few numbers."""


class CheckpointingTrainer(PPOTrainer):
    """verl's trainer with checkpoints that appear whole or not at all, and with an end at the next safe moment.

    Attributes:
        run_dir: the run directory.
        signals: what asks the run to stop; nothing does unless it is replaced by one that is installed.
        left_something: whether a next attempt can resume from what this one wrote.
        lost_metrics: on resume, what the step of the checkpoint had measured, if an interruption came between the
            checkpoint and its line in metrics.jsonl.
    """

    def __init__(self, config: DictConfig) -> None:
        super().__init__(config)
        self.run_dir = Path(config.trainer.default_local_dir)
        self.signals = StopSignals()
        self.left_something = False
        self.step_metrics: dict[str, float] = {}
        self.lost_metrics: dict[str, float] | None = None

    def _save_checkpoint(self) -> None:
        """Write ``global_step_N``, then the note of the last step, then remove checkpoints that are too many.

        Raises:
            CheckpointError: with the free space, and what the run can resume from.
        """
        step = self.global_steps
        try:
            final = commit_checkpoint(self.run_dir, step, self._write_checkpoint(begin_checkpoint(self.run_dir, step)))
            self.left_something = True
            removed = retain(self.run_dir, step, self.config.trainer.max_actor_ckpt_to_keep)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            cause = getattr(error, "cause", None) or error
            if lost_connection(cause):
                raise
            raise CheckpointError(self._could_not_save(cause)) from error
        if removed:
            logger.info("removed the checkpoints of steps %s", ", ".join(map(str, sorted(removed))))
        self.checkpoint_callback.on_save(trainer=self, global_step=step, checkpoint_dir=str(final), async_save=False)

    def _write_checkpoint(self, folder: Path) -> dict[str, FileRecord]:
        of_ranks = self.actor_rollout_wg.save_checkpoint(
            str(folder / "actor"), None, self.global_steps, max_ckpt_to_keep=None
        )
        torch.save(self.train_dataloader.state_dict(), folder / "data.pt")
        (folder / STEP_METRICS).write_text(json.dumps(self.step_metrics, default=float) + "\n")
        files = {name: flushed(folder / name) for name in ("data.pt", STEP_METRICS)}
        for written in of_ranks:
            files.update({f"actor/{name}": FileRecord(*record) for name, record in written.items()})
        return files

    def _could_not_save(self, cause: BaseException) -> str:
        known = isinstance(cause, CheckpointError)
        reason = cause if known else could_not_write(cause, self.run_dir, _OF_THE_DRIVER, "the driver: ")
        good = next((folder for folder in candidates(self.run_dir) if damage(folder, checksums=False) is None), None)
        left = (
            "there is no earlier checkpoint"
            if good is None
            else f"{good} is whole, and the same command resumes from it"
        )
        what = f"the checkpoint of step {self.global_steps} could not be written"
        cure = "Free some space, or keep fewer checkpoints with trainer.max_actor_ckpt_to_keep"
        # another rank may have removed what it had written before this one looked how much room was left
        if isinstance(reason, DiskFullError) or (good and disk_is_full(RuntimeError(reason), self.run_dir, size(good))):
            return f"the file system of {self.run_dir} is full: {what}. {cure}; {left} ({reason})"
        return f"{what} to {self.run_dir} ({reason}); {left}. {cure}."

    @property
    def _result(self) -> Path:
        """Where what was trained is written to in the end: ``model/``, or ``adapter/`` where that is trained."""
        return self.run_dir / ("adapter" if self.config.actor_rollout_ref.model.lora_rank else "model")

    def _export(self) -> None:
        """Write the trained model to ``model/``; of a run that trains adapters these alone, to ``adapter/``.

        Raises:
            CheckpointError: with the free space.
        """
        what, final = self._result.name, self._result
        try:
            if what == "adapter":
                self.actor_rollout_wg.save_adapter(str(final))
            else:
                self.actor_rollout_wg.export(str(final))
        except CheckpointError as error:
            reason = getattr(error, "cause", error)
            full = f"the file system of {self.run_dir} is full: " if isinstance(reason, DiskFullError) else ""
            raise CheckpointError(
                f"{full}the trained {what} could not be written to {final}. Free some space; the same command resumes "
                f"from the last checkpoint and writes it ({reason})"
            ) from error

    def _load_checkpoint(self) -> None:
        """verl's, from the last checkpoint that is not damaged; its files are read as data only."""
        with reading_checkpoint(self.config) as folder:
            super()._load_checkpoint()
        self.lost_metrics = None if folder is None else self._metrics_without_a_line(folder)

    def _warn_if_past_the_last_step(self) -> None:
        """Say why a run that was asked for fewer steps than its checkpoint has ends at once."""
        if self.global_steps > self.total_training_steps:
            logger.warning(
                "the checkpoint of step %d is past the %d steps asked for (trainer.total_training_steps): nothing is "
                "trained, and %s is that of step %d",
                self.global_steps,
                self.total_training_steps,
                self._result,
                self.global_steps,
            )

    def _metrics_without_a_line(self, folder: Path) -> dict[str, float] | None:
        """The line of a step is written last, after its checkpoint and its validation."""
        file, written = folder / STEP_METRICS, self.run_dir / METRICS_FILE
        if not file.is_file() or not written.is_file():
            return None
        if any(record["step"] == self.global_steps for record in read_metrics(written)):
            return None
        metrics: dict[str, float] = json.loads(file.read_text())
        return metrics

    def _stop_if_asked(self, saved: bool, where: str | None = None) -> None:
        """End a run that got SIGTERM or SIGINT, unless it ends by itself.

        Args:
            saved: whether all of this step is on disk already.
            where: from where the next start continues; None: the checkpoint of this step.

        Raises:
            Stopped: with a checkpoint of this step.
        """
        if self.signals.received is None or self.global_steps >= self.total_training_steps:
            return
        if not saved:
            self._save_checkpoint()
        raise Stopped(
            f"stopped by {self.signals.received.name} after step {self.global_steps}; the same command resumes "
            f"{where or f'from {self.run_dir / STEP}{self.global_steps}'}"
        )
