"""Weights are held to the model from the headers of their files, by the loader's own rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from reference.crafted import MakesDirectory
from reference.toy import tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from refine_verl.models import ModelError, load_model
from refine_verl.models.weights import check_stored_numbers, check_weights

KEY = "model.layers.1.attn.o_proj.weight"


@pytest.fixture
def config() -> PretrainedConfig:
    return tiny_config("delta_net")


@pytest.fixture
def checkpoint(config: PretrainedConfig, tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint"
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture
def sharded(config: PretrainedConfig, tmp_path: Path) -> Path:
    directory = tmp_path / "sharded"
    AutoModelForCausalLM.from_config(config).save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def rewrite(checkpoint: Path, **changes: Tensor | None) -> None:
    """Set keys of the weights (`__` stands for a dot); None removes them."""
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    for name, value in changes.items():
        key = name.replace("__", ".")
        weights.pop(key, None)
        if value is not None:
            weights[key] = value
    save_file(weights, file, metadata={"format": "pt"})


def refusal(checkpoint: Path, config: PretrainedConfig) -> str:
    with pytest.raises(ModelError) as error:
        check_weights(checkpoint, config)
    return str(error.value)


def test_weights_that_fit_pass_in_one_file_and_in_shards(
    checkpoint: Path, sharded: Path, config: PretrainedConfig
) -> None:
    check_weights(checkpoint, config)
    check_weights(sharded, config)


def test_missing_unexpected_and_misshapen_keys_are_named_with_the_file(
    checkpoint: Path, config: PretrainedConfig
) -> None:
    rewrite(
        checkpoint, model__layers__1__attn__o_proj__weight=None, foo=torch.zeros(2), lm_head__weight=torch.ones(5, 32)
    )
    said = refusal(checkpoint, config)
    assert str(checkpoint) in said and "check that config.json belongs to these weights" in said
    assert f"missing keys: {KEY}, not in model.safetensors" in said
    assert "unexpected keys: foo in model.safetensors" in said
    assert "wrong shapes: lm_head.weight is [5, 32] in model.safetensors and [61, 32] in the model" in said


def test_only_the_first_keys_are_listed(checkpoint: Path, config: PretrainedConfig) -> None:
    rewrite(checkpoint, **{f"extra{i}": torch.zeros(1) for i in range(9)})
    said = refusal(checkpoint, config)
    assert "extra3 in model.safetensors, ... (9 in all)" in said and "extra4" not in said


def test_the_check_agrees_with_the_loader(checkpoint: Path, config: PretrainedConfig) -> None:
    rewrite(checkpoint, model__layers__1__attn__o_proj__weight=None)
    refusal(checkpoint, config)
    with pytest.raises(ModelError, match=KEY):
        load_model(checkpoint)


@pytest.mark.parametrize("family", ["delta_net", "gated_deltanet"])
def test_tied_embeddings_need_no_head(family: str, tmp_path: Path) -> None:
    tied = tiny_config(family, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(tied).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    check_weights(tmp_path, tied)
    load_model(tmp_path)
    untied = tiny_config(family, tie_word_embeddings=False)
    assert "missing keys: lm_head.weight" in refusal(tmp_path, untied)


def test_a_head_of_its_own_beside_tied_embeddings(
    checkpoint: Path, config: PretrainedConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """The check is made all the same, and one line says which of the two counts."""
    tied = tiny_config("delta_net", tie_word_embeddings=True)
    check_weights(checkpoint, tied)
    (record,) = caplog.records
    assert f"model.path={checkpoint}: config.json ties lm_head.weight to the embeddings" in record.getMessage()
    caplog.clear()
    check_weights(checkpoint, tied, key="model")
    assert caplog.records[0].getMessage().startswith(f"model={checkpoint}: ")
    rewrite(checkpoint, model__layers__1__attn__o_proj__weight=None)
    assert KEY in refusal(checkpoint, tied)


def test_what_the_loader_renames_is_not_refused(checkpoint: Path, config: PretrainedConfig) -> None:
    """Weights of the base model alone lack its prefix; with tied embeddings they are all there is."""
    tied = tiny_config("delta_net", tie_word_embeddings=True)
    file = checkpoint / "model.safetensors"
    base = {name.removeprefix("model."): value for name, value in load_file(file).items() if name != "lm_head.weight"}
    save_file(base, file, metadata={"format": "pt"})
    check_weights(checkpoint, tied)
    load_model(checkpoint, config=tied)


def test_a_file_that_was_cut_off_is_named(checkpoint: Path, sharded: Path, config: PretrainedConfig) -> None:
    for directory in (checkpoint, sharded):
        file = sorted(directory.glob("*.safetensors"))[-1]
        content = file.read_bytes()
        for kept in (len(content) - 1, len(content) // 2, 4, 0):
            file.write_bytes(content[:kept])
            said = refusal(directory, config)
            assert f"{file} is damaged or incomplete" in said and f"has {kept} bytes" in said and "Download" in said


def test_a_file_git_lfs_did_not_fetch(checkpoint: Path, config: PretrainedConfig) -> None:
    (checkpoint / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "model.safetensors is a Git LFS pointer" in refusal(checkpoint, config)


def test_a_shard_that_is_not_there(sharded: Path, config: PretrainedConfig) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    said = refusal(sharded, config)
    assert "1 of them are not there" in said and gone.name in said


def test_an_index_that_is_no_index(sharded: Path, config: PretrainedConfig) -> None:
    index = sharded / "model.safetensors.index.json"
    for text in ("{", "[]", "{}", '{"weight_map": 3}'):
        index.write_text(text)
        assert f"{index} is damaged" in refusal(sharded, config)


def test_files_that_no_loader_looks_for(checkpoint: Path, config: PretrainedConfig) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "weights.safetensors")
    assert "no weights by a name that transformers loads (model.safetensors, " in refusal(checkpoint, config)


def pickled(checkpoint: Path, *, archive: bool, **more: object) -> Path:
    """The same weights as `torch.save` writes them, now or before its version 1.6."""
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    file = checkpoint / "pytorch_model.bin"
    torch.save({**weights, **more}, file, _use_new_zipfile_serialization=archive)
    return file


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_is_held_to_the_model_like_any_file(checkpoint: Path, config: PretrainedConfig, archive: bool) -> None:
    file = pickled(checkpoint, archive=archive)
    check_weights(checkpoint, config)
    check_stored_numbers(checkpoint, config)
    content = file.read_bytes()
    weights = torch.load(file, weights_only=True)
    for kept in (0, len(content) // 2):
        file.write_bytes(content[:kept])
        assert f"{file} is damaged" in refusal(checkpoint, config)
    torch.save({**weights, "foo": torch.zeros(2)}, file, _use_new_zipfile_serialization=archive)
    assert "unexpected keys: foo in pytorch_model.bin" in refusal(checkpoint, config)
    weights[KEY][3, 1] = float("nan")
    torch.save(weights, file, _use_new_zipfile_serialization=archive)
    check_weights(checkpoint, config)
    with pytest.raises(ModelError, match=f"model={checkpoint}: {KEY} holds NaN or infinity"):
        check_stored_numbers(checkpoint, config, key="model")


def test_a_pickle_in_shards_is_read_shard_by_shard(sharded: Path, config: PretrainedConfig) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    for file in sorted(sharded.glob("*.safetensors")):
        weights = load_file(file)
        if KEY in weights:
            weights[KEY][3, 1] = float("inf")
        torch.save(weights, file.with_suffix(".bin"))
        file.unlink()
    (sharded / "model.safetensors.index.json").unlink()
    index["weight_map"] = {name: Path(file).with_suffix(".bin").name for name, file in index["weight_map"].items()}
    (sharded / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    check_weights(sharded, config)
    with pytest.raises(ModelError, match=f"{KEY} holds NaN or infinity"):
        check_stored_numbers(sharded, config)


@pytest.mark.parametrize("archive", [True, False])
def test_the_code_of_a_pickle_does_not_run(
    checkpoint: Path, config: PretrainedConfig, tmp_path: Path, archive: bool
) -> None:
    file = pickled(checkpoint, archive=archive, crafted=MakesDirectory(tmp_path / "ran"))
    assert str(file) in refusal(checkpoint, config) and not (tmp_path / "ran").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists()  # the control


def test_a_pickle_of_something_else(checkpoint: Path, config: PretrainedConfig) -> None:
    pickled(checkpoint, archive=True, step=3)
    assert "pytorch_model.bin is no table of tensors" in refusal(checkpoint, config)


def test_a_hub_id_is_checked_from_the_cache_only(
    checkpoint: Path, config: PretrainedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    check_weights("nobody/nothing", config)
    snapshot = cache / "models--some--model" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    (cache / "models--some--model" / "refs").mkdir()
    (cache / "models--some--model" / "refs" / "main").write_text("abc")
    checkpoint.rename(snapshot)
    check_weights("some/model", config)
    rewrite(snapshot, lm_head__weight=None)
    with pytest.raises(ModelError, match="missing keys: lm_head.weight"):
        check_weights("some/model", config)


def test_nothing_is_said_about_weights_that_fit(
    checkpoint: Path, config: PretrainedConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    check_weights(checkpoint, config)
    assert capfd.readouterr() == ("", "")
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "delta_net"
