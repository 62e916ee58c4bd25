"""Every family that runs on the CPU, a model of one's own, and a model whose numbers are broken."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from reference.toy import tiny_config
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from refine_verl.command.keys import read_keys
from refine_verl.data.tokenizers import load_tokenizer
from refine_verl.inspect.__main__ import main
from refine_verl.inspect.command import inspect_text
from refine_verl.inspect.page import render
from refine_verl.inspect.settings import InspectSettings
from refine_verl.inspect.terminal import show
from refine_verl.models import load_model

ROOT = Path(__file__).resolve().parents[2]
KEYS = ("refine.nsp.chunks=2", "refine.nsp.rollout_length=3")


def lact() -> object:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attn_heads": 2, "num_lact_heads": 2, "hidden_ratio": 2}
    chunks = {"lact_chunk_size": 16, "window_size": 16, "fuse_cross_entropy": False}
    return AutoConfig.for_model("lact_swiglu", vocab_size=257, **sizes, **chunks)


def own() -> object:
    import new_model  # noqa: F401  registers the model and its adapter

    return AutoConfig.for_model("decay_memory", vocab_size=257, hidden_size=32)


FAMILIES: dict[str, Callable[[], object]] = {
    "gated_deltanet": lambda: tiny_config("gated_deltanet", vocab_size=257),
    "lact": lact,
    "own": own,
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    load_model(None, config=FAMILIES[family](), seed=1).save_pretrained(str(tmp_path))
    extra = ["external_lib=new_model"] if family == "own" else []
    extra += ["max_length=40", "refine.nsp.rollouts_per_position=2"]
    given = [f"model={tmp_path}", f"text={text_file}", "tokenizer=bytes", *extra, *KEYS]
    forked = inspect_text(read_keys(given, InspectSettings)[0]).inspection
    assert all(math.isfinite(value) for value in forked.entropy[1:] + forked.surprise[1:])
    slow = inspect_text(read_keys([*given, "refine.nsp.rollout=prefix"], InspectSettings)[0]).inspection
    assert [position.index for position in forked.positions] == [position.index for position in slow.positions]
    wanted = [rollout.rewards["cosine"] for rollout in slow.rollouts]
    assert [rollout.rewards["cosine"] for rollout in forked.rollouts] == pytest.approx(wanted, abs=1e-4)


def test_a_model_whose_numbers_are_broken_is_shown_as_it_is(model_dir: Path, tmp_path: Path, text_file: Path) -> None:
    weights = load_file(model_dir / "model.safetensors")
    weights["lm_head.weight"] = torch.full_like(weights["lm_head.weight"], 3e38)  # finite, and too large to add up
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    load_tokenizer("bytes", out_dir=tmp_path)
    view = inspect_text(read_keys([f"model={tmp_path}", f"text={text_file}", *KEYS], InspectSettings)[0])
    assert not any(map(math.isfinite, view.inspection.entropy))
    page = render(view)
    assert not re.search(r'(d|x|cx|cy|width)="[^"]*nan', page)
    assert "Next-token loss" in page
    show(view, Console(file=StringIO(), width=100))


def test_a_reward_of_ones_own(
    model_dir: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "inspect_rewards.py").write_text(
        "def first(inputs):\n    return inputs.predicted_tokens[:, 0].float()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    page = tmp_path / "page.html"
    given = [f"model={model_dir}", f"text={text_file}", f"out={page}", "refine.nsp.reward=inspect_rewards.first"]
    assert main([*given, *KEYS]) == 0
    assert "inspect_rewards.first" in capsys.readouterr().out
    view = inspect_text(read_keys([*given, *KEYS], InspectSettings)[0])
    assert view.rewards == ("cosine", "binary", "hybrid", "inspect_rewards.first")
    for rollout in view.inspection.rollouts:
        assert rollout.rewards["inspect_rewards.first"] == rollout.tokens[0]
    assert '<th class="number">inspect_rewards.first</th>' in page.read_text()
