"""Post-training and test-time training before a run starts: recipes, refusals, and data that cannot be scored."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from refine_verl.compose.composition import compose_config
from refine_verl.compose.phases import DOCUMENT_KEYS, PROMPT_KEYS
from refine_verl.compose.recipes import find_configs
from refine_verl.compose.schema import leaves
from refine_verl.compose.validate import ValidConfig, validate
from refine_verl.config import ConfigError, PromptSettings
from refine_verl.data import DataError
from refine_verl.preflight.prompts import prepare_prompt_splits

POSTTRAIN = ("recipe=posttrain", "model.path=DIR", "data.train_files=FILE")
TTT = ("recipe=ttt", "model.path=DIR", "data.val_files=FILE")
LOSS, MICRO = "actor_rollout_ref.actor.policy_loss.loss_mode", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"
MIDTRAIN = ("recipe=midtrain", "model.path=DIR", "data.train_files=FILE")


def composed(*overrides: str) -> ValidConfig:
    return validate(compose_config(list(overrides)), find_configs({}))


@pytest.mark.parametrize(
    ("recipe", "values"),
    [
        ("posttrain", (64, 16, 0.2, "hybrid", "posttrain", "refine", "sft")),
        ("posttrain_nested_sft", (64, 16, 0.2, "hybrid", "posttrain", "sft", "sft")),
        ("posttrain_sft", (64, 16, 0.2, "hybrid", "posttrain", "none", "sft")),
        ("ttt", (8, 4, 0.4, "binary", "ttt", "refine", "none")),
        ("ttt_sft", (8, 4, 0.4, "binary", "ttt", "sft", "none")),
    ],
)
def test_recipes_have_the_papers_values(recipe: str, values: tuple[Any, ...]) -> None:
    """Tab. 2 and D.1; lr, c, k and n as in mid-training."""
    files = TTT[1:] if recipe.startswith("ttt") else POSTTRAIN[1:]
    config = composed(f"recipe={recipe}", *files).config
    refine = config.refine
    found = (config.data.train_batch_size, refine.ppo_mini_batch_size, refine.loss.rl_coef, refine.nsp.reward)
    assert (*found, refine.phase, refine.inner, refine.outer) == values
    assert (refine.nsp.chunks, refine.nsp.rollout_length, refine.nsp.rollouts_per_position) == (8, 5, 1)
    assert refine.loss.sft_coef == 1 and config.actor_rollout_ref.actor.optim.lr == 1e-6
    assert config.data.max_prompt_length == 16384
    assert (refine.ttt.reset, refine.ttt.steps, refine.answers.convention) == ("batch", 1, "paper")


@pytest.mark.parametrize(
    ("base", "other", "files"),
    [
        ("posttrain", "posttrain_nested_sft", POSTTRAIN[1:]),
        ("posttrain", "posttrain_sft", POSTTRAIN[1:]),
        ("ttt", "ttt_sft", TTT[1:]),
    ],
)
def test_baselines_differ_in_one_word(base: str, other: str, files: tuple[str, ...]) -> None:
    mine, theirs = (dict(leaves(composed(f"recipe={name}", *files).config)) for name in (base, other))
    different = {key for key in mine if mine[key] != theirs.get(key)}
    assert {key for key in different if "experiment_name" not in key} == {"refine.inner", "trainer.default_local_dir"}


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ((*POSTTRAIN, "data.text_key=body"), "data.text_key"),
        ((*POSTTRAIN, "data.append_eos=true"), "data.append_eos"),
        ((*MIDTRAIN, "data.task=trec"), "data.task"),
        ((*MIDTRAIN, "data.overlong_prompts=left"), "data.overlong_prompts"),
        ((*MIDTRAIN, "refine.inner=sft"), "refine.inner"),
        ((*POSTTRAIN, "refine.outer=none"), "refine.outer"),
        (("recipe=posttrain", "model.path=DIR"), "data.train_files"),
        (("recipe=ttt", "model.path=DIR"), "data.val_files"),
        ((*TTT, "data.train_files=FILE"), "data.train_files"),
        ((*TTT, "trainer.total_training_steps=3"), "trainer.total_training_steps"),
        ((*TTT, "trainer.save_freq=5"), "trainer.save_freq"),
        ((*TTT, "trainer.test_freq=5"), "trainer.test_freq"),
        ((*TTT, "trainer.total_epochs=2"), "trainer.total_epochs"),
        ((*TTT, "trainer.val_only=true"), "trainer.val_only"),
        ((*TTT, "refine.ttt.reset=document"), "refine.ttt.reset"),
        ((*TTT, "refine.answers.convention=papers"), "refine.answers.convention"),
    ],
)
def test_refused_before_anything_starts(overrides: tuple[str, ...], key: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(key)):
        composed(*overrides)


def test_overlong_prompts_need_a_known_policy() -> None:
    with pytest.raises(ConfigError, match=r"data\.overlong_prompts: .*'center'"):
        composed(*POSTTRAIN, "data.overlong_prompts=center")


def test_a_question_is_looked_for_where_there_is_one() -> None:
    query = "refine.nsp.selection=query"
    with pytest.raises(ConfigError, match=r"refine\.nsp\.selection: query .* documents .* have none\. Set entropy or"):
        composed(*MIDTRAIN, query)
    for phase in (POSTTRAIN, TTT):
        assert composed(*phase, query, "refine.nsp.question_tokens=9").refine.nsp.question_tokens == 9
        assert composed(*phase, query, "data.overlong_prompts=middle").refine.nsp.selection == "query"
        with pytest.raises(ConfigError, match=r"data\.overlong_prompts: right cuts off .*refine\.nsp\.selection=query"):
            composed(*phase, query, "data.overlong_prompts=right")
        assert composed(*phase, "data.overlong_prompts=right").refine.nsp.selection == "entropy"


def test_where_workers_need_not_divide_a_mini_batch() -> None:
    assert composed(*TTT, "trainer.n_gpus_per_node=8").workers == 8
    with pytest.raises(ConfigError, match=r"refine\.ppo_mini_batch_size"):
        composed(*POSTTRAIN, "trainer.n_gpus_per_node=32")


def test_every_key_of_prompts_is_a_setting_and_can_be_set() -> None:
    data = composed(*POSTTRAIN).config.data
    assert {field.name for field in dataclasses.fields(PromptSettings)} <= set(data)
    assert set(DOCUMENT_KEYS) == {"text_key", "min_length", "long_documents", "append_eos"}
    of_rows = {"prompt_key", "answer_key", "task_key", "task", "id_key", "chat_template", "answer_separator"}
    lengths = {"max_answer_length", "overlong_prompts", "max_new_tokens"}
    assert set(PROMPT_KEYS) == of_rows | lengths | {"apply_chat_template_kwargs"}


# Data


def row(**values: Any) -> dict[str, Any]:
    return {"prompt": "a" * 40, "answer": ["b"], "task": "ruler_squadqa", **values}


def prepare(tmp_path: Path, recipe: str, rows: list[dict[str, Any]], *more: str) -> Any:
    from refine_verl.data.tokenizers import load_tokenizer

    file = tmp_path / "rows.jsonl"
    text = "".join(json.dumps(item) + "\n" for item in rows)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    split = "val" if recipe == "ttt" else "train"
    small = ("data.train_batch_size=4", "refine.ppo_mini_batch_size=4", f"trainer.default_local_dir={tmp_path / 'run'}")
    given = (f"data.{split}_files={file}", f"data.cache_dir={tmp_path / 'cache'}", "data.max_length=64", *small)
    valid = composed(f"recipe={recipe}", "model.path=DIR", *given, *more)
    return prepare_prompt_splits(valid, load_tokenizer("bytes"))


def test_the_test_set_is_all_that_test_time_training_reads(tmp_path: Path) -> None:
    train, validation = prepare(tmp_path, "ttt", [row() for _ in range(3)])
    assert train.path == validation.path and train.statistics.rows == 3


@pytest.mark.parametrize(
    ("values", "more", "message"),
    [
        ({"task": "squad"}, (), r"rows.jsonl, line 3.*unknown task 'squad'"),
        ({"task": None}, (), r"line 3: .*task"),
        ({"task": "class_match"}, (), r"line 3: .*all_classes"),
        ({"prompt": "short"}, (), r"5 tokens.*refine.nsp.chunks=8"),
        ({"prompt": "a" * 65}, (), r"data.max_prompt_length"),
        ({"answer": []}, (), r"(?s)answer"),
        ({"answer": "b" * 9}, ("data.max_answer_length=8",), r"data.max_answer_length"),
    ],
)
def test_rows_that_cannot_be_used_are_named(
    tmp_path: Path, values: dict[str, Any], more: tuple[str, ...], message: str
) -> None:
    rows = [row(), row(), row(**values), row()]
    with pytest.raises((ConfigError, DataError), match=message):
        prepare(tmp_path, "ttt", rows, *more)


def test_only_what_is_scored_needs_a_metric(tmp_path: Path) -> None:
    rows = [row(task="mine") for _ in range(4)]
    train, validation = prepare(tmp_path, "posttrain", rows)
    assert train.statistics.rows == 4 and validation is None
    with pytest.raises(ConfigError, match="data.train_files.*unknown task 'mine'"):
        prepare(tmp_path, "posttrain", rows, "refine.outer=grpo")


def test_a_batch_needs_as_many_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"3 prompts.*data.train_batch_size=4"):
        prepare(tmp_path, "posttrain", [row() for _ in range(3)])


def earlier_run(tmp_path: Path, config: DictConfig, prepared: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    config.data.val_files = [str(prepared)]
    OmegaConf.save(config, run / "config.yaml")
    (run / "predictions.jsonl").write_text('{"id": "a"}\n')
    return run


def test_answers_of_other_settings_are_not_gone_on_from(tmp_path: Path) -> None:
    rows = [row() for _ in range(3)]
    _, prepared = prepare(tmp_path, "ttt", rows)
    config = composed(*TTT, "data.train_batch_size=4", "refine.ppo_mini_batch_size=4", "data.max_length=64").config
    earlier_run(tmp_path, config, prepared.path)
    prepare(tmp_path, "ttt", rows)
    prepare(
        tmp_path, "ttt", rows, "trainer.n_gpus_per_node=2", "data.progress=false"
    )  # where and how it runs may change
    for changed in ("data.seed=7", "refine.ttt.steps=2", "refine.nsp.reward=cosine"):
        with pytest.raises(ConfigError, match=re.escape(changed.partition("=")[0])):
            prepare(tmp_path, "ttt", rows, changed)
        prepare(tmp_path, "ttt", rows, changed, "trainer.resume_mode=disable")
    with pytest.raises(ConfigError, match="other prompts"):
        prepare(tmp_path, "ttt", [*rows, row(prompt="c" * 40)])
    with pytest.raises(ConfigError, match=r"holds a run of refine\.phase=ttt"):
        prepare(tmp_path, "posttrain", [row() for _ in range(4)])


@pytest.mark.parametrize(
    "changes",
    [("lr_warmup_steps_ratio=0.1",), ("lr_warmup_steps=2",), ("lr_scheduler_type=cosine",)],
)
def test_a_learning_rate_that_starts_over_with_every_batch_does_not_move(changes: tuple[str, ...]) -> None:
    """verl's warm-up begins at 0: every batch would be adapted to with nothing."""
    overrides = [f"actor_rollout_ref.actor.optim.{change}" for change in changes]
    for others in ((), ("refine.ttt.reset=none", "refine.ttt.steps=2")):
        with pytest.raises(ConfigError, match="Leave lr_scheduler_type at constant, without warm-up"):
            composed(*TTT, *overrides, *others)
    composed(*TTT, *overrides, "refine.ttt.reset=none")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ((*MIDTRAIN, "refine.outer_mini_batch_size=16"), "refine.outer_mini_batch_size"),
        ((*TTT, "refine.outer_mini_batch_size=4"), "refine.outer_mini_batch_size"),
        ((*POSTTRAIN, "refine.outer_mini_batch_size=128"), "refine.outer_mini_batch_size"),
        ((*POSTTRAIN, "refine.outer_mini_batch_size=24"), "refine.outer_mini_batch_size"),
        ((*MIDTRAIN, "refine.loss.rl_coef=0", "refine.loss.old_log_probs=recomputed"), "refine.loss.old_log_probs"),
        ((*POSTTRAIN, "refine.inner=sft", "refine.loss.old_log_probs=recomputed"), "refine.loss.old_log_probs"),
        ((*MIDTRAIN, "refine.loss.rl_coef=0", "refine.nsp.end_tokens=suppressed"), "refine.nsp.end_tokens"),
        ((*POSTTRAIN, "refine.inner=none", "refine.nsp.end_tokens=suppressed"), "refine.nsp.end_tokens"),
        ((*MIDTRAIN, "refine.nsp.end_tokens=masked"), "refine.nsp.end_tokens"),
        ((*MIDTRAIN, f"{LOSS}=clip_cov"), LOSS),
        ((*MIDTRAIN, f"{LOSS}=kl_cov", f"{MICRO}=16"), LOSS),
        ((*POSTTRAIN, f"{LOSS}=kl_cov", "refine.outer=grpo", "refine.inner=none", f"{MICRO}=8"), LOSS),
    ],
)
def test_what_means_nothing_or_something_else_is_refused(overrides: tuple[str, ...], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        composed(*overrides)
    assert caught.value.key == key


def test_a_loss_that_ranks_tokens_has_all_of_them() -> None:
    one_worker = (f"{MICRO}=32", "trainer.n_gpus_per_node=1")
    assert composed(*MIDTRAIN, f"{LOSS}=kl_cov", *one_worker).workers == 1


def test_what_the_authors_do_can_be_set() -> None:
    refine = composed(
        *POSTTRAIN,
        "refine.outer_mini_batch_size=64",
        "refine.loss.old_log_probs=recomputed",
        "refine.nsp.end_tokens=suppressed",
    ).refine
    assert (refine.outer_mini_batch_size, refine.loss.old_log_probs) == (64, "recomputed")
    assert refine.nsp.end_tokens == "suppressed"
