"""Small models of every kind that states are kept of, in float64."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.evaluate_files import TEXT, make_model
from reference.hybrid import fla_attention, hybrid_model, precise
from reference.toy import tiny_config
from torch import Tensor
from transformers import AutoConfig

from refine_verl.models import load_model

ROOT = Path(__file__).resolve().parents[2]
HYBRIDS = {
    "olmo_hybrid": "olmo_hybrid",
    "qwen3_5_text": "qwen3_5_text",
    "qwen3_next": "qwen3_next",
    "gated_deltanet with attention": "gated_deltanet",
}
"""By their names in `reference.hybrid`."""
FAMILIES = ("delta_net", "gated_deltanet", "lact_swiglu", "decay_memory", *HYBRIDS)
VALUES: dict[str, dict[str, Any]] = {
    # chunks and windows that documents, segments and questions cross
    "lact_swiglu": {"num_attn_heads": 2, "num_lact_heads": 2, "lact_chunk_size": 8, "window_size": 6},
}
DOCUMENTS, QUESTIONS, WRITTEN = (40, 23, 57), (3, 1, 7, 1), 4


def build(family: str = "delta_net", dtype: torch.dtype = torch.float64, seed: int = 2, **values: Any) -> Any:
    """The same model every time, with larger weights than at initialisation: every part of it matters."""
    if family in HYBRIDS:
        return hybrid_model(HYBRIDS[family], dtype)
    if family == "decay_memory":  # the example of docs/extending.md, whose adapter has one method
        sys.path.insert(0, str(ROOT / "examples"))
        import new_model  # noqa: F401

        sys.path.remove(str(ROOT / "examples"))
        config: Any = AutoConfig.for_model(family, vocab_size=61, hidden_size=32)
    else:
        config = tiny_config(family, **{**VALUES.get(family, {}), **values})
    model = load_model(None, config=config, dtype=torch.float64, seed=1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.to(dtype).eval()


def rows_of(lengths: tuple[int, ...], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 61, (length,), generator=generator) for length in lengths]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in HYBRIDS:
        yield request.param
        return
    with precise(), fla_attention():
        yield request.param


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a user: a model, three texts and questions."""
    root = tmp_path_factory.mktemp("remember")
    make_model(root / "model")
    (root / "texts").mkdir()
    for number in range(3):
        (root / "texts" / f"{number}.txt").write_text(TEXT[number:] * (number + 1))
    (root / "questions.txt").write_text("What is green?\n\nWhat has Bob?\n")
    return root
