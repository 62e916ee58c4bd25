"""Answers from forked states that hold an open chunk, against plain passes over prompt and answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from reference.answers import compare_answers
from reference.toy import documents_of

from refine_verl.models import FastWeightActor

Make = Callable[..., FastWeightActor]
LENGTHS = (3, 17, 24)  # an open chunk, one just begun, and one that is just full
LIMITS = (11, 2, 9)  # beyond the end of a chunk, and not
COPIES, WIDTH = 2, 11
RELATIVE = 1e-9


@pytest.mark.parametrize("segments", [1, 5])
def test_log_probabilities_and_gradients_are_those_of_plain_passes(make: Make, segments: int) -> None:
    actor, plain = make(activation_checkpointing="segment" if segments > 1 else "none"), make()
    how = {"copies": COPIES, "width": WIDTH, "segments": segments, "tolerance": RELATIVE}
    written = compare_answers(actor, plain, documents_of(LENGTHS), LIMITS, **how)
    assert written.lengths.tolist() == [[limit] * COPIES for limit in LIMITS]
