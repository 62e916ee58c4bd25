"""LaCT through the command line: a whole run on the CPU, and mid-training from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest
import torch
from reference.runs import TOY_LACT, read_steps, run_to_the_end, toy_overrides, write_corpus

LAST = 20


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lact_run")
    write_corpus(directory)
    more = [f"trainer.total_training_steps={LAST}", f"trainer.save_freq={LAST}"]
    more += ["refine.nsp.rollout_length={min:1,max:3,by:entropy}", "refine.nsp.credit=token"]
    overrides = toy_overrides(directory, directory / "run", *more, model=TOY_LACT)
    code, output = run_to_the_end(overrides, directory)
    assert code == 0, output[-4000:]
    return directory / "run"


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.runs
def test_a_run_on_the_cpu_learns(finished: Path) -> None:
    steps = read_steps(finished)
    assert list(steps) == list(range(LAST + 1))
    assert steps[LAST - 2]["val/ntp_accuracy"] > steps[0]["val/ntp_accuracy"] + 0.3
    assert steps[LAST - 2]["val/ntp_loss"] < 0.7 * steps[0]["val/ntp_loss"]
    early, late = (mean(steps[step]["nsp/reward/mean"] for step in some) for some in (range(3, 7), range(17, 21)))
    assert late > early
    lengths = [steps[step]["nsp/rollout_length/mean"] for step in range(3, LAST + 1)]
    assert all(1 <= length <= 3 for length in lengths) and len(set(lengths)) > 1
    assert not any(record.get("actor/skipped_updates") for record in steps.values())


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.runs
def test_what_it_exports_is_the_published_form(finished: Path) -> None:
    from reference.lact import parameter_shapes
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    import refine_verl.models  # noqa: F401  registers the model

    model, report = AutoModelForCausalLM.from_pretrained(finished / "model", output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    saved = load_file(finished / "model" / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in saved.items()} == parameter_shapes(model.config.to_dict())
    tokens = torch.arange(97, 123).repeat(3)[None, :60]  # the alphabet, over and over
    accuracy = (model(input_ids=tokens).logits[0, :-1].argmax(-1) == tokens[0, 1:]).float().mean()
    assert accuracy > 0.3


def test_mid_training_starts_from_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All checks of `recipe=midtrain model=lact_760m model.path=DIR`; the checkpoint's own configuration counts."""
    from transformers import AutoConfig

    from refine_verl.compose.composition import compose_config
    from refine_verl.compose.validate import validate
    from refine_verl.data.tokenizers import load_tokenizer
    from refine_verl.models import load_model
    from refine_verl.preflight.run import prepare_run

    write_corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    values = {"hidden_size": 32, "num_hidden_layers": 1, "num_attn_heads": 4, "num_lact_heads": 2, "ttt_nope": True}
    config = AutoConfig.for_model("lact_swiglu", vocab_size=257, lact_chunk_size=16, window_size=16, **values)
    load_model(None, config=config).save_pretrained(tmp_path / "checkpoint")
    load_tokenizer("bytes").save_pretrained(str(tmp_path / "checkpoint"))
    arguments = ["recipe=midtrain", "model=lact_760m", f"model.path={tmp_path / 'checkpoint'}"]
    data = [f"data.train_files={tmp_path / 'train.jsonl'}", f"data.cache_dir={tmp_path / 'cache'}"]
    smaller = ["data.train_batch_size=32", "data.min_length=32"]
    run = prepare_run(validate(compose_config([*arguments, *data, *smaller])))
    assert run.model.has_weights and run.model.model_type == "lact_swiglu"
    assert {name: getattr(run.model.config, name) for name in values} == values
    assert run.launch_config().actor_rollout_ref.model.path == str(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="ttt_nop"):
        typo = ["recipe=quickstart", "model=tiny_lact", "+model.config.ttt_nop=true", *data]
        prepare_run(validate(compose_config(typo)))
