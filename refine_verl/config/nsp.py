"""Typed settings of `refine.nsp`: next-sequence prediction, from choosing positions to the advantage.

As those of `refine_verl.config.sections`, which has the rest of `refine:`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import ClassVar

from refine_verl.config.options import Settings, did_you_mean, option
from refine_verl.config.refusals import ConfigError

SELECTIONS = ("entropy", "uniform", "max_entropy", "min_entropy", "surprise", "query")
DRAWN = ("entropy", "surprise", "query")
"""Selections that draw from the softmax of Eq. 6, and so have a temperature."""
REWARDS = ("cosine", "binary", "hybrid", "edit")
QUESTION_TOKENS = 32
ROLLOUTS_TOGETHER = 64
END_TOKENS = ("sampled", "suppressed")
_WITH_ROLLOUTS = (
    ("end_tokens", "sampled"),
    ("question_tokens", QUESTION_TOKENS),
    ("rollouts_together", ROLLOUTS_TOGETHER),
)
"""Settings of `refine.nsp` that are refused where there are no rollouts, with their defaults."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutLength(Settings):
    """`refine.nsp.rollout_length` where rollouts end where the document does something; see `nsp.lengths`."""

    SECTION: ClassVar[str] = "refine.nsp.rollout_length"

    min: int = option(1, "fewest tokens of a rollout", at_least=1)
    max: int = option(5, "most tokens of a rollout; passes have room for so many", at_least=1)
    by: str = option(
        "entropy",
        "what ends a rollout: what follows is predicted with less entropy than the document's mean (entropy), or a "
        "sentence ends (sentence)",
        choices=("entropy", "sentence"),
    )

    def _check_rules(self) -> None:
        if self.min > self.max:
            raise ConfigError(
                f"{self.SECTION}.min", f"{self.min} is more than {self.SECTION}.max={self.max}: lower it or raise max."
            )
        if self.min == self.max:
            raise ConfigError(
                self.SECTION, f"min and max are both {self.min}, so nothing ends a rollout: set it to {self.min}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NSPSettings(Settings):
    """`refine.nsp`: next-sequence prediction, from choosing positions to the advantage (paper, section 3)."""

    SECTION: ClassVar[str] = "refine.nsp"

    chunks: int = option(
        8, "c: chunks per document; one position is drawn in each (Eq. 6)", at_least=1, paper="8 (Tab. 2)"
    )
    rollout_length: int | RolloutLength = option(
        5,
        "k: tokens generated after each position (Eq. 7), or {min, max, by}: between min and max of them, until the "
        "document's entropy falls (by=entropy) or a sentence ends (by=sentence)",
        at_least=1,
        paper="5 (Tab. 2)",
    )
    rollouts_per_position: int = option(1, "n: rollouts generated from each position", at_least=1, paper="1 (Tab. D.1)")
    selection: str = option(
        "entropy",
        "how the position is drawn within its chunk: by entropy, uniform, max_entropy, min_entropy, by how strongly "
        "the fast weights are rewritten there (surprise), by how much it resembles the end of the prompt (query), or "
        "a function of yours by registered name or import path",
        paper="entropy (Eq. 6)",
    )
    anchor: str = option(
        "prediction",
        "which token the entropy belongs to: the rollout's first token (prediction) or the prefix's last (token)",
        choices=("prediction", "token"),
        paper="token (Eq. 5-7); the authors' code: prediction",
    )
    entropy_temperature: float = option(
        1.0,
        "tau of the softmax over a chunk's entropies (Eq. 6) or scores; only for selection=entropy, surprise, query",
        above=0,
        paper="1",
    )
    smoothing_window: int | None = option(
        None, "width of the average pooling over entropies or scores; null: rollout_length", at_least=1, paper="k"
    )
    question_tokens: int = option(
        QUESTION_TOKENS,
        "so many tokens at the end of a prompt, at most half of it, are its question; only for selection=query",
        at_least=1,
    )
    temperature: float = option(1.0, "sampling temperature of the rollouts", above=0, paper="1.0 (Tab. D.1)")
    end_tokens: str = option(
        "sampled",
        "whether a rollout may write the tokens that end a text: as any other (sampled), or never, neither when it is "
        "written nor when its probabilities are trained (suppressed)",
        choices=END_TOKENS,
        paper="not stated; the authors' code: suppressed",
    )
    reward: str = option(
        "cosine",
        "cosine (Eq. 9), binary (Eq. 11), hybrid (Eq. 12), edit (1 - edit distance / k), or a function of yours by "
        "registered name or import path",
        paper="cosine; hybrid in post-training, binary at test time",
    )
    group: str = option(
        "sequence",
        "rollouts whose rewards are standardised together: all of a sequence's, or one position's",
        choices=("sequence", "position"),
        paper="sequence",
    )
    credit: str = option(
        "rollout",
        "what a token is credited with: its rollout's reward (rollout), or what it and the tokens after it earned, "
        "compared with the group's tokens at the same place (token)",
        choices=("rollout", "token"),
        paper="rollout",
    )
    grad_scope: str = option(
        "full",
        "full: the RL gradient flows through the prefix's state; branch: the state is detached",
        choices=("full", "branch"),
        paper="full",
    )
    rollouts_together: int = option(
        ROLLOUTS_TOGETHER,
        "rollouts that are written at a time, and trained at a time: so many copies of the model's state are in memory "
        "then. More of them are taken in pieces, which are computed again in the backward pass; only for rollout=fork",
        at_least=1,
    )
    rollout: str = option(
        "fork",
        "fork the state at each position, or recompute every prefix (slow; the oracle of the tests)",
        choices=("fork", "prefix"),
        paper="prefix",
    )

    @property
    def longest_rollout(self) -> int:
        """k: tokens of a rollout, or most of them."""
        return self.rollout_length if isinstance(self.rollout_length, int) else self.rollout_length.max

    @property
    def pooling_window(self) -> int:
        """`smoothing_window`, or k where it is null."""
        return self.longest_rollout if self.smoothing_window is None else self.smoothing_window

    @property
    def shortest_document(self) -> int:
        """Fewest tokens that hold c positions with k tokens after each: c + k."""
        return self.chunks + self.longest_rollout

    def check_without_rollouts(self, section: str = SECTION) -> None:
        """Refuse what says how rollouts are made, where there are none.

        Raises:
            ConfigError: names the key.
        """
        for name, default in _WITH_ROLLOUTS:
            if getattr(self, name) != default:
                raise ConfigError(
                    f"{section}.{name}", f"{getattr(self, name)} has no effect without rollouts: leave it out."
                )

    def _check_rules(self) -> None:
        for key, known in (("selection", SELECTIONS), ("reward", REWARDS)):
            value = getattr(self, key)
            # what can be no name; whether the function exists is known once users' packages are imported
            if not re.fullmatch(r"[\w-]+([.:]\w+)*", value):
                raise ConfigError(
                    f"refine.nsp.{key}",
                    f"{value!r} is no name of a function. Allowed: {', '.join(known)}, a name that a package of yours "
                    f"registers, or an import path (package.module.function).{did_you_mean(value, known)}",
                )
        if self.credit == "token" and self.rollout_length == 1:
            raise ConfigError(
                "refine.nsp.credit",
                "token has no effect with refine.nsp.rollout_length=1: remove it or make rollouts longer.",
            )
        if self.rollout == "prefix" and self.rollouts_together != ROLLOUTS_TOGETHER:
            raise ConfigError(
                "refine.nsp.rollouts_together",
                f"{self.rollouts_together} has no effect with refine.nsp.rollout=prefix, which forks no states: leave "
                "it out.",
            )
        if self.selection in SELECTIONS and self.selection not in DRAWN and self.entropy_temperature != 1.0:
            raise ConfigError(
                "refine.nsp.entropy_temperature",
                f"has no effect with refine.nsp.selection={self.selection}: remove it or set selection=entropy.",
            )
        if self.selection in SELECTIONS and self.selection != "query" and self.question_tokens != QUESTION_TOKENS:
            raise ConfigError(
                "refine.nsp.question_tokens",
                f"has no effect with refine.nsp.selection={self.selection}: remove it or set selection=query.",
            )
