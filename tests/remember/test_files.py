"""States in files: whole or not there, and refused by name wherever they would mean something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import refine_verl
from refine_verl.config import ConfigError, DataError, ModelError
from refine_verl.data.tokenizers import load_tokenizer
from refine_verl.models import FastWeightState, load_model
from refine_verl.models.keeping import describe, restore
from refine_verl.remember import files, load

from .conftest import build, rows_of

WORDS = 257


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("bytes")


@pytest.fixture(scope="module")
def model() -> Any:
    return build(vocab_size=WORDS)


@pytest.fixture(scope="module")
def saved(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "states"
    refine_verl.remember(model, ["The sky is blue.", "Ann"], tokenizer).save(directory)
    return directory


def test_what_is_written(saved: Path, model: Any, tokenizer: Any) -> None:
    assert sorted(x.name for x in saved.iterdir()) == [
        f"0000{i}.{end}" for i in (0, 1) for end in ("json", "safetensors")
    ]
    content = json.loads((saved / "00000.json").read_text())
    assert (content["name"], content["positions"], content["dtypes"]) == ("0", 16, ["float64"])
    assert content["model"]["model_type"] == "delta_net" and content["model"]["dtype"] == "float64"
    assert (saved / "00000.safetensors").stat().st_size == content["file_bytes"]
    assert sum(x.nbytes for x in load_file(saved / "00000.safetensors").values()) == content["state_bytes"]
    # ids need no tokenizer, and what is saved again still knows the one it was read with
    again = load(saved, model)
    assert again.identity == load(saved, model, tokenizer).identity


def trained(**_: Any) -> Any:
    model = build(vocab_size=WORDS)
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[7] += 1e-9
    return model


def other_words() -> Any:
    words = load_tokenizer("bytes")
    words.backend_tokenizer.add_special_tokens(["<new>"])
    return words


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: build("gated_deltanet", vocab_size=WORDS), "states of a delta_net, and the model is a gated_deltanet"),
        (lambda: build(vocab_size=WORDS, num_heads=4), r"another configuration \(num_heads: 2 there, 4 here\)"),
        (lambda: build(vocab_size=WORDS).float(), "in float64, and this one is in float32. Load it in float64"),
        (trained, "other weights: it has been trained since"),
        (lambda: build(vocab_size=WORDS, seed=5), "other weights"),
    ],
    ids=["family", "configuration", "dtype", "trained", "seed"],
)
def test_another_model(make: Callable[[], Any], said: str, saved: Path) -> None:
    with pytest.raises(ModelError, match=said):
        load(saved, make())


def test_another_tokenizer(saved: Path, model: Any) -> None:
    with pytest.raises(DataError, match="tokenised by another tokenizer"):
        load(saved, model, other_words())


def test_the_same_model_elsewhere(tmp_path: Path) -> None:
    """Saved and read back: nothing that states do not depend on is compared."""
    model = build(dtype=torch.float32)
    refine_verl.remember(model, [[1, 2, 3]]).save(tmp_path / "states")
    model.save_pretrained(tmp_path / "model")
    assert len(load(tmp_path / "states", load_model(tmp_path / "model"))) == 1


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def _say(**values: Any) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return harm


@pytest.mark.parametrize(
    ("file", "harm", "said"),
    [
        ("00001.safetensors", _cut, r"00001.safetensors: has \d+ bytes of \d+: it is cut off. Remove it"),
        ("00001.safetensors", _flip, "00001.safetensors: its checksum is not the one it was written with"),
        ("00001.safetensors", Path.unlink, "00001.safetensors: cannot be read"),
        ("00001.json", _cut, "00001.json: is no document of refine_verl.remember, or is cut off"),
        ("00001.json", _say(positions=5), "00001.json: its checksum is not the one it was written with"),
        ("00001.json", _say(format="refine_verl.remember 9"), "has the format 'refine_verl.remember 9', and this"),
        ("00001.json", lambda path: path.write_text("[]"), "00001.json: is no document"),
    ],
)
def test_harmed(file: str, harm: Callable[[Path], object], said: str, saved: Path, model: Any, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "states")
    harm(tmp_path / "states" / file)
    with pytest.raises(DataError, match=said):
        load(tmp_path / "states", model)


def test_nothing_there(model: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="directory: .*nowhere is no directory"):
        load(tmp_path / "nowhere", model)
    with pytest.raises(DataError, match="holds no documents"):
        load(tmp_path, model)


def test_a_description_names_no_code() -> None:
    """It is data: a class that no adapter has brought along is not looked for."""
    state = FastWeightState({"a": (torch.ones(1, 2), None, [3, "x"])})
    description, tensors = describe(state)
    assert restore(json.loads(json.dumps(description)), tensors).tree == state.tree
    for crafted in ({"class": "os.system", "fields": {}}, {"tensor": 4}, {"set": []}, {"tuple": 1}):
        with pytest.raises((KeyError, IndexError, TypeError)):
            restore(crafted, tensors)
    with pytest.raises(TypeError, match=r"holds a builtins.set cannot be saved"):
        describe(FastWeightState({"a": {1}}))


@pytest.mark.parametrize("fails", ["save_file", "write_atomically"])
def test_a_save_that_fails_leaves_nothing(
    fails: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = refine_verl.remember(model, rows_of((5, 6), 3))
    calls: list[object] = []
    real = getattr(files, fails)

    def full(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(files, fails, full)
    with pytest.raises(OSError, match="No space left"):
        memory.save(tmp_path / "states")
    assert len(calls) == 2 and not list(tmp_path.iterdir())
    monkeypatch.undo()
    memory.save(tmp_path / "states")
    with pytest.raises(ConfigError, match="states is there already"):
        memory.save(tmp_path / "states")
    assert len(load(tmp_path / "states", model)) == 2


def test_no_tensor_is_needed_twice(tmp_path: Path, model: Any) -> None:
    """safetensors refuses tensors that share memory; states may."""
    tensor = torch.ones(1, 2)
    stored = files.write(
        tmp_path,
        0,
        files.Document(name="a", parts=()),
        FastWeightState((tensor, tensor, tensor.expand(3, 2))),
        refine_verl.remember(model, [[1]]).identity,
    )
    assert [x.shape for x in stored.state(torch.device("cpu")).tensors] == [(1, 2), (1, 2), (3, 2)]
    save_file({"0": tensor}, tmp_path / "00000.safetensors")
    with pytest.raises(DataError, match="cut off"):
        stored.state(torch.device("cpu"))
