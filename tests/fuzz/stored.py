"""Model directories and checkpoints that are cut off, altered, incomplete, of something else, or crafted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fuzz.cases import Case
from fuzz.world import SHARDS, World, commit, write_checkpoint
from safetensors.torch import load_file, save_file

Harm = Callable[[Path], object]

WEIGHTS = "model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
MODEL_COMMANDS = {
    "main": ("model.path={inputs}/model", "model.tokenizer=null"),
    "plan": ("model.path={inputs}/model", "model.tokenizer=null"),
    "evaluate": ("model={inputs}/model",),
    "inspect": ("model={inputs}/model",),
    "remember": ("model={inputs}/model",),
}
"""Every command that reads a model, with what names it."""


def _shorten(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Harm:
    def harm(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    return harm


def _config(**changes: Any) -> Harm:
    """config.json with other values; `...` takes a key out."""

    def harm(folder: Path) -> None:
        file = folder / "config.json"
        config = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))

    return harm


def _replaced(name: str, content: bytes) -> Harm:
    return lambda folder: (folder / name).write_bytes(content)


def _as_folder(name: str) -> Harm:
    def harm(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return harm


def _without_tokenizer(folder: Path) -> None:
    for file in folder.iterdir():
        if "token" in file.name or file.name in ("vocab.json", "merges.txt"):
            file.unlink()


def _not_a_number(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"][0, 0] = float("nan")


def _misshapen(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"] = weights["lm_head.weight"][:, :-1].clone()


def _an_index_without_shards(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def _a_path_that_is_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("{}")


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


MODELS: dict[str, Harm] = {
    "weights cut in half": lambda m: _shorten(m / WEIGHTS, 0.5),
    "weights cut in the header": lambda m: _shorten(m / WEIGHTS, 0.01),
    "empty weights": _replaced(WEIGHTS, b""),
    "weights that are a pointer of Git LFS": _replaced(WEIGHTS, POINTER.encode()),
    "weights that are noise": _replaced(WEIGHTS, bytes(range(256)) * 40),
    "weights that are a web page": _replaced(WEIGHTS, b"<!DOCTYPE html><html>not found</html>" * 9),
    "weights that are a folder": _as_folder(WEIGHTS),
    "no weights": lambda m: (m / WEIGHTS).unlink(),
    "an index without its shards": _an_index_without_shards,
    "a tensor missing": _weights(lambda weights: weights.pop("lm_head.weight")),
    "a tensor too many": _weights(lambda weights: weights.update(extra=torch.zeros(3))),
    "a tensor of another shape": _weights(_misshapen),
    "weights that are not numbers": _weights(_not_a_number),
    "config.json missing": lambda m: (m / "config.json").unlink(),
    "config.json cut off": lambda m: _shorten(m / "config.json", 0.5),
    "config.json empty": _replaced("config.json", b""),
    "config.json a list": _replaced("config.json", b"[]"),
    "config.json not UTF-8": _replaced("config.json", b'{"model_type": "\xff"}'),
    "config.json a pointer of Git LFS": _replaced("config.json", POINTER.encode()),
    "model_type missing": _config(model_type=...),
    "model_type null": _config(model_type=None),
    "model_type of attention": _config(model_type="llama"),
    "model_type unknown": _config(model_type="nonsense"),
    "another fast-weight model_type": _config(model_type="gated_deltanet"),
    "hidden_size text": _config(hidden_size="32"),
    "hidden_size null": _config(hidden_size=None),
    "hidden_size negative": _config(hidden_size=-32),
    "hidden_size other": _config(hidden_size=48),
    "num_heads that do not divide": _config(num_heads=5),
    "num_heads 0": _config(num_heads=0),
    "vocab_size 0": _config(vocab_size=0),
    "num_hidden_layers 3": _config(num_hidden_layers=3),
    "num_hidden_layers text": _config(num_hidden_layers="two"),
    "layers of attention": _config(attn={"layers": [0], "num_heads": 2, "num_kv_heads": 2, "window_size": 16}),
    "quantization_config": _config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "quantization_config unknown": _config(quantization_config={"quant_method": "nonsense"}),
    "tie_word_embeddings with a head of its own": _config(tie_word_embeddings=True),
    "a path that is a file": _a_path_that_is_a_file,
    "an empty folder": _emptied,
    "no tokenizer": _without_tokenizer,
    "tokenizer.json cut off": lambda m: _shorten(m / "tokenizer.json", 0.5),
    "tokenizer.json empty": _replaced("tokenizer.json", b""),
    "tokenizer.json a pointer of Git LFS": _replaced("tokenizer.json", POINTER.encode()),
    "tokenizer_config.json cut off": lambda m: _shorten(m / "tokenizer_config.json", 0.5),
}
"""What a model directory is not."""

UNDECIDED = ("tie_word_embeddings with a head of its own",)
"""transformers loads it, ties the head and says so."""

ONLY_WHERE_LOADED = ("weights that are not numbers",)
"""Seen once weights are read, which `plan` does not."""


def _unpickled(marker: Path) -> Any:
    """An object whose pickle makes a file when it is read."""

    class Crafted:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    return Crafted()


def _crafted(name: str) -> Harm:
    def harm(run_dir: Path) -> None:
        """As somebody would who can write there: the manifest is made anew."""
        final = run_dir / "global_step_3"
        folder = final.rename(run_dir / ".saving_global_step_3")
        (folder / "manifest.json").unlink()
        torch.save({"state": _unpickled(run_dir / "the_code_was_run")}, folder / name)
        commit(run_dir)

    return harm


def _in_checkpoint(name: str, harm: Callable[[Path], object]) -> Harm:
    return lambda run_dir: harm(run_dir / "global_step_3" / name)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(bytes(content))


def _manifest(change: Callable[[dict[str, Any]], object]) -> Harm:
    def harm(run_dir: Path) -> None:
        file = run_dir / "global_step_3" / "manifest.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return harm


def _notes(content: str) -> Harm:
    """Another fsdp_config.json, and no manifest to tell."""

    def harm(run_dir: Path) -> None:
        folder = run_dir / "global_step_3"
        (folder / "manifest.json").unlink()
        (folder / "actor" / "fsdp_config.json").write_text(content)

    return harm


def _saved_model(content: str) -> Harm:
    def harm(run_dir: Path) -> None:
        folder = run_dir / "global_step_3"
        (folder / "manifest.json").unlink()
        (folder / "actor" / "huggingface" / "config.json").write_text(content)

    return harm


def _without_manifest(name: str, share: float) -> Harm:
    def harm(run_dir: Path) -> None:
        (run_dir / "global_step_3" / "manifest.json").unlink()
        _shorten(run_dir / "global_step_3" / name, share)

    return harm


def _record(field: str, value: Any) -> Harm:
    return _manifest(lambda m: m["files"]["data.pt"].update({field: value}))


_SHARD_FILES = [f"actor/{name}_world_size_1_rank_0.pt" for name in SHARDS] + ["data.pt"]

CHECKPOINTS: dict[str, Harm] = {
    **{f"{name} cut off": _in_checkpoint(name, lambda file: _shorten(file, 0.9)) for name in _SHARD_FILES},
    **{f"{name} altered": _in_checkpoint(name, _flip) for name in _SHARD_FILES},
    **{f"{name} missing": _in_checkpoint(name, Path.unlink) for name in _SHARD_FILES},
    **{f"{name} crafted": _crafted(name) for name in _SHARD_FILES},
    **{f"{name} cut off, no manifest": _without_manifest(name, 0.9) for name in _SHARD_FILES},
    "manifest empty": lambda run: (run / "global_step_3" / "manifest.json").write_text(""),
    "manifest a list": lambda run: (run / "global_step_3" / "manifest.json").write_text("[]"),
    "manifest not UTF-8": lambda run: (run / "global_step_3" / "manifest.json").write_bytes(b"\xff{}"),
    "manifest without files": _manifest(lambda m: m.pop("files")),
    "manifest of no files": _manifest(lambda m: m.update(files={})),
    "manifest with files a list": _manifest(lambda m: m.update(files=[1])),
    "manifest with another size": _record("bytes", 1),
    "manifest with a negative size": _record("bytes", -1),
    "manifest with text for a size": _record("bytes", "many"),
    "manifest that names what is not there": _manifest(
        lambda m: m["files"].update({"more.pt": {"bytes": 1, "crc32": 1}})
    ),
    "manifest that names what is outside": _manifest(
        lambda m: m["files"].update({"../../../etc/passwd": {"bytes": 1, "crc32": 1}})
    ),
    "notes cut off": _notes('{"world_'),
    "notes a list": _notes("[1]"),
    "notes null": _notes("null"),
    "notes without world_size": _notes("{}"),
    "notes of two workers": _notes('{"FSDP_version": 2, "world_size": 2}'),
    "notes with text for workers": _notes('{"world_size": "1"}'),
    "notes with no workers": _notes('{"world_size": 0}'),
    "model a list": _saved_model("[]"),
    "model cut off": _saved_model('{"model_type": "del'),
    "model another": _saved_model('{"model_type": "delta_net", "hidden_size": 64}'),
    "tracker garbage and no checkpoint": lambda run: (
        shutil.rmtree(run / "global_step_3"),
        (run / "latest_checkpointed_iteration.txt").write_text("three"),
    ),
    "the checkpoint an empty folder": lambda run: (
        shutil.rmtree(run / "global_step_3"),
        (run / "global_step_3").mkdir(),
    ),
    "the checkpoint a file": lambda run: (
        shutil.rmtree(run / "global_step_3"),
        (run / "global_step_3").write_text("x"),
    ),
    "run directory a file": lambda run: (shutil.rmtree(run), run.write_text("x")),
}
"""What is wrong with the one checkpoint of a run directory."""

SOUND: dict[str, Harm] = {
    "nothing": lambda run: None,
    "tracker garbage": lambda run: (run / "latest_checkpointed_iteration.txt").write_bytes(b"\xff\xfe"),
    "tracker huge": lambda run: (run / "latest_checkpointed_iteration.txt").write_text("9" * 40),
    "tracker missing": lambda run: (run / "latest_checkpointed_iteration.txt").unlink(),
    "a folder of another name": lambda run: (run / "global_step_x").mkdir(),
    "a step that is unfinished": lambda run: (run / ".saving_global_step_9").mkdir(),
}
"""What a run goes on in spite of."""


def stored_cases() -> list[Case]:
    """Each model directory for each command that reads one, and each checkpoint."""
    cases = [
        _model(command, name, harm)
        for number, (name, harm) in enumerate(MODELS.items())
        for command in MODEL_COMMANDS
        if not (name in ONLY_WHERE_LOADED and command == "plan")
        and not (command == "plan" and number % 6)  # the door of `main`, and takes its time
    ]
    cases += [_tokenizer(name, harm) for name, harm in MODELS.items() if "token" in name or "path" in name]
    cases += [_checkpoint(name, harm, must_act=False) for name, harm in CHECKPOINTS.items()]
    return cases + [_checkpoint(name, harm, must_act=True) for name, harm in SOUND.items()]


def _model(command: str, name: str, harm: Harm) -> Case:
    def make(world: World) -> None:
        shutil.copytree(world.model, world.inputs / "model")
        harm(world.inputs / "model")

    return Case(
        id=f"{command}: a model with {name}",
        base=command,
        changed=MODEL_COMMANDS[command],
        make=make,
        names=("inputs/model", "model.path", "model.tokenizer"),
        may_act=name in UNDECIDED,
    )


def _tokenizer(name: str, harm: Harm) -> Case:
    def make(world: World) -> None:
        shutil.copytree(world.model, world.inputs / "model")
        harm(world.inputs / "model")

    options = ("documents", "--input", "{root}/train.jsonl", "--tokenizer", "{inputs}/model", "--min-tokens", "8")
    return Case(
        id=f"prepare: --tokenizer with {name}",
        base="prepare",
        changed=(*options, "--out", "out"),
        make=make,
        names=("inputs/model", "--tokenizer"),
    )


def _checkpoint(name: str, harm: Harm, must_act: bool) -> Case:
    def make(world: World) -> None:
        config = json.loads((world.model / "config.json").read_text())
        write_checkpoint(world.inputs / "run", config)
        harm(world.inputs / "run")

    return Case(
        id=f"main: resumes with {name}",
        base="main",
        changed=("trainer.default_local_dir={inputs}/run", "model.path={model}", "model.tokenizer=null"),
        make=make,
        names=("inputs/run",),
        must_act=must_act,
        always=must_act or "crafted" in name,
    )
