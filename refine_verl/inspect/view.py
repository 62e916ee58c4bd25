"""An inspection together with what is shown of it, shared by the page and the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from refine_verl.inspect.analysis import SHOWN_REWARDS, Inspection, Position, Rollout
from refine_verl.inspect.glyphs import Glyph, TokenBytes, glyphs
from refine_verl.inspect.settings import InspectSettings
from refine_verl.inspect.style import LEVELS
from refine_verl.record.format import MINUS, format_number

_CONTEXT = 4  # tokens before a position that may hold the beginning of a character
_WITHIN = 0.98  # a few outliers at either end do not make the rest pale
_SCORES = {"surprise": "rewriting of the fast weights", "query": "resemblance to the end"}
_NOISE = 1e-4  # nats: rounding, as where a model predicts the same everywhere


def finite(values: Iterable[float]) -> list[float]:
    """Those that are neither NaN nor infinite."""
    return [value for value in values if math.isfinite(value)]


def rollout_figures(
    position: Position, rollout: Rollout, names: Sequence[str]
) -> tuple[str, list[tuple[str, bool]], str]:
    """Log-probability, each reward and whether it is a position's best cosine, and the advantage with its sign."""
    best = max(other.rewards["cosine"] for other in position.rollouts)
    rewards = [
        (format_number(rollout.rewards[name]), name == "cosine" and rollout.rewards[name] == best) for name in names
    ]
    return format_number(rollout.log_prob), rewards, signed(rollout.advantage)


def signed(value: float) -> str:
    """A number with its sign."""
    return ("+" if value > 0 else "") + format_number(value)


@dataclass(frozen=True)
class Scale:
    """The range of entropies or scores that colours or bars stand for; both ends are NaN where there is none."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Scale:
        """The 2nd to 98th percentile of the finite values; all of them where most are the same."""
        ordered = sorted(finite(values))
        if not ordered:
            return cls(math.nan, math.nan)
        low, high = (ordered[round(share * (len(ordered) - 1))] for share in (1 - _WITHIN, _WITHIN))
        return cls(low, high) if high - low > _NOISE else cls(ordered[0], ordered[-1])

    @property
    def flat(self) -> bool:
        """Whether there is no difference to show."""
        return not self.high - self.low > _NOISE

    def share(self, value: float) -> float:
        """Place on the scale, 0 to 1; 0 on a flat one, and for what is not finite."""
        if self.flat or not math.isfinite(value):
            return 0.0
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def text(self, value: float, decimals: int = 1) -> str:
        """A value with as many decimals as tell a quarter of the scale apart, and at least `decimals`."""
        if not math.isfinite(value):
            return format_number(None)
        needed = 2 if self.flat else -math.floor(math.log10((self.high - self.low) / 4))
        return f"{value:.{max(needed, decimals)}f}"


@dataclass(frozen=True)
class View:
    """What is shown.

    Attributes:
        name: of the text.
        model_type: of the model.
        inspection: the numbers.
        settings: how they were made.
        left_out: tokens behind `max_length`.
        to_bytes: of a token.
        special: ids of tokens that stand for no text of their own.
    """

    name: str
    model_type: str
    inspection: Inspection
    settings: InspectSettings
    left_out: int
    to_bytes: TokenBytes
    special: frozenset[int] = field(default_factory=frozenset)

    @property
    def model(self) -> str:
        """What was asked: the model, with its adapter if it has one."""
        adapter = self.settings.adapter
        return self.settings.model if adapter is None else f"{self.settings.model} with {adapter}"

    @property
    def reward(self) -> str:
        """The reward that would train, by name or import path."""
        return self.settings.nsp.reward

    @property
    def rewards(self) -> tuple[str, ...]:
        """Names of the rewards shown."""
        return tuple(dict.fromkeys((*SHOWN_REWARDS, self.reward)))

    @cached_property
    def shown(self) -> list[list[Glyph]]:
        """What is drawn for each token of the text."""
        return glyphs([self.to_bytes(token) for token in self.inspection.tokens])

    @cached_property
    def order_after(self) -> dict[int, int]:
        """Token index -> number (from 1) of the position whose prefix it ends."""
        return {position.index: order for order, position in enumerate(self.inspection.positions, start=1)}

    @cached_property
    def continuations(self) -> frozenset[int]:
        """Indices of tokens that are the true continuation of a position."""
        return frozenset(
            position.index + step
            for position in self.inspection.positions
            for step in range(1, len(position.target) + 1)
        )

    @cached_property
    def heat(self) -> Scale:
        """Of the colours: the text's own range, so that there is contrast however sure or unsure the model is."""
        return Scale.of(self.inspection.looked_by)

    @property
    def measure(self) -> str:
        """What the colours stand for, and its unit."""
        if self.inspection.score is None:
            return "smoothed entropy, nats"
        return f"smoothed {_SCORES[self.settings.nsp.selection]}, standard deviations from the mean"

    def score(self, index: int) -> str:
        """What positions are drawn by at a token, if it is not the entropy."""
        if self.inspection.score is None:
            return ""
        return f"{_SCORES[self.settings.nsp.selection]} {self.heat.text(self.inspection.score[index], 2)}"

    def level(self, index: int) -> int:
        """Step of the heat scale of a token, 0 (none) to LEVELS - 1."""
        return round(self.heat.share(self.inspection.looked_by[index]) * (LEVELS - 1))

    def facts(self, index: int) -> str:
        """A line of numbers about a token of the text."""
        seen = self.inspection
        if index == 0:
            return "0 · nothing predicts the first token"
        scale = self.heat if seen.score is None else Scale.of(seen.smoothed)
        entropy = f"H {seen.entropy[index]:.2f}, smoothed {scale.text(seen.smoothed[index], 2)}"
        text = f"{index} · {entropy} · {MINUS}log p {seen.surprise[index]:.2f}"
        text += f" · {score}" if (score := self.score(index)) else ""
        chance = None if seen.chance is None else seen.chance[index]
        return text + (f" · chosen with {100 * chance:.2g}%" if chance else "")

    def true_log_prob(self, position: Position) -> str:
        """Of the true continuation; comparable only where rollouts are sampled from the unscaled distribution."""
        if self.settings.nsp.temperature != 1:
            return "–"
        first = position.index + 1
        return format_number(-sum(self.inspection.surprise[first : first + len(position.target)]))

    def continuation(self, position: Position, tokens: Sequence[int]) -> list[list[Glyph]]:
        """What is drawn for tokens that follow a position, a character begun before it included."""
        start = max(position.index + 1 - _CONTEXT, 0)
        before = b"".join(self.to_bytes(token) for token in self.inspection.tokens[start : position.index + 1])
        return glyphs([self.to_bytes(token) for token in tokens], before)
