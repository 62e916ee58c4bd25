"""Rollouts of unequal lengths: where they end, what they earn, how they are compared."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from refine_verl.config import ConfigError, NSPSettings, RolloutLength
from refine_verl.nsp import (
    RewardInputs,
    counted_tokens,
    edit_gains,
    get_reward,
    group_standardise,
    register_reward,
    rollout_lengths,
    sentence_ends,
)
from refine_verl.nsp.advantage import token_advantages, token_returns
from refine_verl.nsp.functions import check_functions
from refine_verl.nsp.lengths import ends_sentence
from refine_verl.nsp.metrics import rollout_metrics
from refine_verl.nsp.rewards import REWARDS
from refine_verl.workers.advantage import compute_advantages

ENDS = torch.tensor([7, 9])


def lengths_of(length: RolloutLength, positions: list[int], entropy: list[float], tokens: list[int]) -> list[int]:
    return rollout_lengths(
        length, torch.tensor(positions), torch.tensor(entropy), torch.tensor(tokens), ENDS
    ).tolist()  # fmt: skip


def test_a_rollout_ends_where_a_sentence_does() -> None:
    tokens = [1, 2, 7, 3, 3, 9, 9, 3, 3, 3]
    calm = [0.0] * len(tokens)
    by = functools.partial(RolloutLength, by="sentence")
    assert lengths_of(by(min=1, max=3), [0, 1, 2, 4, 6], calm, tokens) == [2, 1, 3, 1, 3]
    assert lengths_of(by(min=2, max=3), [0, 1, 4, 5], calm, tokens) == [2, 3, 2, 3]
    assert lengths_of(by(min=2, max=8), [0, 1], calm, tokens) == [2, 4]


def test_a_rollout_ends_where_what_follows_is_no_question_any_more() -> None:
    """The mean of all predictions but the last, which nothing follows, is 1; the last is not part of it."""
    entropy = [2.0, 2.0, 0.5, 2.0, 2.0, 0.25, 0.25, 0.0, 0.0, 9e9]
    length = RolloutLength(min=1, max=3, by="entropy")
    assert lengths_of(length, [0, 1, 2, 3, 4], entropy, [7] * 10) == [2, 1, 3, 2, 1]
    assert lengths_of(RolloutLength(min=2, max=3, by="entropy"), [0, 1], entropy, [7] * 10) == [2, 3]


@pytest.mark.parametrize("text", [".", "end.", "really?", '!"', "what?)", "\n", " a\nb", "…", "。", "said.”"])
def test_what_ends_a_sentence(text: str) -> None:
    assert ends_sentence(text)


@pytest.mark.parametrize("text", ["", " ", "a", "3.1", ".com", ",", ";", ")", "Mr"])
def test_what_does_not(text: str) -> None:
    assert not ends_sentence(text)


class Words:
    """As little of a tokenizer as is needed."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def __len__(self) -> int:
        return len(self.words)

    def batch_decode(self, ids: list[list[int]]) -> list[str]:
        return ["".join(self.words[index] for index in some) for some in ids]


def test_tokens_of_a_tokenizer_that_end_a_sentence() -> None:
    by_sentence = NSPSettings(rollout_length=RolloutLength(max=4, by="sentence"))
    assert sentence_ends(Words("a", ".", "b?", "c"), by_sentence) == (1, 2)
    assert sentence_ends(Words("a", "."), NSPSettings()) == ()
    with pytest.raises(ConfigError, match=r"rollout_length\.by: sentence needs tokens .*Set by=entropy"):
        sentence_ends(Words("a", "b"), by_sentence)


def inputs(lengths: Tensor | None) -> RewardInputs:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 4, 5, 3, generator=generator)
    tokens = torch.randint(0, 3, (2, 4, 5), generator=generator)
    return RewardInputs(
        predicted_hidden=hidden[0],
        target_hidden=hidden[1],
        predicted_tokens=tokens[0],
        target_tokens=tokens[1],
        lengths=lengths,
    )


LENGTHS = torch.tensor([1, 5, 3, 2])


@pytest.mark.parametrize("name", ["cosine", "binary", "hybrid", "edit"])
def test_a_reward_is_that_of_a_rollout_that_is_as_long(name: str) -> None:
    """The slow way: each rollout alone, cut."""
    whole = inputs(None)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = RewardInputs(
            **{key: value[row : row + 1, :length] for key, value in vars(whole).items() if key != "lengths"}
        )
        for per_token in (False, True):
            wanted = get_reward(name, per_token)(alone)[0]
            got = get_reward(name, per_token)(inputs(LENGTHS))[row]
            torch.testing.assert_close(got[:length] if per_token else got, wanted)
            assert not per_token or not got[length:].any()
    assert not torch.equal(get_reward(name)(inputs(LENGTHS)), get_reward(name)(whole))


def test_the_edit_distance_is_to_as_many_tokens() -> None:
    """Worked out: `ab` for `ba` takes two steps; in front of more text the first is taken back later."""
    written, target = torch.tensor([[1, 2, 5, 5]]), torch.tensor([[2, 1, 6, 6]])
    assert edit_gains(written, target, torch.tensor([2]))[0, :2].tolist() == [1, -1]
    assert edit_gains(written, target)[0].tolist() == [1, 0, 0, -1]


def test_one_number_per_rollout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REWARDS, "functions", dict(REWARDS.functions))

    @register_reward("one_number")
    def one_number(given: RewardInputs) -> Tensor:
        return given.predicted_hidden.mean(dim=(1, 2))

    assert get_reward("one_number")(inputs(None)).shape == (4,)
    with pytest.raises(ValueError, match="one number per rollout; expected .* what each token earned"):
        get_reward("one_number")(inputs(LENGTHS))
    settings = NSPSettings(reward="one_number", rollout_length=RolloutLength(max=4))
    with pytest.raises(ConfigError, match=r"refine\.nsp\.rollout_length: .*Return that .*rollout_length to a number"):
        check_functions(settings)
    check_functions(NSPSettings(reward="one_number"))


def test_returns_by_hand() -> None:
    earned = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0], [1.0, 1.0, 4.0]])
    got = token_returns(earned, torch.tensor([2, 1, 3]))
    assert got.tolist() == [[1.5, 1.0, 0.0], [3.0, 0.0, 0.0], [2.0, pytest.approx(5 / 3), pytest.approx(4 / 3)]]


def batch(group: str = "sequence", documents: int = 2, c: int = 3, n: int = 2, k: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([[1, 4, 2], [3, 3, 1]])[:documents, :c]
    earned = torch.randn(documents, c, n, k, generator=generator, dtype=torch.float64)
    earned = earned.masked_fill(~counted_tokens(lengths[..., None], k), 0)
    rewards = earned.sum(dim=-1) / lengths[..., None]
    return {"rewards": rewards, "token_rewards": earned, "rollout_lengths": lengths}


def slowly(rollouts: Mapping[str, Tensor], group: str, divide: bool) -> Tensor:
    """Token by token, with Python's own lists."""
    earned, lengths = rollouts["token_rewards"], rollouts["rollout_lengths"]
    documents, c, n, k = earned.shape
    wanted = torch.zeros_like(earned)
    returns = {
        (b, p, r, j): float(earned[b, p, r, j : lengths[b, p]].sum() / lengths[b, p])
        for b in range(documents) for p in range(c) for r in range(n) for j in range(int(lengths[b, p]))
    }  # fmt: skip
    for (b, p, r, j), value in returns.items():
        others = [
            other for (b2, p2, _, j2), other in returns.items()
            if b2 == b and j2 == j and (group == "sequence" or p2 == p)
        ]  # fmt: skip
        if len(others) == 1:
            continue  # alone at its place
        mean = sum(others) / len(others)
        std = (sum((x - mean) ** 2 for x in others) / (len(others) - 1)) ** 0.5
        wanted[b, p, r, j] = (value - mean) / (std + 1e-6 if divide else 1)
    return wanted


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("group", ["sequence", "position"])
@pytest.mark.parametrize("n", [1, 2])
def test_tokens_are_compared_with_those_at_their_place_that_there_are(group: str, divide: bool, n: int) -> None:
    rollouts = batch(n=n)
    nsp = NSPSettings(
        chunks=3, rollouts_per_position=n, rollout_length=RolloutLength(max=4), group=group, credit="token"
    )
    wanted = slowly(rollouts, group, divide)
    compare = functools.partial(group_standardise, group=group, divide_by_std=divide)
    torch.testing.assert_close(token_advantages(rollouts, nsp, compare), wanted, rtol=1e-9, atol=1e-9)
    algorithm = OmegaConf.create({"adv_estimator": "grpo", "norm_adv_by_std_in_grpo": divide})
    got = compute_advantages(rollouts, nsp, algorithm)
    torch.testing.assert_close(got, wanted.float(), rtol=1e-5, atol=1e-5)
    without = {name: values for name, values in rollouts.items() if name != "rollout_lengths"}
    if group == "sequence":  # negative control: zeros behind the end would count
        assert not torch.allclose(compute_advantages(without, nsp, algorithm), got, atol=0.1)


def test_any_estimator_of_verl_sees_those_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from refine_verl.workers import advantage

    rollouts, nsp = (
        batch(),
        NSPSettings(chunks=3, rollouts_per_position=2, rollout_length=RolloutLength(max=4), credit="token"),
    )
    algorithm = OmegaConf.create({"adv_estimator": "grpo", "norm_adv_by_std_in_grpo": True})
    fast = compute_advantages(rollouts, nsp, algorithm)
    monkeypatch.setattr(advantage, "compute_grpo_outcome_advantage", None)  # so verl's own is called
    assert torch.equal(compute_advantages(rollouts, nsp, algorithm), fast)


@pytest.mark.parametrize(
    "name", ["rloo", "opo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "grpo_passk", "gpg"]
)
def test_places_that_no_rollout_reaches_or_only_one(name: str) -> None:
    """What is alone at its place is not compared, and where nothing is, verl's estimator is not asked."""
    rollouts = batch(n=1)  # one rollout reaches the last place, and nobody a fifth
    rollouts["token_rewards"] = torch.cat([rollouts["token_rewards"], torch.zeros(2, 3, 1, 1)], dim=-1)
    nsp = NSPSettings(chunks=3, rollout_length=RolloutLength(max=5), credit="token")
    algorithm = OmegaConf.create(
        {"adv_estimator": name, "norm_adv_by_std_in_grpo": True, "gamma": 1.0, "kl_ctrl": {"kl_coef": 0}}
    )
    got = compute_advantages(rollouts, nsp, algorithm)
    assert got.isfinite().all() and got[..., 0].any() and not got[..., 3:].any()


def test_metrics() -> None:
    rollouts = batch()
    shown = {"reward_cosine": rollouts["rewards"], "reward_binary": rollouts["rewards"]}
    shown |= {"entropy_mean": torch.ones(2), "entropy_selected": torch.ones(2, 3)}
    found = rollout_metrics({**rollouts, **shown}, "sequence")
    assert found["nsp/rollout_length/mean"] == pytest.approx(14 / 6)
    assert "nsp/rollout_length/mean" not in rollout_metrics({**shown, "rewards": rollouts["rewards"]}, "sequence")
    # at the last place one position is left: two rollouts of one document, which earn the same
    rollouts["token_rewards"][0, 1, :, 3] = 1.0
    rollouts["rewards"] = rollouts["token_rewards"].sum(dim=-1) / rollouts["rollout_lengths"][..., None]
    assert rollout_metrics({**rollouts, **shown}, "sequence")["nsp/group_zero_std"] == pytest.approx(1 / 4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"min": 4, "max": 2}, r"rollout_length\.min: 4 is more than refine\.nsp\.rollout_length\.max=2"),
        ({"min": 3, "max": 3}, r"rollout_length: min and max are both 3.*set it to 3"),
        ({"min": 0}, r"rollout_length\.min: must be at least 1"),
        ({"by": "sentences"}, r"rollout_length\.by: unknown value 'sentences'.*Did you mean 'sentence'"),
        ({"maximum": 3}, r"rollout_length\.maximum: unknown key.*Did you mean 'max'"),
        ("long", r"rollout_length: must be an integer or a section with min, max, by, got 'long'"),
    ],
)
def test_refused(value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=r"refine\.nsp\." + message):
        NSPSettings.from_mapping({"rollout_length": value})


def test_the_longest_counts_where_room_is_needed() -> None:
    nsp = NSPSettings.from_mapping({"chunks": 4, "rollout_length": {"min": 2, "max": 6}})
    assert (nsp.longest_rollout, nsp.shortest_document, nsp.pooling_window) == (6, 10, 6)
    assert nsp.rollout_length == RolloutLength(min=2, max=6, by="entropy")
