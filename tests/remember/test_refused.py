"""What a memory and its files refuse, and what they take in more than one form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import refine_verl
from refine_verl.adaptation import PromptError
from refine_verl.config import ConfigError, DataError
from refine_verl.remember import Memory, load
from refine_verl.remember.files import find, write

from .conftest import build, rows_of

SFT: dict[str, Any] = {"method": "sft", "steps": 1}


@pytest.fixture(scope="module")
def memory() -> Memory:
    return refine_verl.remember(build(), rows_of((9, 7), 3))


def test_a_document_is_not_written_over_another(memory: Memory, tmp_path: Path) -> None:
    """As where two processes fill one directory."""
    document, state = memory.documents[0], memory.states[0]
    write(tmp_path, 0, document, state, memory.identity)
    first = (tmp_path / "00000.safetensors").read_bytes()
    with pytest.raises(DataError, match="there already: another process"):
        write(tmp_path, 0, memory.documents[1], memory.states[1], memory.identity)
    assert (tmp_path / "00000.safetensors").read_bytes() == first


def test_nobody_is_told_to_remove_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "delta_net"}))
    with pytest.raises(DataError, match=r"memory: .* holds other files \(config.json\)") as refused:
        find(tmp_path, "memory")
    assert "Remove" not in str(refused.value)


def test_states_of_others(memory: Memory) -> None:
    model, text = memory.model, rows_of((6,), 5)
    with refine_verl.adapt(model, text, SFT, states=memory.states[0]) as one:
        alone = one.history[0]["actor/ntp_loss"]
    with refine_verl.adapt(model, text, SFT, states=memory.states[:1]) as listed:
        assert listed.history[0]["actor/ntp_loss"] == alone
    wrong: Any
    for wrong in (memory, [1], "states"):
        with pytest.raises(PromptError, match="give memory.states"):
            refine_verl.adapt(model, text, SFT, states=wrong)
    # a family whose states have the same sizes is not told apart: `Memory.adapt` knows whose they are
    for other in (build("lact_swiglu"), build(dtype=torch.float32), build(num_hidden_layers=1)):
        states = refine_verl.remember(other, rows_of((9,), 3)).states
        with pytest.raises(PromptError, match="they are of another model"):
            refine_verl.adapt(model, text, SFT, states=states)


def test_numbers_and_names(memory: Memory, tmp_path: Path) -> None:
    memory.save(tmp_path / "states")
    with pytest.raises(ConfigError, match="only: there is no document 9; there are 2"):
        load(tmp_path / "states", memory.model, only=[9])
    answers = memory.ask(rows_of((2, 3), 6), of=1, max_new_tokens=1)
    assert [(each.document, each.question) for each in answers] == [(1, 0), (1, 1)]
    fork = memory[1]
    fork.add(rows_of((4,), 7))
    assert [each.name for each in fork.documents] == ["1", "2"]
    with pytest.raises(ConfigError, match="names: there would be two documents '1'"):
        fork.add(rows_of((4,), 7), names=["1"])
    with pytest.raises(DataError, match="no documents"):
        memory[:0].save(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(PromptError, match="texts: this memory holds no documents"):
        memory[:0].adapt(rows_of((4,), 7), SFT)
