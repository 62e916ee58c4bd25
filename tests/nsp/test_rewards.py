from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from refine_verl.config import ConfigError, NSPSettings
from refine_verl.nsp import (
    RewardInputs,
    check_functions,
    cosine_reward,
    edit_gains,
    get_reward,
    register_reward,
    rewards,
)


def inputs(dtype: torch.dtype = torch.float32) -> RewardInputs:
    """Two rollouts of two tokens. Cosines by hand: (1, 0) and (-1, 4/5). Tokens right: 1 of 2 and 0 of 2."""
    return RewardInputs(
        predicted_hidden=torch.tensor([[[2.0, 0.0], [0.0, 3.0]], [[1.0, 1.0], [3.0, 4.0]]], dtype=dtype),
        target_hidden=torch.tensor([[[5.0, 0.0], [7.0, 0.0]], [[-2.0, -2.0], [0.0, 0.5]]], dtype=dtype),
        predicted_tokens=torch.tensor([[4, 9], [1, 2]]),
        target_tokens=torch.tensor([[4, 8], [2, 1]]),
    )


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rewards.REWARDS, "functions", dict(rewards.REWARDS.functions))
    yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "expected"),
    [("cosine", [0.5, -0.1]), ("binary", [0.5, 0.0]), ("hybrid", [1.0, -0.1]), ("edit", [0.5, 0.0])],
)
def test_rewards_by_hand(name: str, expected: list[float], dtype: torch.dtype) -> None:
    """Eq. 9, 11, 12 and edits, each averaged over k; the second rollout has its tokens in the wrong order."""
    reward = get_reward(name)(inputs(dtype))
    assert reward.shape == (2,)
    assert reward.dtype == (torch.float64 if dtype == torch.float64 and name in ("cosine", "hybrid") else torch.float32)
    torch.testing.assert_close(reward.float(), torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("written", "gains"),
    [
        ("abcde", [1, 1, 1, 1, 1]),
        ("xabcd", [0, 0, 1, 1, 1]),  # one is put in, and the last is missing
        ("bcdex", [1, 1, 1, 1, -1]),  # the first is left out: binary would give nothing
        ("abxde", [1, 1, 0, 1, 1]),
        ("edcba", [1, 0, 0, 0, 0]),
        ("aaaaa", [1, 0, 0, 0, 0]),
        ("eabcd", [1, -1, 1, 1, 1]),  # what is right as the last is wrong as the first
        ("vwxyz", [0, 0, 0, 0, 0]),
    ],
)
def test_edits_by_hand(written: str, gains: list[int]) -> None:
    tokens = [torch.tensor([[ord(letter) for letter in word]]) for word in (written, "abcde")]
    assert edit_gains(*tokens)[0].tolist() == gains


def distance(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """The fewest insertions, deletions and substitutions, by trying all."""
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return distance(a[1:], b[1:])
    return 1 + min(distance(a[1:], b), distance(a, b[1:]), distance(a[1:], b[1:]))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_edits_are_those_of_the_definition(k: int) -> None:
    generator = torch.Generator().manual_seed(2)
    predicted, target = (torch.randint(0, 3, (300, k), generator=generator) for _ in range(2))
    rows = list(zip(map(tuple, predicted.tolist()), map(tuple, target.tolist()), strict=True))
    distances = torch.tensor([[distance(a[:j], b) for j in range(k + 1)] for a, b in rows])
    gains = edit_gains(predicted, target)
    assert torch.equal(gains, (distances[:, :-1] - distances[:, 1:]).float())
    hidden = torch.zeros(300, k, 1)
    about = RewardInputs(
        predicted_hidden=hidden, target_hidden=hidden, predicted_tokens=predicted, target_tokens=target
    )
    torch.testing.assert_close(get_reward("edit")(about), 1 - distances[:, -1] / k)
    edit, binary = get_reward("edit")(about), get_reward("binary")(about)
    assert (edit >= binary - 1e-6).all() and (k == 5) == bool((edit > binary + 1e-6).any())


def test_cosine_is_not_computed_in_bfloat16() -> None:
    """300 bf16 numbers: their products summed in bf16 would be wrong in the second digit."""
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(4, 1, 300, generator=generator).bfloat16()
    target = (predicted.float() + torch.randn(4, 1, 300, generator=generator)).bfloat16()
    tokens = torch.zeros(4, 1, dtype=torch.int64)
    reward = get_reward("cosine")(
        RewardInputs(predicted_hidden=predicted, target_hidden=target, predicted_tokens=tokens, target_tokens=tokens)
    )
    x, y = predicted.double()[:, 0], target.double()[:, 0]
    expected = (x * y).sum(-1) / (x.square().sum(-1).sqrt() * y.square().sum(-1).sqrt())
    torch.testing.assert_close(reward.double(), expected, atol=1e-6, rtol=0)


def test_cosine_of_zero_vectors_is_zero() -> None:
    given = inputs()
    given.predicted_hidden[0] = 0
    given.target_hidden[1] = 0
    assert not cosine_reward(given).any()


def test_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match=r"predicted_tokens \[2, 3\]"):
        RewardInputs(
            predicted_hidden=torch.zeros(2, 2, 4),
            target_hidden=torch.zeros(2, 2, 4),
            predicted_tokens=torch.zeros(2, 3),
            target_tokens=torch.zeros(2, 2),
        )


def test_unknown_name_is_refused_with_the_nearest() -> None:
    for lookup in (get_reward, rewards.REWARDS.find):
        with pytest.raises(ValueError, match=r"'cosin'. Allowed: binary, cosine, edit, .* Did you mean 'cosine'"):
            lookup("cosin")


def test_users_register_a_name(registry: None) -> None:
    @register_reward("first_token")
    def first_token(given: RewardInputs) -> Tensor:
        return given.predicted_tokens[:, 0] == given.target_tokens[:, 0]

    assert sorted(rewards.REWARDS.functions) == ["binary", "cosine", "edit", "first_token", "hybrid"]
    rewards.REWARDS.find("first_token")
    reward = get_reward("first_token")(inputs())
    assert reward.dtype == torch.float32
    assert reward.tolist() == [1.0, 0.0]


def test_a_name_has_one_owner(registry: None) -> None:
    with pytest.raises(ValueError, match="'cosine' already belongs to refine_verl.nsp.rewards.cosine_reward"):
        register_reward("cosine")(lambda given: given.predicted_tokens.float().mean(-1))
    assert get_reward("cosine").__wrapped__ is cosine_reward  # type: ignore[attr-defined]
    register_reward("cosine")(cosine_reward)  # the same function again, as after a reload
    for name in ("", "a.b", "a:b", "a b"):
        with pytest.raises(ValueError, match="non-empty word"):
            register_reward(name)


USER_MODULE = """
import torch

def right(inputs):
    return inputs.predicted_hidden.sum((1, 2)).requires_grad_()

def listed(inputs):
    return [0.0] * len(inputs.predicted_tokens)

def per_token(inputs):
    return inputs.predicted_tokens == inputs.target_tokens

def too_many(inputs):
    return torch.zeros(*inputs.predicted_tokens.shape[:1], 7)

def broken_token(inputs):
    return torch.full(inputs.predicted_tokens.shape, float("nan"))

def none_where_wrong(inputs):
    right = inputs.predicted_tokens == inputs.target_tokens
    return torch.where(right, 1.0, float("nan"))

def none_where_right(inputs):
    wrong = inputs.predicted_tokens != inputs.target_tokens
    return torch.where(wrong, 1.0, float("nan"))

def wide(inputs):
    return inputs.predicted_hidden @ torch.ones(16)

def of_two(first, second):
    return first

def broken(inputs):
    return torch.tensor([1.0, float("nan")])

class Family:
    @staticmethod
    def member(inputs):
        return torch.ones(len(inputs.predicted_tokens))

constant = 3
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_rewards_for_test.py").write_text(USER_MODULE)
    (tmp_path / "my_broken_rewards.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "my_rewards_for_test"


def test_users_name_a_function_by_its_path(user_module: str) -> None:
    for path in (f"{user_module}.right", f"{user_module}:right"):
        rewards.REWARDS.find(path)
        reward = get_reward(path)(inputs())
        assert reward.tolist() == [5.0, 9.0]
        assert not reward.requires_grad
    assert get_reward(f"{user_module}:Family.member")(inputs()).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{}.rihgt", "unknown function in .* 'rihgt'.*Did you mean 'right'"),
        ("{}.constant", "is a int, not a function"),
        ("no_such_module_here.fn", "cannot import the module 'no_such_module_here'.*PYTHONPATH"),
        ("my_broken_rewards.fn", "cannot import .*surely_not_installed"),
        (".fn", "not a path of the form"),
        ("{}:", "not a path of the form"),
    ],
)
def test_wrong_paths_are_refused(user_module: str, path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rewards.REWARDS.find(path.format(user_module))


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            "listed",
            TypeError,
            r"\(my_rewards_for_test.listed\) returned a list; expected a tensor of shape \[2, 2\], what each token",
        ),
        ("too_many", ValueError, r"too_many\) returned shape \[2, 7\]; expected \[2, 2\], .*, or \[2\], one number"),
        ("broken", ValueError, r"broken\) returned NaN or infinity for 1 of 2 rollouts"),
    ],
)
def test_what_a_users_function_returns_is_checked(
    user_module: str, function: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        get_reward(f"{user_module}.{function}")(inputs())


def test_one_that_calls_itself_ours_is_looked_at() -> None:
    @functools.wraps(cosine_reward)
    def own(inputs: RewardInputs) -> Tensor:
        return torch.full(inputs.predicted_tokens.shape, math.nan)

    with pytest.raises(ValueError, match="returned NaN or infinity"):
        rewards._checked(own, "own", per_token=False)(inputs())


def test_a_reward_is_not_blamed_for_the_models_nan() -> None:
    given = inputs()
    given.predicted_hidden[1] = math.nan
    assert torch.isnan(get_reward("cosine")(given)).tolist() == [False, True]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cosine", [[1.0, 0.0], [-1.0, 0.8]]),
        ("binary", [[1.0, 0.0], [0.0, 0.0]]),
        ("hybrid", [[2.0, 0.0], [-1.0, 0.8]]),
    ],
)
def test_what_each_token_earned_by_hand(name: str, expected: list[list[float]]) -> None:
    torch.testing.assert_close(get_reward(name, per_token=True)(inputs()), torch.tensor(expected), atol=1e-6, rtol=0)


def test_the_reward_of_a_rollout_is_the_same_bits_as_a_mean_of_its_own() -> None:
    """`hybrid` is a sum of two means, Eq. 12: the mean of the sums is another number in its last bits."""
    generator = torch.Generator().manual_seed(0)
    hidden, target = torch.randn(2, 200, 5, 16, generator=generator).unbind()
    tokens = torch.randint(3, (2, 200, 5), generator=generator)
    given = RewardInputs(
        predicted_hidden=hidden, target_hidden=target, predicted_tokens=tokens[0], target_tokens=tokens[1]
    )
    cosine = torch.nn.functional.cosine_similarity(hidden, target, dim=-1).mean(dim=-1)
    binary = (tokens[0] == tokens[1]).float().mean(dim=-1)
    wanted = {"cosine": cosine, "binary": binary, "hybrid": cosine + binary}
    assert all(torch.equal(get_reward(name)(given), reward) for name, reward in wanted.items())
    assert not torch.equal(get_reward("hybrid", per_token=True)(given).mean(dim=-1), wanted["hybrid"])


def test_credit_per_token_needs_what_tokens_earned(user_module: str) -> None:
    settings = NSPSettings(rollout_length=3, credit="token", reward=f"{user_module}.right")
    said = r"returned shape \[2\], one number per rollout; expected \[2, 3\], what each token earned"
    with pytest.raises(ConfigError, match=f"refine.nsp.credit: token needs .*{said}.*credit=rollout") as caught:
        check_functions(settings)
    assert caught.value.key == "refine.nsp.credit"
    check_functions(replace(settings, credit="rollout"))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("too_many", r"returned shape \[2, 7\]; expected \[2, 3\]"),
        ("broken_token", "returned NaN or infinity for 2 of 2 rollouts"),
        ("none_where_wrong", "returned NaN or infinity for 1 of 2 rollouts"),
        ("none_where_right", "returned NaN or infinity for 1 of 2 rollouts"),
        ("listed", "returned a list"),
        ("of_two", "cannot be called with one argument, RewardInputs .*missing a required argument: 'second'"),
    ],
)
@pytest.mark.parametrize("credit", ["token", "rollout"])
def test_what_no_credit_can_use_is_refused_before_a_run(
    user_module: str, credit: str, function: str, message: str
) -> None:
    settings = NSPSettings(rollout_length=3, credit=credit, reward=f"{user_module}.{function}")
    with pytest.raises(ConfigError, match=f"refine.nsp.reward: .*{message}.*, when it was tried out") as caught:
        check_functions(settings)
    assert caught.value.key == "refine.nsp.reward"
    for fits in ("per_token", "wide"):  # the input is made up, and `wide` needs hidden states of a width of its own
        check_functions(replace(settings, reward=f"{user_module}.{fits}"))
