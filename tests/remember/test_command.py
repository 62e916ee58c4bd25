"""`python -m refine_verl.remember read|ask|list` on files."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.evaluate_files import TEXT, make_model, write_jsonl

from refine_verl.command.front import main
from refine_verl.command.keys import keys_of
from refine_verl.models import FastWeightActor, load_model
from refine_verl.remember import command, remember
from refine_verl.remember.settings import AskSettings, ListSettings, ReadSettings


def call(*words: object) -> int:
    return main(["remember", *map(str, words)])


def read(world: Path, out: Path, **values: object) -> int:
    given = {"model": world / "model", "files": world / "texts", "out": out, "segment": 64, **values}
    return call("read", *(f"{key}={value}" for key, value in given.items()))


def test_read_ask_list(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "states"
    assert read(world, out, batch_size=2) == 0
    assert capsys.readouterr().out == f"{out}: 3 documents read, 0 were there\n"
    arguments = [f"model={world / 'model'}", f"memory={out}", "max_new_tokens=4"]
    assert call("ask", *arguments, f"questions={world / 'questions.txt'}", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [x["question"] for x in found["answers"]] == ["What is green?", "What has Bob?"] * 3
    assert found["forward_tokens"] == 3 * (14 + 13) + 6 * 3

    model = load_model(world / "model").eval()
    memory = remember(model, [TEXT[n:] * (n + 1) for n in range(3)], words(world))
    wanted = memory.ask(["What is green?", "What has Bob?"], max_new_tokens=4)
    assert [x["answer"] for x in found["answers"]] == [x.text for x in wanted]

    one = f"{world / 'texts' / '1.txt'}:0"
    assert call("ask", *arguments, "question=What is green?", f"document={one}") == 0
    assert capsys.readouterr().out == f"{one}\n  What is green?\n  {wanted[2].text}\n"
    assert call("list", f"memory={out}") == 0
    shown = capsys.readouterr().out
    assert one in shown and "3 documents, " in shown and "of a delta_net in float32" in shown
    assert call("list", f"memory={out}", "--json") == 0
    listed = json.loads(capsys.readouterr().out)["documents"]
    assert [x["tokens"] for x in listed] == [len(TEXT[n:]) * (n + 1) for n in range(3)]
    assert [x["bytes"] for x in listed] == [state.num_bytes for state in memory.states]


def words(world: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(world / "model")


def test_interrupted(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole, real = tmp_path / "states", tmp_path / "whole", command.write
    lengths: list[int] = []

    def stopped(directory: Path, number: int, *rest: Any) -> Any:
        if number == 1:
            raise KeyboardInterrupt
        return real(directory, number, *rest)

    monkeypatch.setattr(command, "write", stopped)
    assert read(world, out) == 130
    assert "give the same command again to resume" in capsys.readouterr().err
    assert sorted(x.name for x in out.iterdir()) == ["00000.json", "00000.safetensors"]
    monkeypatch.undo()
    (out / "00001.safetensors").write_bytes(b"what a process that was killed left")

    original = FastWeightActor.run

    def counted(self: FastWeightActor, packed: Any, *rest: Any, **named: Any) -> Any:
        lengths.append(sum(packed.lengths))
        return original(self, packed, *rest, **named)

    monkeypatch.setattr(FastWeightActor, "run", counted)
    assert read(world, out) == 0
    assert capsys.readouterr().out == f"{out}: 2 documents read, 1 were there\n"
    assert sum(lengths) == len(TEXT[1:]) * 2 + len(TEXT[2:]) * 3  # the first is not read again
    assert read(world, out) == 0 and sum(lengths) == len(TEXT[1:]) * 2 + len(TEXT[2:]) * 3
    monkeypatch.undo()
    assert read(world, whole) == 0
    for path in sorted(whole.iterdir()):
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With exit code 2 and one line, and nothing is left behind."""
    out = tmp_path / "states"
    texts = tmp_path / "texts.jsonl"
    write_jsonl(texts, [{"text": TEXT}, {"text": TEXT[5:]}])
    assert read(world, out, files=texts) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    write_jsonl(texts, [{"text": TEXT}, {"text": TEXT[6:]}])
    make_model(tmp_path / "other", seed=2)
    (tmp_path / "stray").mkdir()
    (tmp_path / "stray" / "notes.txt").write_text("x")
    (tmp_path / "empty.txt").write_text("")
    capsys.readouterr()
    ask = ("ask", f"model={world / 'model'}", f"memory={out}")
    for code, said in (
        (lambda: read(world, out, files=texts), "texts.jsonl:1 has other tokens than when it was read"),
        (lambda: read(world, out, model=tmp_path / "other"), "states of a model with other weights"),
        (lambda: read(world, out, dtype="bfloat16"), "in float32, and this one is in bfloat16"),
        (lambda: read(world, tmp_path / "stray"), "stray holds other files (notes.txt)"),
        (lambda: read(world, texts), "texts.jsonl is no directory"),
        (lambda: read(world, tmp_path / "new", files=tmp_path / "empty.txt"), "empty"),
        (lambda: read(world, tmp_path / "new", files=tmp_path / "nowhere.txt"), "files"),
        (lambda: read(world, tmp_path / "new", device="tpu"), "device"),
        (lambda: read(world, tmp_path / "new", model=tmp_path / "nowhere"), "model="),
        (lambda: read(world, tmp_path / "new", external_lib="no_such_package"), "external_lib: no_such_package"),
        (lambda: read(world, tmp_path / "new", segment=0), "segment: must be at least 1"),
        (lambda: call(*ask), "question: or questions: give one of them"),
        (lambda: call(*ask, "question=a", "questions=b"), "question: or questions: give one of them"),
        (lambda: call(*ask, "questions=nowhere"), "questions: nowhere cannot be read"),
        (lambda: call(*ask, "question=a", "document=texts"), "document: texts is none of the 2 that were read"),
        (lambda: call("ask", f"model={tmp_path / 'other'}", f"memory={out}", "question=a"), "other weights"),
        (lambda: call("list", f"memory={tmp_path / 'stray'}"), "holds no documents"),
        (lambda: call(), "no command given. Allowed: read, ask, list"),
        (lambda: call("raed"), "unknown command 'raed'"),
    ):
        assert code() == 2, said
        captured = capsys.readouterr()
        assert said in captured.err and captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not (tmp_path / "new").exists() and torch.is_grad_enabled()


def test_the_keys_are_those_of_the_page() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/keep.md").read_text()
    table = re.findall(r"^\| `(\w+)` \| (.*?) \|", page[page.index("## The command") :], re.M)
    keys = keys_of(ReadSettings)
    assert [name for name, _ in table] == list(keys)
    for name, default in table:
        if keys[name].default not in (None, dataclasses.MISSING):
            assert default == f"`{keys[name].default}`"
    rest = page[page.index("`ask` takes") :]
    assert all(f"`{name}`" in rest for name in (*keys_of(AskSettings), *keys_of(ListSettings)))
