"""One rank, two ranks, other micro-batches: the same rollouts, the same gradients. And updates that must not happen."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference.ranks import LENGTHS
from reference.toy import relative
from torch import Tensor

pytestmark = [pytest.mark.slow, pytest.mark.dist]

Ranks = dict[int, dict[str, Any]]
PASSES = "perf/forward_tokens_per_token"
# float32 sums in another order
GRADIENT, LOSS = 2e-5, 1e-5


def worst(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative difference of any parameter's tensor."""
    assert got.keys() == wanted.keys()
    return max(relative(got[name].double(), wanted[name].double()) for name in wanted)


def same_rollouts(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert torch.equal(got["positions"], wanted["positions"])
    assert torch.equal(got["rollout_tokens"], wanted["rollout_tokens"])
    for name in ("old_log_probs", "rewards", "reward_cosine", "entropy_mean", "entropy_selected"):
        torch.testing.assert_close(got[name], wanted[name], rtol=2e-5, atol=1e-6)
    assert torch.equal(got["reward_binary"], wanted["reward_binary"])


def same_steps(got: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    for step, reference in zip(got, wanted, strict=True):
        same_rollouts(step["rollouts"], reference["rollouts"])
        for name in ("actor/ntp_loss", "actor/grad_norm", "nsp/reward/mean", "nsp/entropy/mean"):
            assert step["metrics"][name] == pytest.approx(reference["metrics"][name], rel=LOSS), name
        for name in ("actor/pg_loss", "actor/ppo_kl"):
            assert step["metrics"][name] == pytest.approx(reference["metrics"][name], abs=1e-6), name
        assert len(step["gradients"]) == len(reference["gradients"]) == 2
        for mine, theirs in zip(step["gradients"], reference["gradients"], strict=True):
            assert worst(mine, theirs) < GRADIENT
        assert worst(step["parameters"], reference["parameters"]) < 1e-6


def test_random_weights_do_not_depend_on_the_ranks(ranks: Ranks) -> None:
    one, two = ranks[1]["initial"], ranks[2]["initial"]
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_two_ranks_are_one(ranks: Ranks) -> None:
    same_steps(ranks[2]["steps"], ranks[1]["steps"])


def test_other_micro_batches_change_nothing(ranks: Ranks) -> None:
    same_steps(ranks[1]["other_micro_batches"], ranks[1]["steps"])


WAYS = [
    f"{step}, {kind}{pieces}"
    for step in ("two phases", "fused")
    for kind in ("none", "layer", "segment")
    for pieces in ("", ", in pieces")
]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_activation_checkpointing_and_the_fused_step_change_nothing(ranks: Ranks, way: str, world: int) -> None:
    """In one mini-batch of two micro-batches, on one rank and on two, where layers are gathered again or stay."""
    got, wanted = ranks[world]["ways"][way], ranks[1]["ways"]["two phases, none"]
    same_rollouts(got["rollouts"], wanted["rollouts"])
    assert len(got["gradients"]) == len(wanted["gradients"]) == 1
    assert worst(got["gradients"][0], wanted["gradients"][0]) < GRADIENT
    assert worst(got["parameters"], wanted["parameters"]) < 1e-6
    for name in ("actor/ntp_loss", "actor/grad_norm", "nsp/reward/mean", "nsp/entropy/mean", "nsp/reward/std"):
        assert got["metrics"][name] == pytest.approx(wanted["metrics"][name], rel=LOSS), name
    assert way.startswith("two") or got["metrics"]["actor/ppo_kl"] == 0
    assert 0 <= got["metrics"]["actor/log_prob_gap"] < 1e-4  # to the pass that wrote them, in the fused step as well


@pytest.mark.parametrize("world", [1, 2])
def test_pieces_are_seen_in_the_count(ranks: Ranks, world: int) -> None:
    """Control: what was said to be in pieces was, and read its rollouts twice."""
    at_once, pieces = (ranks[world]["ways"][f"two phases, none{kind}"]["metrics"] for kind in ("", ", in pieces"))
    assert pieces["perf/forward_tokens_per_token"] > at_once["perf/forward_tokens_per_token"]


@pytest.mark.parametrize("step", ["two phases", "fused"])
def test_credit_per_token_does_not_depend_on_the_ranks(ranks: Ranks, step: str) -> None:
    """Two mini-batches, the second of a policy that has moved; other gradients than with one advantage a rollout."""
    one, two = (ranks[world]["many"][step] for world in (1, 2))
    same_steps([two], [one])
    torch.testing.assert_close(two["rollouts"]["token_rewards"], one["rollouts"]["token_rewards"], rtol=2e-5, atol=1e-6)
    assert worst(one["gradients"][0], ranks[1]["steps"][0]["gradients"][0]) > 100 * GRADIENT


@pytest.mark.parametrize("step", ["two phases", "fused"])
def test_unequal_rollouts_do_not_depend_on_the_ranks(ranks: Ranks, step: str) -> None:
    """Ranks have other lengths, and make the same passes; how far the trained pass is from the writing one is a mean
    over rollouts' own tokens, whichever rank has them."""
    one, two = (ranks[world]["unequal"][step] for world in (1, 2))
    same_steps([two], [one])
    lengths = one["rollouts"]["rollout_lengths"]
    assert torch.equal(two["rollouts"]["rollout_lengths"], lengths) and 1 <= lengths.min() < lengths.max() <= 5
    assert one["metrics"]["nsp/rollout_length/mean"] == pytest.approx(lengths.double().mean().item())
    assert worst(one["gradients"][0], ranks[1]["many"][step]["gradients"][0]) > 100 * GRADIENT
    assert 0 <= two["metrics"]["actor/log_prob_gap"] < 1e-4


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].double().flatten() for name in sorted(gradients)])


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("step", ["two phases", "fused"])
def test_measuring_the_policy_gradient(ranks: Ranks, step: str, world: int) -> None:
    """What is measured is that of the gradients of the halves, trained alone; the update is the same bit for bit."""
    got, plain = ranks[world]["measured"][step], ranks[world]["ways"][f"{step}, none"]
    even, odd, plain_ntp = (flat(ranks[1]["measured"][part]) for part in ("even", "odd", "next"))
    snr = 4 * (even @ odd / (even - odd).square().sum()).item()
    cosine = torch.cosine_similarity(even + odd, plain_ntp, dim=0).item()
    assert got["metrics"]["nsp/gradient_snr"] == pytest.approx(snr, rel=1e-3, abs=1e-5)
    assert got["metrics"]["nsp/gradient_cosine_ntp"] == pytest.approx(cosine, rel=1e-3, abs=1e-5)
    wrong = 4 * (even @ even / (even - odd).square().sum()).item()  # the control: one half with itself
    assert abs(wrong - snr) > 0.1
    same_rollouts(got["rollouts"], plain["rollouts"])
    assert all(torch.equal(value, plain["parameters"][name]) for name, value in got["parameters"].items())
    assert all(torch.equal(value, plain["gradients"][0][name]) for name, value in got["gradients"][0].items())
    assert "nsp/gradient_snr" not in plain["metrics"]


@pytest.mark.parametrize("step", ["two phases", "fused"])
def test_what_measuring_costs(ranks: Ranks, step: str) -> None:
    """One more pass of the mini-batch, and one without rollouts for the cosine: counted, as all passes are."""
    got, plain = ranks[1]["measured"][step], ranks[1]["ways"][f"{step}, none"]
    tokens = sum(LENGTHS)
    extra = (got["metrics"][PASSES] - plain["metrics"][PASSES]) * tokens
    count = plain["rollouts"]["rollout_tokens"].numel()
    k = plain["rollouts"]["rollout_tokens"].shape[-1]
    assert extra == pytest.approx(2 * tokens + count * (k - 1) / k + (count if step == "fused" else 0))


def test_ranks_look_at_the_same_places(ranks: Ranks) -> None:
    one, two = ranks[1]["looking"], ranks[2]["looking"]
    assert all(torch.equal(one[selection], two[selection]) for selection in one)
    assert len({str(positions.tolist()) for positions in one.values()}) == 3


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("step", ["two phases", "fused"])
def test_weights_may_be_cast_once_for_all_passes(ranks: Ranks, step: str, world: int) -> None:
    """As a GPU run does, where FSDP2 gathers layers for each pass: the same rollouts, the same float32 gradients."""
    together, apart = (ranks[world]["in_bf16"][f"{step}, {way}"] for way in ("together", "apart"))
    same_rollouts(together["rollouts"], apart["rollouts"])
    for mine, theirs in zip(together["gradients"], apart["gradients"], strict=True):
        assert worst(mine, theirs) < 1e-6
    exact = ranks[world]["steps"][0]["gradients"][0]  # control: bf16 it was
    assert worst(together["gradients"][0], exact) > 1e-3


def test_the_second_rank_counts(ranks: Ranks) -> None:
    """Negative control: rank 0's documents alone give other gradients, by far more than the tolerance."""
    alone, together = ranks[1]["rank_0_alone"], ranks[2]["steps"][0]
    same_rollouts(alone["rollouts"], {name: value[[0, 1, 4, 5]] for name, value in together["rollouts"].items()})
    assert worst(alone["gradients"][0], together["gradients"][0]) > 100 * GRADIENT
    first = together["gradients"][0], together["gradients"][1]
    assert worst(*first) > 100 * GRADIENT  # and the two mini-batches differ from each other


def test_rollouts_differ_between_steps_documents_and_copies(ranks: Ranks) -> None:
    first, second = (step["rollouts"] for step in ranks[1]["steps"])
    tokens = first["rollout_tokens"]
    assert not torch.equal(tokens[:, :, 0], tokens[:, :, 1])
    assert not torch.equal(tokens[0], tokens[2])
    assert not torch.equal(tokens, second["rollout_tokens"])


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", ["nan", "infinite"])
def test_a_bad_gradient_skips_its_update_only(ranks: Ranks, kind: str, world: int) -> None:
    """The first of two mini-batches has an advantage that is not finite."""
    result = ranks[world][kind]
    bad, good = result["grad_norms"]
    assert not math.isfinite(bad) and math.isfinite(good)
    assert result["metrics"]["actor/skipped_updates"] == 1
    assert result["metrics"]["actor/grad_norm"] == good  # means leave the skipped update out
    assert all(value == value and abs(value) < 1e3 for value in result["metrics"].values())
    assert result["in_a_row"] == 0  # the good one ended the row
    assert worst(result["after"], result["before"]) > 0
    assert all(tensor.isfinite().all() for tensor in result["after"].values())


@pytest.mark.parametrize("world", [1, 2])
def test_only_bad_gradients_leave_every_bit_of_the_weights(ranks: Ranks, world: int) -> None:
    result = ranks[world]["all_bad"]
    assert all(not math.isfinite(norm) for norm in result["grad_norms"])
    assert all(torch.equal(result["after"][name], result["before"][name]) for name in result["before"])
    assert result["metrics"]["actor/skipped_updates"] == 2 and result["in_a_row"] == 2
    assert "not finite" in ranks[world]["log"]


def test_old_log_probs_are_those_of_the_writing_or_of_the_trained_pass(ranks: Ranks) -> None:
    """Recomputed, what came with the rollouts plays no part, and before the first update every ratio is 1.

    The distance to what came with them is reported all the same.
    """
    written, recomputed = (ranks[1]["old_log_probs"][kind] for kind in ("rollout", "recomputed"))
    assert written["actor/log_prob_gap"] == pytest.approx(0.5, abs=1e-4)
    assert recomputed["actor/log_prob_gap"] == written["actor/log_prob_gap"]
    assert written["actor/ppo_kl"] == pytest.approx(0.5, abs=0.1) and abs(recomputed["actor/ppo_kl"]) < 0.1
    assert written["actor/pg_loss"] != recomputed["actor/pg_loss"]


def test_the_gap_is_that_of_the_kernels_and_no_more(ranks: Ranks) -> None:
    for step in ranks[1]["steps"]:
        assert 0 <= step["metrics"]["actor/log_prob_gap"] < 1e-4


def test_validation_counts_every_document_once(ranks: Ranks) -> None:
    """Five documents in batches of 3 and 2: neither divides by two ranks, so dummies fill them up."""
    one, two = ranks[1], ranks[2]
    for name in ("validation", "validation_after"):
        assert two[name]["val/ntp_loss"] == pytest.approx(one[name]["val/ntp_loss"], rel=1e-6)
        assert two[name]["val/ntp_accuracy"] == one[name]["val/ntp_accuracy"]
        assert one[name]["val/ntp_loss"] == pytest.approx(one[f"{name}_by_hand"][0], rel=1e-5)
        assert one[name]["val/ntp_accuracy"] == pytest.approx(one[f"{name}_by_hand"][1], abs=1e-12)
    assert one["validation_after"]["val/ntp_loss"] < one["validation"]["val/ntp_loss"]


def test_little_crosses_ray(ranks: Ranks) -> None:
    """128 documents, c=8, n=1, k=5; less than 1 MB a step besides token ids."""
    sizes = ranks[1]["message_bytes"]
    assert set(sizes["sent"]) == set(sizes["received"]) == {"rollout_and_reward", "update", "score"}
    total = sum(sizes["sent"].values()) + sum(sizes["received"].values())
    # the control: every reward, log-probability and advantage of every rollout did cross
    assert 128 * 8 * (4 * 3 + 2 * 5 * 4) < total < 1_000_000
    assert total < 200_000
