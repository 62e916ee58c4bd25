from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from refine_verl.nsp import (
    gather_log_probs,
    position_uniforms,
    rollout_uniforms,
    sample_from_logits,
    sampling,
    uniforms,
)

LARGEST = 1 - 2**-53
PINNED_POSITIONS = [0.539933519202112, 0.8349260497642471]
PINNED_ROLLOUTS = [[[0.5783285754428988, 0.9798612195464067]], [[0.7019175934131223, 0.9132179020909692]]]


def test_draws_are_pinned() -> None:
    """A resumed run, possibly on another machine, must continue with these very numbers."""
    np.testing.assert_array_equal(position_uniforms(1, 2, 3, 2), PINNED_POSITIONS)
    np.testing.assert_array_equal(rollout_uniforms(1, 2, 3, 2, 1, 2), PINNED_ROLLOUTS)


def test_draws_do_not_depend_on_order_or_global_state() -> None:
    arguments = [(0, 5, document) for document in (3, 2**63 - 1, 0)]
    first = [rollout_uniforms(*a, 2, 2, 3) for a in arguments]
    np.random.seed(0)
    torch.manual_seed(0)
    again = [rollout_uniforms(*a, 2, 2, 3) for a in reversed(arguments)][::-1]
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shape", [(2, 3, 4), (8, 3, 4), (2, 9, 4), (2, 3, 70), (5, 5, 5)])
def test_rollout_draws_do_not_depend_on_how_many_are_asked_for(shape: tuple[int, int, int]) -> None:
    small = rollout_uniforms(0, 1, 2, 2, 3, 4)
    large = rollout_uniforms(0, 1, 2, *shape)
    assert large.shape == shape
    np.testing.assert_array_equal(large[:2, :3, :4], small)


def test_position_draws_do_not_depend_on_the_number_of_chunks() -> None:
    np.testing.assert_array_equal(position_uniforms(0, 1, 2, 16)[:8], position_uniforms(0, 1, 2, 8))


def test_every_argument_gives_another_independent_stream() -> None:
    """Neighbours, swapped arguments and numbers above 2**32 must not share or correlate draws."""
    size = 4000
    keys = [
        (seed, step, document, purpose)
        for seed, step, document in [
            (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2), (1, 2, 3), (3, 2, 1),
            (2**32, 0, 0), (0, 2**32, 0), (0, 0, 2**32), (1, 0, 2**32), (0, 0, 2**63 - 1),
        ]
        for purpose in ("position", "rollout")
    ]  # fmt: skip
    streams = np.stack([uniforms(*key, size) for key in keys])
    for stream in streams:
        assert kstest(stream, "uniform").pvalue > 1e-5
    correlations = np.corrcoef(streams)
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < 5 / math.sqrt(size)
    assert len(np.unique(streams)) == streams.size


def test_branches_of_a_document_are_independent() -> None:
    draws = rollout_uniforms(0, 0, 0, 6, 6, 2000).reshape(36, 2000)
    correlations = np.corrcoef(draws)
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < 5 / math.sqrt(2000)
    assert len(np.unique(draws)) == draws.size


def test_bad_arguments_of_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="document_id must be an integer in 0 ... 2"):
        uniforms(0, 0, 2**63, "position", 1)
    with pytest.raises(ValueError, match="seed must be"):
        uniforms(-1, 0, 0, "position", 1)
    with pytest.raises(ValueError, match="unknown purpose.*Did you mean 'rollout'"):
        uniforms(0, 0, 0, "rollouts", 1)
    with pytest.raises(TypeError):
        uniforms(0, 0, 1.5, "position", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_the_scaled_distribution(temperature: float) -> None:
    logits = torch.tensor([1.0, -math.inf, 0.0, 2.0, -1.0, 0.5])
    draws = uniforms(11, 0, 0, "rollout", 30_000)
    tokens, _ = sample_from_logits(logits.expand(30_000, -1), draws, temperature)
    observed = np.bincount(tokens.numpy(), minlength=6)
    assert observed[1] == 0
    possible = [0, 2, 3, 4, 5]

    def p_value(tau: float) -> float:
        expected = torch.softmax(logits.double() / tau, -1).numpy()[possible]
        return float(chisquare(observed[possible], expected * 30_000 / expected.sum()).pvalue)

    assert p_value(temperature) > 1e-3
    assert p_value(temperature * 1.15) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probs_are_those_of_the_drawn_tokens(dtype: torch.dtype, temperature: float) -> None:
    logits = (2 * torch.randn(9, 13)).to(dtype)
    tokens, log_probs = sample_from_logits(logits, np.random.default_rng(0).random(9), temperature)
    wide = logits.double() if dtype == torch.float64 else logits.float()
    expected = torch.log_softmax(wide / (temperature or 1.0), -1)[torch.arange(9), tokens]
    assert log_probs.dtype == wide.dtype
    torch.testing.assert_close(log_probs, expected)
    assert torch.equal(log_probs, gather_log_probs(logits, tokens, temperature))


def test_inverse_cdf_by_hand() -> None:
    """Probabilities 1/4, 0, 1/2, 1/4: the impossible token has no draw, not even at a boundary."""
    logits = torch.tensor([0.0, -math.inf, math.log(2), 0.0], dtype=torch.float64)
    draws = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, LARGEST], dtype=torch.float64)
    tokens, log_probs = sample_from_logits(logits.expand(6, -1), draws)
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]
    expected = torch.tensor([0.25, 0.25, 0.5, 0.5, 0.25, 0.25], dtype=torch.float64).log()
    torch.testing.assert_close(log_probs, expected)


@pytest.mark.parametrize("draw", [0.0, 0.5, LARGEST, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_impossible_tokens_are_never_drawn(draw: float, dtype: torch.dtype) -> None:
    """At both ends of the vocabulary, after underflow, and for a draw that was rounded up to 1."""
    logits = torch.randn(200, 50, dtype=dtype, generator=torch.Generator().manual_seed(0))
    logits[:, :3] = -math.inf
    logits[:, -3:] = -math.inf
    logits[:, 10] = -1e4
    tokens, log_probs = sample_from_logits(logits, np.full(200, draw))
    assert torch.isfinite(log_probs).all()
    assert not torch.isin(tokens, torch.tensor([0, 1, 2, 10, 47, 48, 49])).any()
    single = torch.full((1, 5), -math.inf, dtype=dtype)
    single[0, 3] = 0.0
    assert sample_from_logits(single, [draw])[0].tolist() == [3]  # type: ignore[arg-type]


def test_rows_are_independent_of_how_they_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, draws = torch.randn(10, 7), uniforms(0, 0, 0, "rollout", 10)
    whole = sample_from_logits(logits, draws)
    monkeypatch.setattr(sampling, "_CDF_ELEMENTS", 3 * 7)
    split = sample_from_logits(logits, draws)
    one = [sample_from_logits(logits[i : i + 1], draws[i : i + 1]) for i in range(10)]
    for which in (0, 1):
        assert torch.equal(whole[which], split[which])
        assert torch.equal(whole[which], torch.cat([pair[which] for pair in one]))


def test_greedy_takes_the_most_likely_token() -> None:
    logits = torch.randn(20, 30)
    tokens, _ = sample_from_logits(logits, np.full(20, 0.5), temperature=0)
    assert torch.equal(tokens, logits.argmax(-1))


def test_a_row_of_nan_gives_a_legal_token_and_says_so() -> None:
    logits = torch.randn(3, 6)
    logits[1] = math.nan
    tokens, log_probs = sample_from_logits(logits, np.full(3, 0.9))
    assert ((tokens >= 0) & (tokens < 6)).all()
    assert torch.isnan(log_probs).tolist() == [False, True, False]


def test_bad_arguments_of_sampling_are_refused() -> None:
    with pytest.raises(ValueError, match=r"uniforms \[R\], got \[3, 5\] and \[2\]"):
        sample_from_logits(torch.randn(3, 5), np.zeros(2))
    with pytest.raises(ValueError, match="temperature must be 0"):
        sample_from_logits(torch.randn(3, 5), np.zeros(3), temperature=-1.0)


def test_gathered_log_probs_have_the_gradient_of_log_softmax() -> None:
    logits = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(6, (4, 3))
    (gradient,) = torch.autograd.grad(gather_log_probs(logits, tokens, 0.7).sum(), logits)
    expected = (torch.nn.functional.one_hot(tokens, 6) - torch.softmax(logits / 0.7, -1)) / 0.7
    torch.testing.assert_close(gradient, expected)
