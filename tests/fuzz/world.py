"""What all cases share: a tiny model, documents, prompts and a checkpoint, made once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from reference.evaluate_files import PROMPT_RUN, TEXT, make_model, write_jsonl, write_prompts
from reference.runs import TOY, TOY_DELTANET, write_corpus

SHARDS = ("model", "optim", "extra_state")


@dataclasses.dataclass(frozen=True)
class World:
    """Directories and files of the session; cases do not change them.

    Attributes:
        root: holds all of it.
        here: the empty working directory of every command.
        inputs: what the case at hand has made.
    """

    root: Path

    @property
    def here(self) -> Path:
        return self.root / "here"

    @property
    def inputs(self) -> Path:
        return self.root / "inputs"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def run(self) -> Path:
        """The run directory, which no refused command may make."""
        return self.here / "run"

    def base(self, kind: str) -> list[str]:
        """Arguments that every command accepts: what a case adds is the one thing wrong."""
        if kind in ("main", "plan"):
            return self._documents()
        if kind in ("posttrain", "ttt"):
            return self._prompts(kind)
        if kind == "evaluate":
            return [f"model={self.model}", "tasks=ntp", f"data_dir={self.root / 'data'}", "out=results", "lengths=32"]
        if kind == "remember":
            return ["read", f"model={self.model}", f"files={self.root / 'story.txt'}", "out=states"]
        if kind == "inspect":
            return [f"model={self.model}", f"text={self.root / 'story.txt'}", "refine.nsp.chunks=2", "out=page.html"]
        return []

    def _documents(self) -> list[str]:
        return [
            "recipe=quickstart",
            f"data.train_files={self.root / 'train.jsonl'}",
            f"data.val_files={self.root / 'validation.jsonl'}",
            f"data.cache_dir={self.root / 'cache'}",
            f"trainer.default_local_dir={self.run}",
            *TOY_DELTANET,
            *TOY,
        ]

    def _prompts(self, recipe: str) -> list[str]:
        split = {"posttrain": ["data.train_files", "data.val_files"], "ttt": ["data.val_files"]}[recipe]
        nested = ["refine.inner=none", "refine.outer=grpo"] if recipe == "posttrain" else []
        return [
            f"recipe={recipe}",
            *(f"{key}={self.root / 'prompts.jsonl'}" for key in split),
            f"model.path={self.model}",
            f"data.cache_dir={self.root / 'cache'}",
            f"trainer.default_local_dir={self.run}",
            *PROMPT_RUN,
            "trainer.save_freq=-1",
            *nested,
        ]


def make_world(root: Path) -> World:
    """Write everything."""
    world = World(root)
    for directory in (world.here, world.inputs):
        directory.mkdir(parents=True)
    make_model(world.model)
    write_corpus(root)
    write_prompts(root)
    write_jsonl(root / "data" / "ntp" / "documents.jsonl", [{"text": TEXT[n:] + TEXT} for n in range(3)])
    (root / "story.txt").write_text(TEXT)
    metrics = [{"step": step, "actor/ntp_loss": 2.0 / step} for step in (1, 2, 3)]
    write_jsonl(root / "finished" / "metrics.jsonl", metrics)
    return world


def write_checkpoint(run_dir: Path, config: dict[str, object]) -> Path:
    """A checkpoint of one worker as a run of `World.base("main")` would leave it; the shards hold nothing.

    Args:
        run_dir: the run directory.
        config: of the model.
    """
    from refine_verl.record.checkpoint_files import begin_checkpoint

    folder = begin_checkpoint(run_dir, 3)
    actor = folder / "actor"
    (actor / "huggingface").mkdir(parents=True)
    (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 1}))
    (actor / "huggingface" / "config.json").write_text(json.dumps(config))
    for name in SHARDS:
        torch.save({"a": torch.zeros(3)}, actor / f"{name}_world_size_1_rank_0.pt")
    torch.save({"position": 3}, folder / "data.pt")
    return commit(run_dir)


def commit(run_dir: Path) -> Path:
    """Give what lies there a manifest and put it in place, as a run does."""
    from refine_verl.record.checkpoint_files import commit_checkpoint, flushed

    folder = next(run_dir.glob(".saving_*"))
    files = [path for path in folder.rglob("*") if path.is_file()]
    return commit_checkpoint(run_dir, 3, {str(path.relative_to(folder)): flushed(path) for path in files})
