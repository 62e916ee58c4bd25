"""Cutting, by hand: which pieces come out, and that every document and token is accounted for."""

import numpy as np
import pytest

from refine_verl.data.windows import plan_windows


def pieces(plan):
    return list(
        zip(
            plan.document.tolist(),
            plan.window.tolist(),
            plan.start.tolist(),
            plan.length.tolist(),
            strict=True,
        )
    )


@pytest.mark.parametrize(
    ("length", "window", "head"),
    [
        (2, [], []),  # one below the minimum
        (3, [(0, 3)], [(0, 3)]),  # exactly the minimum
        (10, [(0, 10)], [(0, 10)]),  # exactly the maximum
        (11, [(0, 10)], [(0, 10)]),  # one more: the rest is too short for a window of its own
        (12, [(0, 10)], [(0, 10)]),
        (13, [(0, 10), (10, 3)], [(0, 10)]),  # the rest has exactly the minimum
        (20, [(0, 10), (10, 10)], [(0, 10)]),
        (25, [(0, 10), (10, 10), (20, 5)], [(0, 10)]),
        (0, [], []),
    ],
)
def test_one_document(length, window, head):
    for policy, expected in (("window", window), ("head", head)):
        plan = plan_windows(np.array([length]), max_length=10, min_length=3, policy=policy)
        assert [(start, n) for _, _, start, n in pieces(plan)] == expected
        statistics = plan.statistics
        assert statistics.tokens_kept == sum(n for _, n in expected)
        assert statistics.tokens_dropped == length - statistics.tokens_kept
        assert statistics.cut == (length > 10)


def test_statistics_of_several_documents_with_windows():
    plan = plan_windows(np.array([25, 2, 13, 10, 11]), max_length=10, min_length=3, policy="window")
    assert pieces(plan) == [
        (0, 0, 0, 10), (0, 1, 10, 10), (0, 2, 20, 5),
        (2, 0, 0, 10), (2, 1, 10, 3), (3, 0, 0, 10), (4, 0, 0, 10)
    ]  # fmt: skip
    s = plan.statistics
    assert (s.documents, s.kept, s.too_short, s.cut, s.windows) == (5, 4, 1, 3, 7)
    assert (s.tokens_kept, s.tokens_dropped) == (58, 3)
    assert (s.min_length, s.max_length, s.longest_document) == (3, 10, 25)
    assert s.mean_length == pytest.approx(58 / 7)


def test_head_counts_what_it_cut():
    s = plan_windows(np.array([25, 2, 13]), max_length=10, min_length=3, policy="head").statistics
    assert (s.kept, s.too_short, s.cut, s.windows) == (2, 1, 2, 2)
    assert (s.tokens_kept, s.tokens_dropped) == (20, 2 + 15 + 3)


@pytest.mark.parametrize("policy", ["window", "head"])
def test_no_maximum_keeps_documents_whole(policy):
    plan = plan_windows(np.array([25, 2, 13]), max_length=None, min_length=3, policy=policy)
    assert pieces(plan) == [(0, 0, 0, 25), (2, 0, 0, 13)]
    assert plan.statistics.cut == 0


def test_nothing_left():
    for lengths in ([], [1, 2]):
        s = plan_windows(np.array(lengths, np.int64), max_length=10, min_length=3, policy="window").statistics
        assert (s.kept, s.windows, s.tokens_kept, s.min_length, s.max_length) == (0, 0, 0, 0, 0)
        assert s.tokens_dropped == sum(lengths)


def test_random_lengths_against_a_loop():
    lengths = np.random.default_rng(0).integers(0, 60, 300)
    plan = plan_windows(lengths, max_length=16, min_length=5, policy="window")
    expected = []
    for document, length in enumerate(lengths.tolist()):
        for number, start in enumerate(range(0, length, 16)):
            n = min(16, length - start)
            if n >= 5:
                expected.append((document, number, start, n))
    assert pieces(plan) == expected
    assert plan.statistics.tokens_kept + plan.statistics.tokens_dropped == lengths.sum()
