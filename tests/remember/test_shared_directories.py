"""Two reads into one directory, other names of its files, states that follow their model, and refusals beforehand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.evaluate_files import TEXT

import refine_verl
from refine_verl.command.front import main
from refine_verl.config import ConfigError, ModelError
from refine_verl.remember import command
from refine_verl.remember.files import find
from refine_verl.remember.identity import Identity

from .conftest import build, rows_of


def read(world: Path, out: Path, files: object) -> int:
    return main(["remember", "read", f"model={world / 'model'}", f"files={files}", f"out={out}", "segment=64"])


@pytest.mark.parametrize("meanwhile", ["2.txt", "."], ids=["another document", "all documents"])
def test_a_read_that_ends_while_another_loads_its_model(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], meanwhile: str
) -> None:
    out, real = tmp_path / "states", command._model

    def slow(*arguments: Any) -> Any:
        monkeypatch.setattr(command, "_model", real)
        assert read(world, out, world / "texts" / meanwhile) == 0
        return real(*arguments)

    monkeypatch.setattr(command, "_model", slow)
    assert read(world, out, world / "texts") == 0
    names = [each.document.name for each in find(out)]
    assert sorted(names) == [f"{world / 'texts' / str(n)}.txt:0" for n in range(3)]
    there = 1 if meanwhile == "2.txt" else 3
    assert capsys.readouterr().out.splitlines()[1] == f"{out}: {3 - there} documents read, {there} were there"


def test_a_file_by_another_name_is_there(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "states"
    monkeypatch.chdir(world)
    assert read(world, out, "texts") == 0
    (tmp_path / "link").symlink_to(world / "texts")
    for spelling in (world / "texts", "./texts", "../" + world.name + "/texts", tmp_path / "link"):
        capsys.readouterr()
        assert read(world, out, spelling) == 0
        assert capsys.readouterr().out == f"{out}: 0 documents read, 3 were there\n"
    asked = ["remember", "ask", f"model={world / 'model'}", f"memory={out}", "question=a", "max_new_tokens=1"]
    assert main([*asked, f"document={world / 'texts' / '1.txt'}:0"]) == 0
    assert capsys.readouterr().out.startswith("texts/1.txt:0\n")
    # a copy elsewhere is a document of its own, and a changed file is refused under every name
    (tmp_path / "copy.txt").write_text(TEXT)
    assert read(world, out, tmp_path / "copy.txt") == 0 and len(find(out)) == 4
    before = (world / "texts" / "0.txt").read_text()
    try:
        (world / "texts" / "0.txt").write_text(TEXT[7:])
        assert read(world, out, world / "texts") == 2
    finally:
        (world / "texts" / "0.txt").write_text(before)
    assert "other tokens than when it was read" in capsys.readouterr().err and os.path.exists(out / "00003.json")


def test_states_go_where_they_are_sent(family: str) -> None:
    (state,) = refine_verl.remember(build(family), rows_of((9,), 3)).states
    assert state.to(torch.device("cpu")) is state
    moved = state.to(torch.device("meta"))
    assert {x.device.type for x in moved.tensors} == {"meta"} and moved.rows == 1
    assert [x.shape for x in moved.tensors] == [x.shape for x in state.tensors]


def test_layers_that_are_not_known_are_refused_beforehand() -> None:
    model = build("decay_memory")
    for method in ("refine", "sft"):
        with pytest.raises(ConfigError, match=r"^adapt\.activation_checkpointing: layer needs an adapter"):
            refine_verl.adapt(model, rows_of((40,), 3), {"method": method, "activation_checkpointing": "layer"})


def test_another_adapter_is_named_as_a_cause() -> None:
    one, other = (Identity.of(build(seed=seed), None) for seed in (2, 3))
    with pytest.raises(ModelError, match=r"another adapter than when it read them \(adapter=DIR\)"):
        one.refuse_other(other, "states")
