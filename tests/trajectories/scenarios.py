"""Short training runs on the CPU whose every number is recorded, and the data they are made on.

A scenario is one or two commands. Models have random weights made from the seed, or those kept here; all data are made
here: a recording depends on the code, the versions of its dependencies and the processor only.
"""

from __future__ import annotations

import json
import random
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DELTANET = (
    "model=tiny_deltanet",
    "model.tokenizer=bytes",
    "model.config.vocab_size=257",
    "model.config.hidden_size=32",
    "model.config.num_hidden_layers=2",
    "model.config.num_heads=2",
    "model.config.hidden_ratio=2",
)
GATED_DELTANET = (
    "model=gated_deltanet",
    "model.tokenizer=bytes",
    "model.config.vocab_size=257",
    "model.config.hidden_size=32",
    "model.config.num_hidden_layers=2",
    "model.config.num_heads=2",
    "model.config.head_dim=12",
    "model.config.hidden_ratio=2",
    "model.config.bos_token_id=null",
    "model.config.eos_token_id=null",
)
LACT = (
    "model=tiny_lact",
    "model.tokenizer=bytes",
    "model.config.vocab_size=257",
    "model.config.hidden_size=32",
    "model.config.num_hidden_layers=2",
    "model.config.lact_chunk_size=16",
    "model.config.window_size=12",
    "+model.config.intermediate_size=48",
)
"""Documents of 64 tokens are four chunks."""

SMALLEST = (
    "model=tiny_deltanet",
    "model.tokenizer=bytes",
    "model.config.vocab_size=257",
    "model.config.hidden_size=16",
    "model.config.num_hidden_layers=1",
    "model.config.num_heads=1",
    "model.config.hidden_ratio=2",
)
"""Of the run directory that is kept to be resumed by later versions."""

COMMON = (
    "data.train_batch_size=8",
    "refine.ppo_mini_batch_size=4",
    "refine.nsp.chunks=3",
    "refine.nsp.rollout_length=3",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
    "actor_rollout_ref.actor.optim.lr=2e-3",
    "trainer.n_gpus_per_node=1",
    "trainer.device=cpu",
    "trainer.logger=[]",
)
"""Two optimiser steps a step, each of two micro-batches."""

DOCUMENTS = ("data.train_files=DATA/train.jsonl", "data.val_files=DATA/validation.jsonl", "data.max_length=64")
PROMPTS = ("data.train_files=DATA/prompts.jsonl", "data.val_files=DATA/test_prompts.jsonl", "data.max_length=96")
TEST_PROMPTS = ("data.val_files=DATA/test_prompts.jsonl", "data.max_length=96")
UNCUT, SEGMENTS = "model.activation_checkpointing=none", "model.activation_checkpointing=segment"


@dataclass(frozen=True)
class Command:
    """One `python -m refine_verl.main` in the run directory RUNS/`run`.

    ``DATA`` in the arguments stands for the directory of ``write_data``.

    Attributes:
        run: name of the run directory.
        arguments: all but the directories of the run and of the cache.
        killed_after: the run directory is first cut back to what a kill leaves that comes after this step, the last
            one with a checkpoint, and one more.
    """

    run: str
    arguments: tuple[str, ...]
    killed_after: int | None = None

    def resolve(self, data: Path, runs: Path) -> list[str]:
        """The command line with real paths."""
        own = (f"data.cache_dir={data}/cache", f"trainer.default_local_dir={runs / self.run}")
        return [item.replace("DATA", str(data)) for item in (*self.arguments, *own)]


@dataclass(frozen=True)
class Scenario:
    """What is run, command after command; the run directory is recorded after each."""

    name: str
    about: str
    commands: tuple[Command, ...]


def steps(total: int, *, save: int, test: int = 2) -> tuple[str, ...]:
    return (f"trainer.total_training_steps={total}", f"trainer.save_freq={save}", f"trainer.test_freq={test}")


def midtrain(*more: str, recipe: str = "midtrain", model: tuple[str, ...] = DELTANET) -> tuple[str, ...]:
    return (f"recipe={recipe}", *model, *DOCUMENTS, *COMMON, *more)


def posttrain(*more: str) -> tuple[str, ...]:
    return ("recipe=posttrain", *DELTANET, *PROMPTS, *COMMON, UNCUT, *more, *steps(2, save=-1))


DELTANET_RUN = midtrain("refine.warmup_steps=1", UNCUT, *steps(4, save=2))
GROUPED = (
    "refine.nsp.rollouts_per_position=3",
    "refine.nsp.rollout_length=4",
    "refine.nsp.group=position",
    "refine.loss.rl_coef=1",
    "algorithm.norm_adv_by_std_in_grpo=false",
)
MANY = (
    "refine.nsp.chunks=8",
    "refine.nsp.rollouts_per_position=4",
    "refine.nsp.rollouts_together=20",
    "refine.nsp.reward=hybrid",
)
"""64 rollouts of a micro-batch of two documents, in four pieces; the recipe's reward would be 0 nearly everywhere."""
GRPO = ("refine.outer=grpo", "refine.answers.samples=3")
SMALL_BATCHES = (
    "data.train_batch_size=3",
    "refine.ppo_mini_batch_size=3",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
)


def one(name: str, about: str, arguments: tuple[str, ...]) -> Scenario:
    return Scenario(name, about, (Command("run", arguments),))


SCENARIOS = (
    Scenario(
        "deltanet",
        "mid-training of a DeltaNet, with one warm-up step; then the same command after a kill between steps 3 and 4",
        (Command("run", DELTANET_RUN), Command("run", DELTANET_RUN, killed_after=2)),
    ),
    one(
        "deltanet_two_workers",
        "the first three of these steps on two workers",
        midtrain("refine.warmup_steps=1", UNCUT, *steps(3, save=3), "trainer.n_gpus_per_node=2"),
    ),
    one(
        "fused",
        "mid-training of a DeltaNet whose rollouts are written in the trained pass, with one warm-up step",
        midtrain("refine.on_policy=true", "refine.warmup_steps=1", UNCUT, *steps(5, save=3)),
    ),
    one("lact", "mid-training of a LaCT", midtrain(UNCUT, *steps(3, save=3), model=LACT)),
    one(
        "gated_deltanet_segments",
        "mid-training of a Gated DeltaNet, activations recomputed segment by segment",
        midtrain(SEGMENTS, *steps(3, save=3), model=GATED_DELTANET),
    ),
    one(
        "grouped",
        "rollouts compared at their position, from the weights of the run directory that is kept here",
        midtrain(SEGMENTS, *GROUPED, *steps(3, save=-1), model=("model.path=DATA/model",)),
    ),
    one(
        "many_rollouts",
        "recipe=midtrain_many_rollouts in the trained pass and in pieces, from the same weights, with one warm-up step",
        midtrain(
            "refine.on_policy=true",
            "refine.warmup_steps=1",
            UNCUT,
            *MANY,
            *steps(5, save=3),
            recipe="midtrain_many_rollouts",
            model=("model.path=DATA/model",),
        ),
    ),
    one(
        "posttrain_nested",
        "post-training: REFINE on the prompts, no gradient through their states, next-token loss on the answers",
        posttrain("refine.nsp.grad_scope=branch", "refine.nsp.anchor=token"),
    ),
    one("posttrain_grpo", "post-training: REFINE on the prompts, GRPO on sampled answers", posttrain(*GRPO)),
    one(
        "test_time",
        "test-time training: three batches of prompts, weights back after each",
        # of random weights the recipe's binary reward would be 0
        ("recipe=ttt", *DELTANET, *TEST_PROMPTS, *COMMON, UNCUT, *SMALL_BATCHES, "refine.nsp.reward=hybrid"),
    ),
)

_OLD_RUN = midtrain(UNCUT, model=SMALLEST)
OLD_RUN = Command("run", (*_OLD_RUN, *steps(2, save=2)))
"""A run of two steps whose directory later versions have to go on from."""
OLD_RUN_RESUMED = Command("run", (*_OLD_RUN, *steps(4, save=2)))
"""The command that goes on from it; alone, the uninterrupted run."""
OLD_RUN_ARCHIVE = Path(__file__).parent / "old_run.tar.xz"


def unpack_old_run(directory: Path) -> None:
    """Put DIRECTORY/data and DIRECTORY/run there, as an earlier version of the package left them."""
    with tarfile.open(OLD_RUN_ARCHIVE) as archive:
        archive.extractall(directory)  # without a filter, which Python 3.11.2 and 3.10.11 do not know: it is ours


# Data


def write_data(directory: Path) -> None:
    """Documents and prompts, training and validation."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    # no number of workers or documents per pass divides the 7 documents of unequal length
    _write(directory / "train.jsonl", [_alphabet(rng, 64) for _ in range(64)])
    _write(directory / "validation.jsonl", [_alphabet(rng, 40 + 3 * i) for i in range(7)])
    _write(directory / "prompts.jsonl", _prompts(24, 1))
    _write(directory / "test_prompts.jsonl", _prompts(7, 2))


def add_model(directory: Path) -> None:
    """Put the final model of the old run into DIRECTORY/model."""
    unpack_old_run(directory / "old")
    shutil.move(directory / "old" / "run" / "model", directory / "model")
    shutil.rmtree(directory / "old")


def _alphabet(rng: random.Random, length: int) -> dict[str, str]:
    """The alphabet, over and over, from a random letter on; every eighth letter is a random one."""
    start = rng.randrange(26)
    letters = [rng.randrange(26) if i % 8 == 7 else (start + i) % 26 for i in range(length)]
    return {"text": "".join(chr(97 + letter) for letter in letters)}


def _prompts(count: int, seed: int) -> list[dict[str, Any]]:
    """Keys with values in a row, then a key: the answer is its value. No two prompts have equally many tokens."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        keys = rng.sample("abcdefghijklmnopqrstuvwxyz", 5 + index % 4)
        pairs = [(key, "".join(rng.choices("0123456789", k=2 + index % 2))) for key in keys]
        key, value = rng.choice(pairs)
        rows.append(
            {
                "name": f"{seed}-{index}",
                "prompt": " ".join(f"{k}={v}" for k, v in pairs) + "." * index + f" {key}=",
                "answer": [value, "x"],
                "task": "ruler_squadqa",
                "max_gen_tokens": 2 + index % 3,
            }
        )
    return rows


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
