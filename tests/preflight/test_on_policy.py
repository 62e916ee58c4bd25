"""What `refine.on_policy` and activation checkpointing per layer cannot do is refused before anything starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from reference.runs import environment

from refine_verl.compose.composition import compose_config, register_configs
from refine_verl.compose.validate import ValidConfig, validate
from refine_verl.config import ConfigError, NSPSettings
from refine_verl.models.adapters import FlaAdapter, get_adapter
from refine_verl.preflight.run import check_on_policy, check_reading, check_recomputed_layers, say_if_read_twice


def valid(*overrides: str) -> ValidConfig:
    register_configs()
    return validate(compose_config(["recipe=quickstart", "refine.on_policy=true", *overrides]))


@pytest.mark.parametrize("overrides", [(), ("algorithm.adv_estimator=rloo", "refine.nsp.rollouts_per_position=2")])
def test_what_compares_within_a_document_is_accepted(overrides: tuple[str, ...]) -> None:
    check_on_policy(valid(*overrides))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("actor_rollout_ref.actor.ppo_epochs=2",), r"ppo_epochs=2 asks for several passes.*Set ppo_epochs=1"),
        (
            ("algorithm.adv_estimator=reinforce_plus_plus",),
            r"adv_estimator=reinforce_plus_plus needs those of the whole batch\. Set algorithm\.adv_estimator=grpo",
        ),
    ],
)
def test_what_needs_more_than_a_micro_batch_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"refine\.on_policy: true .*{message}"):
        check_on_policy(valid(*overrides))


@pytest.mark.parametrize("kind", ["none", "layer", "segment"])
def test_what_saves_no_pass_is_said(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    say_if_read_twice(valid(f"model.activation_checkpointing={kind}"))
    assert ("saves no pass" in caplog.text) == (kind != "none")


@pytest.mark.parametrize(
    "override, message",
    [
        ("refine.nsp.rollout=prefix", r"refine\.on_policy: .*refine\.nsp\.rollout=prefix has none"),
        ("refine.loss.rl_coef=0", r"refine\.on_policy: true has no effect without rollouts"),
        (
            "refine.loss.old_log_probs=recomputed",
            r"refine\.loss\.old_log_probs: recomputed has no effect with refine\.on_p",
        ),
    ],
)
def test_settings_that_contradict_it_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        valid(override)


class OneMethod:
    """As little of an adapter as is needed."""

    run = FlaAdapter.run


def test_layers_that_are_not_known_are_refused() -> None:
    for known in ("delta_net", "lact_swiglu"):
        check_recomputed_layers(get_adapter(known))
    with pytest.raises(ConfigError, match=r"model\.activation_checkpointing: layer needs an adapter .*Set segment"):
        check_recomputed_layers(OneMethod())


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("refine.on_policy=true",), r"with refine\.on_policy=true and .*Leave it out, or set .*checkpointing=layer"),
        (("refine.loss.rl_coef=0", "refine.warmup_steps=0"), r"without rollouts from forked states\. Leave it out"),
        (("refine.nsp.rollout=prefix",), r"without rollouts from forked states\. Leave it out"),
    ],
)
def test_reading_in_segments_is_refused_where_nothing_is_read(overrides: tuple[str, ...], message: str) -> None:
    register_configs()
    base = ["recipe=quickstart", "model.reading=segments"]
    validate(compose_config(base))
    validate(compose_config([*base, "refine.on_policy=true", "model.activation_checkpointing=layer"]))
    with pytest.raises(ConfigError, match=rf"model\.reading: segments has no effect {message}"):
        validate(compose_config([*base, *overrides]))


def test_reading_in_segments_is_refused_where_nothing_else_is_done() -> None:
    traces = get_adapter("delta_net")
    check_reading("delta_net", traces, NSPSettings())
    with pytest.raises(ConfigError, match=r"model\.reading: segments does not show what .*selection=surprise"):
        check_reading("delta_net", traces, NSPSettings(selection="surprise"))
    with pytest.raises(ConfigError, match=r"model\.reading: segments has no effect: a delta_net is read in segments"):
        check_reading("delta_net", OneMethod(), NSPSettings())


@pytest.mark.slow
def test_nothing_is_started(tmp_path: Path) -> None:
    """The command's exit code is 2, and there is no run directory."""
    overrides = ["recipe=quickstart", "refine.on_policy=true", "actor_rollout_ref.actor.ppo_epochs=2"]
    run: Any = subprocess.run(
        [sys.executable, "-m", "refine_verl.main", *overrides, f"trainer.default_local_dir={tmp_path / 'run'}"],
        env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2 and "error: refine.on_policy: true writes new rollouts in every pass" in run.stderr
    assert not (tmp_path / "run").exists()
