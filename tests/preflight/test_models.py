"""One door for models: what is wrong with a directory is said alike by all commands, with exit code 2."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz.runner import Checks, run
from fuzz.stored import MODEL_COMMANDS, MODELS
from fuzz.world import World, make_world

from refine_verl.compose.composition import compose_config, register_configs
from refine_verl.compose.validate import validate
from refine_verl.config import ConfigError, Refusal
from refine_verl.models import load_model
from refine_verl.preflight.run import check_run

FAULTS = {
    "a path that is a file": "no such directory",
    "an empty folder": "no config.json in this directory; is it a Hugging Face model directory?",
    "config.json cut off": "its configuration cannot be read (",
    "config.json a pointer of Git LFS": "config.json is a Git LFS pointer and not the file itself. Run `git lfs pull`",
    "model_type of attention": "'llama' is not a fast-weight model REFINE knows. Supported model types: ",
    "layers of attention": "the attention layers of this delta_net have a sliding window (window_size=16 of config",
    "quantization_config": "its weights are quantised (quantization_config of config.json: bitsandbytes), and they are",
    "num_heads that do not divide": "no delta_net can be made of this configuration: key dim must be divisible",
    "no weights": "no weights by a name that transformers loads (model.safetensors, ",
    "weights cut in half": "/model.safetensors is damaged or incomplete (",
    "weights that are a pointer of Git LFS": "/model.safetensors is a Git LFS pointer and not the file itself",
    "a tensor of another shape": "wrong shapes: lm_head.weight is [257, 31] in model.safetensors and [257, 32] in the",
    "tokenizer.json a pointer of Git LFS": "tokenizer.json is a Git LFS pointer and not the file itself.",
    "no tokenizer": "no tokenizer can be loaded from this directory: ",
}
"""What is wrong, by its name in `fuzz.stored.MODELS`, and what is said of it."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def broken(world: World) -> Iterator[dict[str, Path]]:
    """A directory for each fault."""
    places = {}
    for number, name in enumerate(FAULTS):
        places[name] = world.root / f"broken{number}" / "model"
        shutil.copytree(world.model, places[name])
        MODELS[name](places[name])
    yield places


def said(command: str, world: World, model: Path) -> str:
    """The message of a command with the key that named the model taken out."""
    changed = [item.format(inputs=model.parent) for item in MODEL_COMMANDS[command]]
    keys = {item.partition("=")[0] for item in changed}
    arguments = [item for item in world.base(command) if item.partition("=")[0] not in keys] + changed
    checks = Checks([world.base(command)]) if command == "main" else None  # what it does behind its command line
    outcome = run(command, arguments, world.here, world.inputs, checks)
    assert (outcome.code, outcome.written, outcome.problem) == (2, (), ""), outcome.errors
    key = changed[0].partition("=")[0]
    (message,) = re.findall(r"^error: (.*)$", outcome.errors, re.MULTILINE)
    assert message.startswith(f"{key}={model}: ")
    return general(message, key)


def general(message: str, key: str) -> str:
    """Without the keys of one command."""
    return message.removeprefix(f"{key}=").replace("model.tokenizer=", "tokenizer=")


@pytest.mark.parametrize("fault", FAULTS)
def test_every_command_says_the_same(fault: str, world: World, broken: dict[str, Path]) -> None:
    plans = [*FAULTS].index(fault) % 4 == 0  # the door of `main`, behind a command line that takes its time
    commands = [command for command in MODEL_COMMANDS if command != "plan" or plans]
    messages = {command: said(command, world, broken[fault]) for command in commands}
    assert FAULTS[fault] in messages["main"]
    assert len(set(messages.values())) == 1, messages


@pytest.mark.parametrize("fault", FAULTS)
def test_lm_evaluation_harness_says_the_same(fault: str, world: World, broken: dict[str, Path]) -> None:
    pytest.importorskip("lm_eval")
    from refine_verl.evaluate.lm import RefineLM

    with pytest.raises(Refusal) as refusal:  # exit code 2 of `refine-lm-eval`
        RefineLM(str(broken[fault]))
    assert str(refusal.value).startswith(f"pretrained={broken[fault]}: ")
    assert general(str(refusal.value), "pretrained") == said("inspect", world, broken[fault])


@pytest.mark.parametrize(
    "fault",
    [name for name in FAULTS if "token" not in name and name not in ("no weights", "num_heads that do not divide")],
)
def test_load_model_says_the_same(fault: str, broken: dict[str, Path]) -> None:
    """A directory without weights gives random ones there, as documented."""
    with pytest.raises(Refusal, match=re.escape(f"model.path={broken[fault]}: ")) as refusal:
        load_model(broken[fault])
    assert FAULTS[fault].removesuffix(" in the").replace(" in model.safetensors", "") in str(refusal.value)


def test_a_model_whose_writes_are_not_known_is_refused_before_a_run(tmp_path: Path) -> None:
    keys = ["recipe=quickstart", "model=tiny_lact", f"trainer.default_local_dir={tmp_path / 'run'}"]
    register_configs()
    with pytest.raises(ConfigError, match=r"refine\.nsp\.selection: surprise looks at how strongly each token"):
        check_run(validate(compose_config([*keys, "refine.nsp.selection=surprise"])))
    check_run(validate(compose_config([*keys, "refine.nsp.selection=surprise", "refine.loss.rl_coef=0"])))
