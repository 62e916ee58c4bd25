from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from refine_verl.nsp import (
    RewardInputs,
    cosine_reward,
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
    ("name", "expected"), [("cosine", [0.5, -0.1]), ("binary", [0.5, 0.0]), ("hybrid", [1.0, -0.1])]
)
def test_rewards_by_hand(name: str, expected: list[float], dtype: torch.dtype) -> None:
    """Eq. 9, 11, 12, each averaged over k; the second rollout has its tokens in the wrong order."""
    reward = get_reward(name)(inputs(dtype))
    assert reward.shape == (2,)
    assert reward.dtype == (torch.float64 if dtype == torch.float64 and name != "binary" else torch.float32)
    torch.testing.assert_close(reward.float(), torch.tensor(expected), atol=1e-6, rtol=0)


def test_cosine_is_not_computed_in_bfloat16() -> None:
    """300 bf16 numbers: their products summed in bf16 would be wrong in the second digit."""
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(4, 1, 300, generator=generator).bfloat16()
    target = (predicted.float() + torch.randn(4, 1, 300, generator=generator)).bfloat16()
    tokens = torch.zeros(4, 1, dtype=torch.int64)
    reward = cosine_reward(
        RewardInputs(predicted_hidden=predicted, target_hidden=target, predicted_tokens=tokens, target_tokens=tokens)
    )
    x, y = predicted.double()[:, 0], target.double()[:, 0]
    expected = (x * y).sum(-1) / (x.square().sum(-1).sqrt() * y.square().sum(-1).sqrt())
    torch.testing.assert_close(reward.double(), expected, atol=1e-6, rtol=0)


def test_cosine_of_zero_vectors_is_zero() -> None:
    given = inputs()
    given.predicted_hidden[0] = 0
    given.target_hidden[1] = 0
    assert cosine_reward(given).tolist() == [0.0, 0.0]


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
        with pytest.raises(ValueError, match=r"'cosin'. Allowed: binary, cosine, hybrid, .* Did you mean 'cosine'"):
            lookup("cosin")


def test_users_register_a_name(registry: None) -> None:
    @register_reward("first_token")
    def first_token(given: RewardInputs) -> Tensor:
        return given.predicted_tokens[:, 0] == given.target_tokens[:, 0]

    assert sorted(rewards.REWARDS.functions) == ["binary", "cosine", "first_token", "hybrid"]
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
    return (inputs.predicted_tokens == inputs.target_tokens).float()

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
            r"\(my_rewards_for_test.listed\) returned a list; expected a tensor of shape \[2\]",
        ),
        ("per_token", ValueError, r"per_token\) returned shape \[2, 2\]; expected \[2\]"),
        ("broken", ValueError, r"broken\) returned NaN or infinity for 1 of 2 rollouts"),
    ],
)
def test_what_a_users_function_returns_is_checked(
    user_module: str, function: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        get_reward(f"{user_module}.{function}")(inputs())


def test_a_reward_is_not_blamed_for_the_models_nan() -> None:
    given = inputs()
    given.predicted_hidden[1] = math.nan
    assert torch.isnan(get_reward("cosine")(given)).tolist() == [False, True]
