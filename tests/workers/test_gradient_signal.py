"""Signal to noise from two halves: the numbers of the slow reference, which draws many times."""

from __future__ import annotations

import math

import pytest
import torch
from reference.toy import tiny_config
from torch import Tensor

from examples.miniature.training import Loop
from examples.recall.noise import signal_to_noise
from refine_verl.adaptation.settings import AdaptSettings
from refine_verl.config import LossSettings, NSPSettings
from refine_verl.models import Documents, load_model, make_actor
from refine_verl.workers.gradient_signal import signal_of_halves

DRAWS = 48
# Of ratios of means over DRAWS / 2 pairs.
STATISTICAL = 0.25


def halves(first: Tensor, second: Tensor) -> tuple[float, float]:
    """g_A . g_B and |g_A - g_B|^2."""
    return (first @ second).item(), (first - second).square().sum().item()


def test_two_draws_are_the_slow_references_two_draws() -> None:
    """Of one draw; the mean of both has half the variance, hence twice the ratio."""
    first, second = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.3
    slow = signal_to_noise(torch.stack([first, second]))
    assert signal_of_halves(*halves(first, second)) == pytest.approx(2 * slow)


@pytest.mark.parametrize(
    ("product", "gap", "found"), [(0.0, 0.0, 0.0), (-1.0, 2.0, -2.0), (1.0, 0.0, math.inf), (1.0, math.inf, 0.0)]
)
def test_edges(product: float, gap: float, found: float) -> None:
    assert signal_of_halves(product, gap) == found
    assert not math.isfinite(signal_of_halves(math.nan, math.nan))


def test_many_halves_are_the_slow_reference() -> None:
    """Policy gradients of a tiny model, drawn again and again: pairs of draws, averaged, against all draws at once."""
    model = load_model(None, config=tiny_config("delta_net"), seed=1)
    tokens = torch.randint(0, 61, (4, 24), generator=torch.Generator().manual_seed(3)).fmod(3)
    nsp = NSPSettings(chunks=4, rollout_length=3, rollouts_per_position=4, group="position", credit="token")
    settings = AdaptSettings(nsp=nsp, loss=LossSettings(rl_coef=1.0, sft_coef=0.0), norm_adv_by_std_in_grpo=False)
    loop = Loop(make_actor(model), settings)
    documents = Documents.from_tensors(tokens, (24,) * 4)
    draws = torch.stack(
        [
            loop.flat_gradient(documents, loop.write(index, documents, range(4)))[0].double()
            for index in range(1, DRAWS + 1)
        ]
    )
    pairs = [halves(*pair) for pair in draws.view(DRAWS // 2, 2, -1)]
    found = signal_of_halves(*(sum(values) / len(pairs) for values in zip(*pairs, strict=True)))
    slow = 2 * signal_to_noise(draws)
    assert slow > 0.05 and found == pytest.approx(slow, rel=STATISTICAL)
    # the control: without the product of independent draws noise counts as signal
    biased = sum(draw.square().sum().item() for draw in draws.view(DRAWS // 2, 2, -1).mean(dim=1)) / len(pairs)
    assert signal_of_halves(biased, sum(gap for _, gap in pairs) / len(pairs)) > slow + 0.5
