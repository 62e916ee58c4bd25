"""A tiny DeltaNet over bytes, saved as a directory, and data in the formats that the command reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoConfig

from refine_verl.data.tokenizers import load_tokenizer
from refine_verl.models import load_model

BYTES = 257
TEXT = "The grass is green and the sky is blue. Ann has seven apples, Bob has nine. "


PROMPT_RUN = (
    "data.max_length=128",
    "data.train_batch_size=4",
    "refine.ppo_mini_batch_size=4",
    "refine.nsp.chunks=3",
    "refine.nsp.rollout_length=3",
    "trainer.n_gpus_per_node=1",
)
"""Of a run of that model on the prompts of `write_prompts`."""


def make_model(directory: Path, seed: int = 1) -> Path:
    """Weights far from their initial ones: every part of the model matters."""
    config = AutoConfig.for_model(
        "delta_net",
        vocab_size=BYTES,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=2,
        hidden_ratio=2,
        eos_token_id=256,
        bos_token_id=256,
        pad_token_id=256,
        max_position_embeddings=64,
        fuse_cross_entropy=False,
    )
    model: Any = load_model(None, config=config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    load_tokenizer("bytes", out_dir=directory)
    return directory


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_prompts(root: Path) -> None:
    """`prompts.jsonl`: eight prompts, each with two answers."""
    rows = [{"prompt": f"{TEXT[n:]} {n}?", "answers": ["seven", "nine"], "task": "hotpotqa"} for n in range(8)]
    write_jsonl(root / "prompts.jsonl", rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
