"""LoRA adapters: their gradients are those of plain algebra, they alone are trained, and they can be kept."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from reference.hybrid import hybrid_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

import refine_verl
from refine_verl.adaptation import training
from refine_verl.adaptation.guard import SavedModel
from refine_verl.config import ConfigError, DataError, LoraSettings, ModelError
from refine_verl.kernels import cpu_kernels
from refine_verl.models import FastWeightActor, load_model, lora, make_actor
from refine_verl.models.lora import files

from .conftest import CONFIG, bits, build, fingerprint, prompts

LORA: dict[str, Any] = {**CONFIG, "lora_rank": 3, "lora_alpha": 6}
ONLY = LoraSettings(lora_rank=3, lora_alpha=6)


def logits(model: Any, row: Tensor) -> Tensor:
    with cpu_kernels(), torch.no_grad():
        return model(input_ids=row[None]).logits


def filled(model: Any, seed: int = 5) -> None:
    """Adapters that change something: half of them begin at zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora.adapter_parameters(model).values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)


@pytest.mark.parametrize("kind", ["none", "layer", "segment"])
def test_gradients_are_those_of_the_merged_weights(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """d loss / d A and d B, where the weight is W + s B A by plain autograd, on the same rollouts."""
    seen: list[tuple[Any, Any, list[Tensor | None], dict[str, Tensor]]] = []
    gradients = training.Loop.gradients

    def watched(loop: Any, documents: Any, written: Any, *how: Any) -> Any:
        if not seen:
            filled(loop.actor)
            values = {name: each.detach().clone() for name, each in lora.adapter_parameters(loop.actor).items()}
            found = gradients(loop, documents, written, *how)
            copies = [None if each is None else each.clone() for each in found[0]]  # they are clipped in place
            seen.append((documents, written, copies, values))
            return found
        return gradients(loop, documents, written, *how)

    monkeypatch.setattr(training.Loop, "gradients", watched)
    model = build(family, torch.float64)
    settings = {**LORA, "mini_batch_size": 5, "activation_checkpointing": kind}
    with refine_verl.adapt(model, prompts(), settings) as adapted:
        names = list(lora.adapter_parameters(adapted.model))
        trained = [name for name, each in adapted.model.named_parameters() if each.requires_grad]
    documents, written, found, values = seen[0]
    got = dict(zip(names, found, strict=True))
    assert len(trained) == len(names) and all("lora_" in name for name in trained)

    plain = build(family, torch.float64).requires_grad_(False)
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    merged = {}
    for layer in {name.removesuffix(".lora_A.weight") for name in leaves if "lora_A" in name}:
        weight = f"{layer.removeprefix('base_model.model.')}.weight"
        product = leaves[f"{layer}.lora_B.weight"] @ leaves[f"{layer}.lora_A.weight"]
        merged[weight] = plain.get_parameter(weight) + 2.0 * product  # alpha / rank
    actor = make_actor(plain)

    class Merged(nn.Module):
        """The same loss with these weights."""

        def __init__(self) -> None:
            super().__init__()
            self.actor = actor

        def forward(self) -> Tensor:
            loop = training.Loop.__new__(training.Loop)
            loop.actor, loop.settings = actor, adapted.settings
            run = lambda **how: FastWeightActor.forward(actor, **how)  # noqa: E731
            loop.model_step = training.Step(run, adapted.settings.nsp, 0, read_together=1)
            total = torch.zeros((), dtype=torch.float64)
            nsp = adapted.settings.nsp
            for part, rollouts in training.in_parts(documents, written, 1):
                loss, _ = loop.model_step.loss(
                    part,
                    rollouts,
                    adapted.settings.loss,
                    policy_loss=functools.partial(training.ppo_clip_loss, clip_ratio=adapted.settings.clip_ratio),
                    global_tokens=documents.predicted,
                    global_rollouts=len(documents) * nsp.chunks * nsp.rollouts_per_position,
                )
                total = total + loss
            return total

    with cpu_kernels():
        training.set_training(actor, True)
        loss = functional_call(Merged(), {f"actor.{name}": value for name, value in merged.items()}, ())
        wanted = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    for name in names:
        assert got[name] is not None, name
        difference = (got[name] - wanted[name]).norm() / wanted[name].norm()
        assert difference < 1e-9, (name, difference)
    # the control: gradients of the two halves are no accident of scale
    assert max((got[name] - 0.5 * wanted[name]).norm() / wanted[name].norm() for name in names) > 0.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_everything_comes_back_and_no_weight_ever_changed(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype)
    model.train()
    model.model.layers[0].requires_grad_(False)
    before = fingerprint(model)
    with refine_verl.adapt(model, prompts(), LORA) as adapted:
        inside = dict(model.named_parameters())
        weights = {n.replace(".base_layer", ""): bits(each) for n, each in inside.items() if "lora_" not in n}
        adapters = {name: each.dtype for name, each in inside.items() if "lora_" in name}
        moved = [name for name, each in inside.items() if "lora_B" in name and each.any()]
        answers = adapted.generate(max_new_tokens=3)
    assert weights == {n.removesuffix(":bits"): value for n, value in before.items() if n.endswith(":bits")}
    assert set(adapters.values()) == {torch.float32 if dtype == torch.bfloat16 else dtype}
    assert len(moved) == len(adapters) // 2 and len(answers) == 5  # every adapter has learned something
    after = fingerprint(model)
    assert sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n)) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_everything_comes_back_after_an_error(error: type[BaseException]) -> None:
    model = build()
    before = fingerprint(model)
    with pytest.raises(error), refine_verl.adapt(model, prompts(), LORA):
        raise error
    assert fingerprint(model) == before


def test_a_snapshot_is_a_small_part_of_a_full_one() -> None:
    """What is kept to go back to: nothing of the weights; of the small model's full copy all of it."""

    def copied(**how: Any) -> int:
        saved = SavedModel(model)
        saved.save("cpu", **how)
        size = sum(0 if each.copy is None else each.copy.nbytes for each in saved._parameters)
        saved.restore()
        return size

    model = build()
    assert copied() == sum(each.nbytes for each in model.parameters()) and copied(fixed=True) == 0


def test_the_same_seed_gives_the_same_adapters() -> None:
    found = []
    for seed in (0, 0, 1):
        model = build()
        torch.manual_seed(seed + len(found))
        with refine_verl.adapt(model, prompts(), {**LORA, "seed": seed}) as adapted:
            found.append({name: bits(each) for name, each in lora.adapter_parameters(adapted.model).items()})
    assert found[0] == found[1] != found[2]


# Files


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_kept_adapters_are_peft_s(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The same logits from PEFT's own loader, from ours and, to rounding, from merged weights."""
    model, row = build(family, dtype), prompts()[0]
    with refine_verl.adapt(model, prompts(), LORA) as adapted:
        written = adapted.save(tmp_path / "kept")
        wanted = logits(adapted.model, row)
    assert sorted(each.name for each in written.iterdir()) == sorted((files.CONFIG, files.WEIGHTS, files.NOTE))
    theirs = peft.PeftModel.from_pretrained(build(family, dtype), str(written))
    assert torch.equal(logits(theirs, row), wanted)
    ours = build(family, dtype)
    lora.apply_adapter(ours, lora.open_adapter(written))
    assert torch.equal(logits(ours, row), wanted)
    assert {name for name, each in ours.named_parameters() if not each.requires_grad} == {
        name for name, _ in ours.named_parameters() if "lora_" in name
    }
    merged = lora.merge_adapter(build(family, dtype), lora.open_adapter(written))
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in build(family).named_parameters()]
    if dtype == torch.float64:
        torch.testing.assert_close(logits(merged, row), wanted, rtol=1e-9, atol=1e-9)
    assert not torch.equal(logits(model, row), wanted)  # the control


def test_an_adapter_goes_to_its_base_in_any_dtype_and_to_no_other(tmp_path: Path) -> None:
    model = build()
    with refine_verl.adapt(model, prompts(), LORA) as adapted:
        adapted.save(tmp_path)
    for dtype in (torch.float64, torch.bfloat16):
        lora.apply_adapter(build(dtype=dtype), lora.open_adapter(tmp_path))
    trained = build()
    trained.model.layers[1].attn.q_proj.weight.data[0, 0] += 0.1
    with pytest.raises(ModelError, match="other weights"):
        lora.apply_adapter(trained, lora.open_adapter(tmp_path))
    with pytest.raises(ModelError, match="other weights"):
        lora.merge_adapter(trained, lora.open_adapter(tmp_path))
    with pytest.raises(ModelError, match="trained on a delta_net, and the model is a gated_deltanet"):
        lora.apply_adapter(build("gated_deltanet"), lora.open_adapter(tmp_path))


def test_peft_s_own_directories_are_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    theirs.save_pretrained(str(tmp_path))
    ours = build()
    lora.apply_adapter(ours, lora.open_adapter(tmp_path))
    assert "was not written by refine_verl" in caplog.text
    assert torch.equal(logits(ours, prompts()[0]), logits(theirs, prompts()[0]))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with refine_verl.adapt(build(), prompts(), LORA) as adapted:
        return adapted.save(tmp_path_factory.mktemp("kept") / "adapter")


def _cut(directory: Path) -> None:
    (directory / files.WEIGHTS).write_bytes((directory / files.WEIGHTS).read_bytes()[:-8])


def _alter(directory: Path) -> None:
    tensors = load_file(directory / files.WEIGHTS)
    save_file({name: each + 1 for name, each in tensors.items()}, directory / files.WEIGHTS)


def _changed(**values: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        content = json.loads((directory / files.CONFIG).read_text())
        (directory / files.CONFIG).write_text(json.dumps({**content, **values}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "cut off or was altered"),
        (_alter, "cut off or was altered"),
        (lambda at: (at / files.WEIGHTS).unlink(), "as a pickle .* are not read"),
        (lambda at: (at / files.CONFIG).unlink(), "has no adapter_config.json"),
        (lambda at: (at / files.CONFIG).write_text("{"), "cannot be read"),
        (lambda at: (at / files.NOTE).write_text("{}"), "cut off or was altered"),
        (_changed(peft_type="IA3"), "LoRA is what can be read"),
        (_changed(modules_to_save=["lm_head"]), "whole layers"),
    ],
)
def test_files_that_cannot_be_used(kept: Path, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    directory = tmp_path / "adapter"
    directory.mkdir()
    for file in kept.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    lora.open_adapter(directory)
    damage(directory)
    with pytest.raises(DataError, match=message):
        lora.open_adapter(directory)


def test_layers_that_the_model_does_not_have(kept: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    for name in (files.CONFIG, files.WEIGHTS):
        (tmp_path / "adapter" / name).write_bytes((kept / name).read_bytes())
    adapter = lora.open_adapter(tmp_path / "adapter")
    with pytest.raises(ModelError, match="has no linear layer model.layers.1.attn.b_proj"):
        lora.apply_adapter(build(num_hidden_layers=1), adapter)
    with pytest.raises(ModelError, match="shapes are not those"):
        lora.apply_adapter(build(hidden_size=64), adapter)


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refine_verl.adapt(build(), prompts(), LORA) as adapted:
        directory = adapted.save(tmp_path / "kept")
        before = {each.name: each.read_bytes() for each in directory.iterdir()}

        def full(*_: Any, **__: Any) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(files, "save_file", full)
        with pytest.raises(OSError, match="no space"):
            adapted.save(directory)
        assert {each.name: each.read_bytes() for each in directory.iterdir()} == before
        assert [each.name for each in tmp_path.iterdir()] == ["kept"]
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").touch()
        with pytest.raises(ConfigError, match="is no adapter"):
            adapted.save(tmp_path / "mine")
    with pytest.raises(RuntimeError, match="block has ended"):
        adapted.save(tmp_path / "late")
    with refine_verl.adapt(build(), prompts(), CONFIG) as adapted, pytest.raises(ConfigError, match="no adapter to"):
        adapted.save(tmp_path / "none")


# Refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_prj"]}, "no linear layer is called 'q_prj'. There are q_proj, .*Did you mean 'q_proj'"),
        ({"target_modules": ["lm_head"]}, "lm_head can have no adapter: it is computed in chunks"),
        ({"target_modules": ["down_proj"]}, "past the layer itself.*fuse_swiglu=false"),
        ({"target_modules": "attn.q_proj"}, "matches no linear layer as a whole"),
        ({"target_modules": "("}, "no regular expression"),
        ({"target_modules": []}, "empty list"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["attn.q_proj"]}, "no linear layer is left"),
        ({"exclude_modules": ["q"]}, "adapt.exclude_modules: no linear layer is called 'q'"),
        ({"lora_rank": 0}, "lora_alpha: 6 has no effect with lora_rank=0"),
        ({"lora_rank": -1}, "at least 0"),
        ({"method": "none"}, "no effect with method=none"),
    ],
)
def test_what_cannot_be_adapted(settings: dict[str, Any], message: str) -> None:
    model = build()
    before = fingerprint(model)
    with pytest.raises(ConfigError, match=message):
        refine_verl.adapt(model, prompts(), {**LORA, **settings})
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"q_proj", "k_proj", "v_proj", "b_proj", "o_proj", "gate_proj", "up_proj"}),
        ({"exclude_modules": r".*\.mlp\..*"}, {"q_proj", "k_proj", "v_proj", "b_proj", "o_proj"}),
        ({"target_modules": r".*\.1\.attn\.[qk]_proj"}, {"q_proj", "k_proj"}),
        ({"target_modules": ["attn.o_proj", "up_proj"]}, {"o_proj", "up_proj"}),
    ],
)
def test_which_layers_get_an_adapter(settings: dict[str, Any], expected: set[str]) -> None:
    names = lora.target_names(build(), LoraSettings(lora_rank=2, **settings))
    assert {name.rpartition(".")[2] for name in names} == expected


def test_an_unfused_mlp_is_adapted_as_a_whole() -> None:
    model = build(fuse_swiglu=False)
    assert "model.layers.0.mlp.down_proj" in lora.target_names(model, ONLY)


def test_a_model_with_adapters_is_trained_as_it_is(kept: Path) -> None:
    model = build()
    lora.apply_adapter(model, lora.open_adapter(kept), trains=True)
    with pytest.raises(ModelError, match="has adapters already.*what has requires_grad is trained, the adapters or"):
        refine_verl.adapt(model, prompts(), LORA)
    assert changed_by_adapt(model) == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_beside_fixed_adapters_the_weights_of_the_model_are_trained(kept: Path) -> None:
    """As in `evaluate adapter=DIR ttt=refine`."""
    model = build()
    lora.apply_adapter(model, lora.open_adapter(kept))
    changed = changed_by_adapt(model)
    assert any(".base_layer." in name for name in changed) and not any("lora_" in name for name in changed)


def changed_by_adapt(model: Any) -> set[str]:
    """Names of the parameters that differ inside the block; afterwards none does."""
    before = fingerprint(model)
    with refine_verl.adapt(model, prompts(), CONFIG) as adapted:
        changed = {n for n, each in adapted.model.named_parameters() if bits(each) != before[f"{n}:bits"]}
    assert fingerprint(model) == before
    return changed


def test_a_state_of_an_adapted_model_belongs_to_model_and_adapter(tmp_path: Path) -> None:
    """Read inside the block, asked later of the same model with the kept adapter; without it refused."""
    documents, questions = [list(range(40))], [[3, 4]]
    with refine_verl.adapt(build(), prompts(), LORA) as adapted:
        memory = refine_verl.remember(adapted.model, documents)
        wanted = memory.ask(questions, max_new_tokens=5, stop_tokens=())[0]
        memory.save(tmp_path / "states")
        adapted.save(tmp_path / "adapter")
    with pytest.raises(ModelError, match="weights have changed"):
        memory.ask(questions, max_new_tokens=5)
    with pytest.raises(ModelError, match="other weights"):
        refine_verl.remember.load(tmp_path / "states", build())
    model = build()
    lora.apply_adapter(model, lora.open_adapter(tmp_path / "adapter"))
    again = refine_verl.remember.load(tmp_path / "states", model).ask(questions, max_new_tokens=5, stop_tokens=())[0]
    assert torch.equal(again.tokens, wanted.tokens) and torch.equal(again.log_probs, wanted.log_probs)


@pytest.mark.parametrize("kind", ["olmo_hybrid", "qwen3_next"])
def test_hybrids(kind: str, tmp_path: Path) -> None:
    """Layers of attention get adapters, too. In Qwen3-Next PEFT would take those of an MLP for the experts'."""

    def make() -> Any:
        return load_model(None, config=hybrid_config(kind), dtype=torch.float64, seed=1)

    model, row = make(), prompts()[0]
    before = fingerprint(model)
    with refine_verl.adapt(model, prompts(), {**LORA, "activation_checkpointing": "layer"}) as adapted:
        parameters = lora.adapter_parameters(adapted.model)
        assert all(each.any() for each in parameters.values())
        adapted.save(tmp_path)
        wanted = logits(adapted.model, row)
    names = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in parameters}
    assert {"q_proj", "o_proj"} <= names and ("down_proj" in names) == (kind == "olmo_hybrid")
    assert "lm_head" not in names
    assert fingerprint(model) == before
    theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path))
    assert torch.equal(logits(theirs, row), wanted) and not torch.equal(logits(make(), row), wanted)
