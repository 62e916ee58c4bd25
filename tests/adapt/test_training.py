"""Adapting does what the paper's four steps say, whatever the batch, the precision and the caller's context are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from reference.adaptation import adapt_slowly
from reference.toy import relative
from torch import Tensor

import refine_verl
from refine_verl.adaptation import AdaptSettings, Prompts
from refine_verl.adaptation.guard import TemporaryActor
from refine_verl.adaptation.settings import read_settings
from refine_verl.adaptation.training import Loop
from refine_verl.models import Documents
from refine_verl.models.step import Rollouts, in_parts

from .conftest import CONFIG, build, prompts

# rewards are rounded to float32, which AdamW amplifies where a gradient is close to 0; what is wrong is off by more
# than 1e-4
RELATIVE = 2e-6


CREDIT = {"nsp": {**CONFIG["nsp"], "credit": "token"}}


def weights(model: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])


def adapted_weights(model: torch.nn.Module, rows: Any, config: Any) -> tuple[Tensor, list[dict[str, float]]]:
    with refine_verl.adapt(model, rows, config) as adapted:
        return weights(adapted.model), adapted.history


def settings_of(**values: Any) -> AdaptSettings:
    return read_settings({**CONFIG, "lr": 1e-3, **values})


@pytest.mark.parametrize(
    ("micro_batch_size", "checkpointing", "credit"),
    [(1, "none", "rollout"), (3, "none", "token"), (1, "segment", "token"), (3, "segment", "rollout")],
)
def test_equals_recomputing_every_prefix(family: str, micro_batch_size: int, checkpointing: str, credit: str) -> None:
    rows = prompts()
    nsp = {**CONFIG["nsp"], "credit": credit}
    settings = settings_of(steps=2, micro_batch_size=micro_batch_size, activation_checkpointing=checkpointing, nsp=nsp)
    start = weights(build(family, torch.float64))
    got, history = adapted_weights(build(family, torch.float64), rows, settings)
    slow = build(family, torch.float64)
    losses = adapt_slowly(slow, rows, settings_of(steps=2, nsp={**nsp, "rollout": "prefix"}))
    assert relative(got - start, weights(slow) - start) < RELATIVE
    assert [record["actor/loss"] for record in history] == pytest.approx(losses, rel=RELATIVE)
    assert [record["step"] for record in history] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("checkpointing", "credit"), [("none", "token"), ("layer", "rollout")])
def test_the_fused_step_equals_recomputing_every_prefix(family: str, checkpointing: str, credit: str) -> None:
    """All prompts in one mini-batch: with two, the second's rollouts are written after the first's step."""
    nsp = {**CONFIG["nsp"], "credit": credit}
    common = {"steps": 2, "mini_batch_size": 5}
    fused = settings_of(**common, nsp=nsp, on_policy=True, micro_batch_size=2, activation_checkpointing=checkpointing)
    start = weights(build(family, torch.float64))
    got, history = adapted_weights(build(family, torch.float64), prompts(), fused)
    slow = build(family, torch.float64)
    losses = adapt_slowly(slow, prompts(), settings_of(**common, nsp={**nsp, "rollout": "prefix"}))
    assert relative(got - start, weights(slow) - start) < RELATIVE
    assert [record["actor/loss"] for record in history] == pytest.approx(losses, rel=RELATIVE)
    halves, _ = adapted_weights(build(family, torch.float64), prompts(), settings_of(steps=2, mini_batch_size=3))
    assert relative(halves - start, weights(slow) - start) > 100 * RELATIVE


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"loss": {"rl_coef": 0.5}}, {"clip_grad": 0.5}, {"method": "sft"}, {"mini_batch_size": 3}, CREDIT],
    ids=lambda other: next(iter(other)),
)
def test_every_setting_matters(other: dict[str, Any]) -> None:
    """Negative control of the comparison above."""
    start = weights(build(dtype=torch.float64))
    one, _ = adapted_weights(build(dtype=torch.float64), prompts(), settings_of())
    two, _ = adapted_weights(build(dtype=torch.float64), prompts(), settings_of(**other))
    assert relative(one - start, two - start) > 100 * RELATIVE


def test_the_same_seed_gives_the_same_bits(family: str) -> None:
    torch.manual_seed(1)
    one, first = adapted_weights(build(family), prompts(), CONFIG)
    torch.manual_seed(2)
    two, second = adapted_weights(build(family), torch.nn.utils.rnn.unpad_sequence(*_padded()), CONFIG)
    assert torch.equal(one, two) and first == second


def _padded() -> tuple[Tensor, Tensor, bool]:
    rows = prompts()
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows]), True


def read(rows: list[Tensor]) -> tuple[Documents, tuple[int, ...]]:
    found = Prompts.read(rows, vocabulary=61, shortest=1, needs="")
    return found.documents(range(len(rows)), torch.device("cpu")), found.ids


def test_rollouts_do_not_depend_on_company_or_order() -> None:
    rows, model = prompts(), build()

    def write(chosen: list[Tensor], micro_batch_size: int) -> list[Rollouts]:
        settings = settings_of(micro_batch_size=micro_batch_size)
        with TemporaryActor(model, activation_checkpointing="none").active(0) as actor:
            documents, ids = read(chosen)
            written = Loop(actor, settings).write(1, documents, ids)
        return [rollouts for _, rollouts in in_parts(documents, written, 1) if rollouts is not None]

    together, backwards, alone = write(rows, 5), write(rows[::-1], 2)[::-1], [write([row], 1)[0] for row in rows]
    for one, *others in zip(together, backwards, alone, strict=True):
        for other in others:
            assert torch.equal(one["rollout_tokens"], other["rollout_tokens"])
            assert torch.equal(one["positions"], other["positions"])
            torch.testing.assert_close(one["advantages"], other["advantages"], rtol=1e-3, atol=1e-3)
    twice = write([rows[0], rows[0]], 2)
    assert not torch.equal(twice[0]["rollout_tokens"], twice[1]["rollout_tokens"])  # equal prompts draw for themselves


@pytest.mark.parametrize("group", ["sequence", "position"])
@pytest.mark.parametrize("credit", ["rollout", "token"])
@pytest.mark.parametrize("divide", [True, False])
def test_advantages_are_the_trainers(group: str, divide: bool, credit: str) -> None:
    from omegaconf import OmegaConf

    from refine_verl.workers.advantage import compute_advantages

    settings = settings_of(nsp={**CONFIG["nsp"], "group": group, "credit": credit}, norm_adv_by_std_in_grpo=divide)
    with TemporaryActor(build(), activation_checkpointing="none").active(0) as actor:
        written = Loop(actor, settings).write(1, *read(prompts()))
    rewards = written["rewards"]
    algorithm = OmegaConf.create({"adv_estimator": "grpo", "norm_adv_by_std_in_grpo": divide})
    wanted = compute_advantages(written, settings.nsp, algorithm)
    assert wanted.abs().max() > 0.1 * rewards.std()
    torch.testing.assert_close(written["advantages"], wanted, rtol=1e-6, atol=1e-7)


def test_the_gradient_is_that_of_verls_policy_loss() -> None:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig

    def verls(
        log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *, global_rollouts: int
    ) -> Any:
        actor = ActorConfig(
            strategy="fsdp2",
            rollout_n=1,
            ppo_micro_batch_size_per_gpu=1,
            clip_ratio=0.2,
            clip_ratio_low=0.2,
            clip_ratio_high=0.2,
            global_batch_info={"dp_size": 1, "global_batch_size": global_rollouts},
        )
        return get_policy_loss_fn("vanilla")(
            old_log_prob=old_log_probs,
            log_prob=log_probs,
            advantages=advantages,
            response_mask=mask.to(log_probs.dtype),
            loss_agg_mode="seq-mean-token-mean",
            config=actor,
        )

    documents, ids = read(prompts())
    with TemporaryActor(build(dtype=torch.float64), activation_checkpointing="none").active(0) as actor:
        ours = Loop(actor, settings_of(loss={"sft_coef": 0.0}))
        written = ours.write(1, documents, ids)
        # off the policy that wrote, or the ratio would be 1 everywhere
        ours.step(*next(in_parts(documents, written, 2)))
        mine, metrics = ours.gradients(documents, written)
        ours.policy_loss = verls
        theirs, their_metrics = ours.gradients(documents, written)
    assert metrics["actor/ppo_kl"] != 0
    assert metrics["actor/pg_loss"] == pytest.approx(their_metrics["actor/pg_loss"], rel=1e-6)
    for got, wanted in zip(mine, theirs, strict=True):
        assert relative(got, wanted) < RELATIVE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_learns_in_float32(family: str, dtype: torch.dtype) -> None:
    """At the paper's learning rate no bf16 weight would ever change; the sums are those of a float32 model."""
    config = {**CONFIG, "lr": 1e-6}
    low = build(family, dtype)
    start = weights(low)
    got, history = adapted_weights(low, prompts(), config)
    wanted, same = adapted_weights(build(family, dtype).float(), prompts(), config)
    assert torch.equal(got, wanted) and history == same
    moved = got - start
    assert (moved != 0).double().mean() > 0.9
    # negative control: rounded to the model's precision, most of this would be gone
    rounded = (start + moved).to(dtype).double() - start
    assert (rounded != 0).double().mean() < 0.2


CONTEXTS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "none": nullcontext,
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_callers_context_does_not_enter(context: str) -> None:
    wanted, _ = adapted_weights(build(), prompts(), CONFIG)
    with CONTEXTS[context]():
        got, _ = adapted_weights(build(), prompts(), CONFIG)
    assert torch.equal(got, wanted)


def test_an_autocast_block_does_not_keep_adapted_weights() -> None:
    """Autocast caches bf16 copies of weights; ours change inside its block, twice."""
    model, row = build(), prompts()[0][None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(input_ids=row).logits
        with refine_verl.adapt(model, prompts(), CONFIG):
            inside = model(input_ids=row).logits
        after = model(input_ids=row).logits
    assert not torch.equal(before, inside) and torch.equal(before, after)


def test_methods(family: str) -> None:
    model = build(family)
    start = weights(model)
    none, empty = adapted_weights(model, [[1]], {**CONFIG, "method": "none"})
    assert torch.equal(none, start) and empty == []
    sft, history = adapted_weights(model, [[1, 2], [3, 4, 5]], {**CONFIG, "method": "sft"})
    assert not torch.equal(sft, start)
    assert "actor/pg_loss" not in history[0] and "nsp/reward/mean" not in history[0]
    zero, same = adapted_weights(model, prompts(), {**CONFIG, "loss": {"rl_coef": 0}})
    sft, history = adapted_weights(model, prompts(), {**CONFIG, "method": "sft"})
    assert torch.equal(zero, sft) and history == same


def test_metrics_have_the_names_of_training() -> None:
    _, history = adapted_weights(build(), prompts(), CONFIG)
    names = {"nsp/reward/std", "nsp/reward/min", "nsp/reward/max", "nsp/entropy/mean", "nsp/entropy/selected_mean"}
    assert names <= history[0].keys()
    assert not any(name.startswith("nsp/entropy_selected") for name in history[0])


def test_adapting_learns_the_prompt() -> None:
    model, rows = build(), prompts((40, 40))
    _, history = adapted_weights(model, rows, {**CONFIG, "steps": 20, "lr": 3e-3})
    assert history[-1]["actor/ntp_loss"] < 0.5 * history[0]["actor/ntp_loss"]
    assert history[-1]["nsp/reward_binary/mean"] > history[0]["nsp/reward_binary/mean"]
    assert all(record["actor/grad_norm"] > 0 and record["actor/skipped_updates"] == 0 for record in history)


def test_a_gradient_that_is_not_finite_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Loop.gradients
    calls: list[int] = []

    def spoiled(self: Loop, *arguments: Any) -> Any:
        gradients, metrics = original(self, *arguments)
        calls.append(1)
        return ([grad * float("nan") for grad in gradients] if len(calls) == 1 else gradients), metrics

    monkeypatch.setattr(Loop, "gradients", spoiled)
    got, history = adapted_weights(build(), prompts(), CONFIG)
    assert [record["actor/skipped_updates"] for record in history] == [1, 0, 0]
    assert got.isfinite().all()
