from __future__ import annotations

import math

import pytest
import torch
from reference import nsp as reference

from refine_verl.nsp import (
    align_entropy,
    chunked_entropy,
    entropy_from_logits,
    smooth_entropy,
    smooth_token_entropy,
)


def test_entropy_of_known_distributions() -> None:
    """Eq. 5 by hand: certain, two equal, uniform over four, (1/2, 1/4, 1/4)."""
    logits = torch.tensor(
        [
            [0.0, -math.inf, -math.inf, -math.inf],
            [3.0, 3.0, -math.inf, -math.inf],
            [7.0, 7.0, 7.0, 7.0],
            [math.log(2), 0.0, 0.0, -math.inf],
        ],
        dtype=torch.float64,
    )
    expected = torch.tensor([0.0, math.log(2), math.log(4), 1.5 * math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(entropy_from_logits(logits), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("dtype", "result", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 1e-5),
    ],
)
def test_entropy_matches_reference_in_every_dtype(dtype: torch.dtype, result: torch.dtype, tolerance: float) -> None:
    logits = (3 * torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))).to(dtype)
    computed = entropy_from_logits(logits)
    assert computed.dtype == result
    assert computed.shape == (2, 5)
    expected = [[reference.entropy(row) for row in rows] for rows in logits.double().tolist()]
    torch.testing.assert_close(computed.double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=0)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_chunked_entropy_never_projects_more_than_a_chunk(chunk_size: int) -> None:
    hidden = torch.randn(7, 4, dtype=torch.float64)
    head = torch.randn(4, 9, dtype=torch.float64)
    sizes: list[int] = []

    def project(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(rows.shape[0])
        return rows @ head

    entropy = chunked_entropy(hidden.requires_grad_(), project, chunk_size)
    torch.testing.assert_close(entropy, entropy_from_logits(hidden @ head))
    assert sum(sizes) == 7
    assert max(sizes) == min(chunk_size, 7)
    assert not entropy.requires_grad


def test_chunked_entropy_of_nothing_and_of_bad_input() -> None:
    assert chunked_entropy(torch.empty(0, 4), lambda rows: rows).shape == (0,)
    with pytest.raises(ValueError, match=r"\[L, d\]"):
        chunked_entropy(torch.empty(1, 2, 4), lambda rows: rows)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        chunked_entropy(torch.empty(2, 4), lambda rows: rows, 0)


def test_alignment_moves_a_prediction_to_its_token() -> None:
    aligned = align_entropy(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert aligned.tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (1, [6.0, 0.0, 3.0, 9.0]),
        (2, [6.0, 3.0, 1.5, 6.0]),  # the extra neighbour is the earlier one
        (3, [3.0, 3.0, 4.0, 6.0]),  # ends: mean of the two that exist, not a third of them
        (4, [3.0, 3.0, 4.5, 4.0]),
        (9, [4.5, 4.5, 4.5, 4.5]),
    ],
)
def test_smoothing_by_hand(window: int, expected: list[float]) -> None:
    smoothed = smooth_entropy(torch.tensor([6.0, 0.0, 3.0, 9.0]), window)
    assert smoothed.dtype == torch.float32
    torch.testing.assert_close(smoothed, torch.tensor(expected))


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 8, 50])
@pytest.mark.parametrize("length", [2, 3, 17])
def test_smoothing_matches_reference(window: int, length: int) -> None:
    entropy = torch.rand(length, dtype=torch.float64)
    expected = torch.tensor(reference.smooth(entropy.tolist(), window), dtype=torch.float64)
    torch.testing.assert_close(smooth_entropy(entropy, window), expected, rtol=1e-13, atol=0)
    expected = torch.tensor(reference.smooth_entropies(entropy.tolist(), window), dtype=torch.float64)
    torch.testing.assert_close(smooth_token_entropy(entropy, window), expected, rtol=1e-13, atol=0)


def test_smoothing_is_local() -> None:
    """A huge value changes its window and leaves every other entry bit-identical."""
    entropy = torch.rand(40, dtype=torch.float64)
    changed = entropy.clone()
    changed[20] = 1e12
    before, after = smooth_entropy(entropy, 5), smooth_entropy(changed, 5)
    inside = torch.arange(18, 23)
    outside = torch.ones(40, dtype=torch.bool).index_fill(0, inside, False)
    assert torch.equal(before[outside], after[outside])
    assert not (before[inside] == after[inside]).any()


@pytest.mark.parametrize(
    ("window", "first"),
    [(1, 10.0), (2, 10.0), (3, 10.0), (4, 10.0), (5, 15.0), (7, 20.0)],
)
def test_first_token_has_no_entropy_of_its_own(window: int, first: float) -> None:
    """H[0] is ignored, even NaN; its entry averages the neighbours ahead that the window holds."""
    entropy = torch.tensor([math.nan, 10.0, 20.0, 30.0, 40.0])
    smoothed = smooth_token_entropy(entropy, window)
    assert smoothed[0] == first
    torch.testing.assert_close(smoothed[1:], smooth_entropy(entropy[1:], window))


def test_smoothing_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        smooth_entropy(torch.rand(4), 0)
    with pytest.raises(ValueError, match=r"shape \[T\]"):
        smooth_entropy(torch.rand(2, 4), 3)
    with pytest.raises(ValueError, match="T >= 2"):
        smooth_token_entropy(torch.rand(1), 3)
