"""An adapter in the commands: merged into a model directory, evaluated, inspected; refused where it does not belong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from reference.evaluate_files import make_model
from transformers import AutoTokenizer

import refine_verl
from refine_verl.compose.composition import compose_config, register_configs
from refine_verl.compose.validate import validate
from refine_verl.config import ConfigError, DataError, LoraSettings, ModelError
from refine_verl.evaluate.model import find_model, load_evaluated, ttt_settings
from refine_verl.export.__main__ import main
from refine_verl.inspect.source import load_actor
from refine_verl.kernels import cpu_kernels
from refine_verl.models import load_model, loading, lora, make_actor, open_model
from refine_verl.preflight.checkpoints import _check_adapters
from refine_verl.preflight.run import check_adapters
from refine_verl.workers.engine import RefineEngine

TEXT = list(b"The grass is green, and Ann has seven apples.")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model: Any = load_model(base)
    fingerprint = lora.base_fingerprint(model)
    lora.add_adapters(model, LoraSettings(lora_rank=4), seed=1, base=str(base))
    generator = torch.Generator().manual_seed(3)
    for parameter in lora.adapter_parameters(model).values():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return lora.write_adapter(tmp_path_factory.mktemp("kept") / "adapter", model, fingerprint)


def logits(model: Any) -> torch.Tensor:
    with cpu_kernels(), torch.no_grad():
        return model(input_ids=torch.tensor([TEXT])).logits


def scored(path: Path, adapter: Path | None = None) -> float:
    found = find_model(str(path), adapter=None if adapter is None else str(adapter))
    return load_evaluated(found).likelihoods([(TEXT[:9], TEXT[9:])])[0].log_prob


def test_merged_it_is_a_model_that_every_command_takes(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"adapter={adapter}", f"out={tmp_path / 'merged'}"]) == 0
    assert "merged into its model" in capsys.readouterr().out
    info = open_model(tmp_path / "merged", key="model")
    assert info.has_weights and AutoTokenizer.from_pretrained(tmp_path / "merged").vocab_size
    unmerged: Any = load_model(base)
    lora.apply_adapter(unmerged, lora.open_adapter(adapter))
    torch.testing.assert_close(logits(load_model(tmp_path / "merged")), logits(unmerged), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(load_model(base)), logits(unmerged), rtol=1e-2, atol=1e-2)
    assert scored(base, adapter) == pytest.approx(scored(tmp_path / "merged"), rel=1e-5)
    assert scored(base) != pytest.approx(scored(base, adapter), rel=1e-3)
    looked = load_actor(str(base), open_model(base), lora.open_adapter(adapter))
    assert torch.equal(logits(looked), logits(unmerged))


def test_the_dtype_of_the_files_stays(adapter: Path, base: Path, tmp_path: Path) -> None:
    half: Any = load_model(base, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    shutil.copytree(adapter, tmp_path / "adapter")
    note = json.loads((tmp_path / "adapter" / "refine_adapter.json").read_text())
    assert note["base"]["sha256"] == lora.base_fingerprint(half)  # the same weights, rounded
    for given, expected in (([], torch.bfloat16), (["dtype=float32"], torch.float32)):
        out = tmp_path / f"merged{len(given)}"
        assert main([f"adapter={tmp_path / 'adapter'}", f"model={tmp_path / 'half'}", f"out={out}", *given]) == 0
        assert open_model(out).config.dtype == expected


def test_what_cannot_be_merged(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_model(tmp_path / "other", seed=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    out = tmp_path / "merged"
    moved = shutil.copytree(adapter, tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "base"}))
    monkeypatch.setattr(loading, "why_not", lambda _: "there is no network")
    monkeypatch.chdir(tmp_path)
    for arguments, said in (
        ([f"adapter={adapter}", f"out={out}", f"model={other}"], "trained on other weights"),
        ([f"adapter={adapter}", f"out={tmp_path / 'full'}"], "is there already"),
        ([f"adapter={tmp_path / 'full'}", f"out={out}"], "has no adapter_config.json"),
        ([f"adapter={adapter}", f"out={out}", "model=nowhere/at/all"], "no such directory"),
        ([f"adapter={adapter}"], "out: needs a value"),
        ([f"adapter={moved}", f"out={out}"], "it names its model 'base', which is no directory here"),
    ):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured
        assert said in captured.err or said == "out: needs a value"
        assert not out.exists()

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("refine_verl.export.merging.put_in_place", full)
    assert main([f"adapter={adapter}", f"out={out}"]) == 2
    assert "no space left" in capsys.readouterr().err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["full", "moved", "other"]


def test_an_adapter_names_a_directory_by_its_whole_path(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of `refine_verl.adapt`, and of runs: which begin one, or go on from one whose base has moved."""
    monkeypatch.chdir(base.parent)
    model = load_model(base.name)
    with refine_verl.adapt(model, [list(range(16))], {"lora_rank": 2, "method": "sft"}) as adapted:
        kept = adapted.save(tmp_path / "adapter")
    named = [lora.open_adapter(kept).base, _named(_built(Path(base.name), lora_rank=2))]
    config = json.loads((kept / "adapter_config.json").read_text())
    (kept / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "gone"}))
    named.append(_named(_built(Path(base.name), lora_rank=2, lora_adapter_path=str(kept))))
    assert named == [str(base)] * 3
    unknown: Any = load_model(base)
    lora.add_adapters(unknown, LoraSettings(lora_rank=2), seed=0, base="someone/model")
    assert _named(unknown) == "someone/model"


def _named(model: Any) -> str:
    return str(model.peft_config["default"].base_model_name_or_path)


def test_other_commands_refuse_an_adapter_of_another_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path, seed=2)
    with pytest.raises(ModelError, match="trained on other weights"):
        scored(other, adapter)
    with pytest.raises(ModelError, match="trained on other weights"):
        load_actor(str(other), open_model(other), lora.open_adapter(adapter))
    with pytest.raises(DataError, match="adapter: .* is no directory"):
        find_model(str(base), adapter=str(tmp_path / "none"))
    found = find_model(str(base), adapter=str(adapter))
    with pytest.raises(ConfigError, match="beside the one of adapter="):
        load_evaluated(found, ttt=ttt_settings("sft", {"lora_rank": 2}))


# Runs


@pytest.fixture
def composed(base: Path, tmp_path: Path) -> Iterator[Any]:
    register_configs()

    def make(*overrides: str) -> Any:
        keys = [f"model.path={base}", "data.train_files=[a]", f"trainer.default_local_dir={tmp_path}", *overrides]
        return validate(compose_config(["recipe=midtrain", *keys]))

    yield make
    HydraConfig.instance().cfg = None


MODEL = "actor_rollout_ref.model"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((f"{MODEL}.lora_alpha=32",), "lora_alpha: 32 would have no effect: there are no adapters with .*lora_rank=0"),
        ((f"{MODEL}.target_modules=[q_proj]",), "would have no effect: there are no adapters"),
        ((f"{MODEL}.lora_adapter_path=x",), "would have no effect: there are no adapters"),
        (
            (f"{MODEL}.lora.rank=8",),
            r"lora.rank: 8 is not supported: .*Megatron.*Set actor_rollout_ref.model.lora_rank",
        ),
        ((f"{MODEL}.lora_rank=-1",), "lora_rank: must be at least 0"),
        ((f"{MODEL}.lora_rank=4", f"{MODEL}.target_modules='('"), "no regular expression"),
        (
            (f"{MODEL}.lora_rank=4", "actor_rollout_ref.actor.checkpoint.save_contents=[model,hf_model]"),
            "save_contents: hf_model would write layers under the names they have with adapters",
        ),
        (("refine.ttt.keep=x",), "refine.ttt: has no effect with refine.phase=documents"),
    ],
)
def test_keys_that_a_run_refuses(composed: Any, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        composed(*overrides)


def test_keeping_needs_adapters(base: Path, tmp_path: Path) -> None:
    register_configs()
    keys = ["recipe=ttt", f"model.path={base}", "data.val_files=[a]", f"trainer.default_local_dir={tmp_path}"]
    with pytest.raises(ConfigError, match="refine.ttt.keep: .*Set lora_rank=16"):
        validate(compose_config([*keys, "refine.ttt.keep=adapters"]))
    with pytest.raises(ConfigError, match="refine.ttt.keep: /dev/null/x: /dev/null is no directory"):
        validate(compose_config([*keys, "refine.ttt.keep=/dev/null/x", f"{MODEL}.lora_rank=4"]))
    valid = validate(compose_config([*keys, "refine.ttt.keep=adapters", f"{MODEL}.lora_rank=4"]))
    assert valid.refine.ttt.keep == valid.config.refine.ttt.keep == str(Path("adapters").absolute())
    HydraConfig.instance().cfg = None


def test_what_a_run_checks_of_the_model(composed: Any, base: Path, adapter: Path, tmp_path: Path) -> None:
    info = open_model(base)
    check_adapters(composed(f"{MODEL}.lora_rank=4"), info)
    with pytest.raises(ConfigError, match="no linear layer is called 'q'. There are q_proj, "):
        check_adapters(composed(f"{MODEL}.lora_rank=4", f"{MODEL}.target_modules=[q]"), info)
    with pytest.raises(ConfigError, match="has the rank 4. Set lora_rank=4"):
        check_adapters(composed(f"{MODEL}.lora_rank=8", f"{MODEL}.lora_adapter_path={adapter}"), info)
    going_on = (f"{MODEL}.lora_rank=4", f"{MODEL}.lora_adapter_path={adapter}")
    check_adapters(composed(*going_on), info)
    with pytest.raises(ConfigError, match="lora_alpha: 8 has no effect with lora_adapter_path"):
        check_adapters(composed(*going_on, f"{MODEL}.lora_alpha=8"), info)
    shutil.copy(base / "config.json", tmp_path / "config.json")
    from refine_verl.models import inspect_model

    with pytest.raises(ConfigError, match="lora_rank: 4 trains adapters of a model, and this one has random weights"):
        check_adapters(composed(f"{MODEL}.lora_rank=4"), inspect_model(tmp_path))


def test_a_checkpoint_with_other_adapters_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "actor").mkdir()
    _check_adapters(tmp_path, LoraSettings())
    with pytest.raises(ConfigError, match="has no adapters"):
        _check_adapters(tmp_path, LoraSettings(lora_rank=4))
    (tmp_path / "actor" / "lora_train_meta.json").write_text('{"r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM"}')
    _check_adapters(tmp_path, LoraSettings(lora_rank=4))
    for other in (LoraSettings(), LoraSettings(lora_rank=8), LoraSettings(lora_rank=4, lora_alpha=8)):
        with pytest.raises(ConfigError, match="has adapters of rank 4 and alpha 16"):
            _check_adapters(tmp_path, other)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"target_modules": ["q_proj", "o_proj"]}, {"q_proj", "o_proj"}),
        ({"target_modules": r".*\.attn\..*", "exclude_modules": ["b_proj"]}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_which_layers_a_worker_trains(base: Path, keys: dict[str, Any], expected: set[str]) -> None:
    module = _built(base, lora_rank=4, **keys)
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert {name.partition(".lora_")[0].rpartition(".")[2] for name in names} == expected
    assert all("lora_" in name for name in names)


def test_a_worker_goes_on_from_an_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    module = _built(base, lora_rank=4, lora_adapter_path=str(adapter))
    stored = lora.open_adapter(adapter)
    found = lora.adapter_parameters(module)
    assert found.keys() == stored.tensors.keys()
    assert all(torch.equal(found[name], value) and found[name].requires_grad for name, value in stored.tensors.items())
    assert {name for name, each in module.named_parameters() if each.requires_grad} == {
        name for name, _ in module.named_parameters() if "lora_" in name
    }
    with pytest.raises(ModelError, match="lora_adapter_path=.*trained on other weights"):
        _built(make_model(tmp_path, seed=2), lora_rank=4, lora_adapter_path=str(adapter))


def _built(base: Path, **keys: Any) -> Any:
    """What the engine makes of a model before it is sharded."""
    engine: Any = RefineEngine.__new__(RefineEngine)
    engine.model_config, engine.seed, engine.rank = SimpleNamespace(path=str(base), **keys), 1, 0
    module = engine._build_lora_module(make_actor(load_model(base)))
    assert engine.base_fingerprint == lora.base_fingerprint(load_model(base))
    return module
