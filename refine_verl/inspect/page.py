"""The inspection as one self-contained page, in the visual language of the reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean, pstdev

from refine_verl.inspect.analysis import Inspection, Position, Rollout
from refine_verl.inspect.drawing import averaged_tokens, render_curve
from refine_verl.inspect.glyphs import Glyph, Kind
from refine_verl.inspect.settings import InspectSettings
from refine_verl.inspect.style import LEVELS, STYLE
from refine_verl.inspect.view import Scale, View, finite, rollout_figures, signed
from refine_verl.record.format import MINUS, format_number
from refine_verl.report.markup import Markup, el, join
from refine_verl.report.page import figure, folded, header, key_table, number_cells, render_page, sample, tile

PREFIX_TOKENS = 48  # of the prefix, shown above what follows it


def render(view: View) -> str:
    """The page as text."""
    inspection = view.inspection
    return render_page(
        f"{view.name} · REFINE inspection",
        _header(view),
        el("section", *_headlines(inspection, view.reward), class_="tiles", aria_label="Key figures"),
        el("section", el("h2", "Uncertainty along the text"), _curve(inspection)),
        el("section", el("h2", "Where REFINE looks"), _scale(view), _text(view)),
        el("section", el("h2", "What the model would say"), _reading(view), *_positions(view)),
        _settings(view.settings),
        el("footer", "Made by python -m refine_verl.inspect"),
        style=STYLE,
    )


def _header(view: View) -> Markup:
    left_out = f" ({view.left_out} more left out by max_length)" if view.left_out else ""
    facts = [
        f"model {view.model}",
        f"{len(view.inspection.tokens)} tokens{left_out}",
        f"seed {view.settings.seed}",
    ]
    return header(f"REFINE inspection · {view.model_type}", view.name, facts)


def _headlines(inspection: Inspection, reward: str) -> list[Markup]:
    entropy = finite(inspection.entropy)
    chosen = finite([inspection.entropy[position.index + 1] for position in inspection.positions])
    rewards = [rollout.rewards[reward] for rollout in inspection.rollouts]
    exact = [rollout.rewards["binary"] for rollout in inspection.rollouts]
    predicted = len(inspection.tokens) - 1
    right = format_number(sum(inspection.correct) / predicted, percent=True)
    zero_std = format_number(inspection.group_zero_std, percent=True)
    return [
        tile(
            "Next-token loss",
            format_number(fmean(inspection.surprise[1:])),
            unit="nats",
            detail=f"{right} of tokens predicted right",
        ),
        tile(
            "Entropy",
            format_number(fmean(entropy)) if entropy else "–",
            unit="nats",
            detail=f"{format_number(fmean(chosen)) if chosen else '–'} of the first token to be written",
        ),
        tile(
            f"Reward ({reward})",
            format_number(fmean(rewards)),
            detail=f"± {format_number(pstdev(rewards))} over {len(rewards)} rollouts",
        ),
        tile(
            "Right tokens",
            format_number(fmean(exact), percent=True),
            detail=f"of those written; groups without signal: {zero_std}",
        ),
    ]


def _curve(inspection: Inspection) -> Markup:
    window = averaged_tokens(len(inspection.tokens))
    faint, bold = ("smoothed", f"mean of {window} tokens") if window else ("entropy of each token", "smoothed")
    legend = el(
        "ul",
        el("li", sample("M0 5H20", "line raw c2"), faint),
        el("li", sample("M0 5H20", "line c2"), bold),
        el("li", sample("M10 0V10", "border"), "chunk border"),
        el("li", sample("M10 0V10", "stem"), "chosen position"),
        class_="legend",
    )
    drawing = el("div", render_curve(inspection), class_="scroll")
    return figure("Entropy", "nats", legend, drawing, "card wide")


# The text


def _scale(view: View) -> Markup:
    return el(
        "div",
        _heat_scale(view.heat, f"{view.measure[0].upper()}{view.measure[1:]}: "),
        el("span", el("a", "1", class_="at", href="#t1"), "chosen position: the prefix ends before it"),
        el("span", el("span", el("span", "text", class_="gt"), class_="tokens"), " its true continuation"),
        class_="scale",
    )


def _heat_scale(heat: Scale, measure: str) -> Markup:
    """What the colours stand for; two pages can only be told apart by its figures."""
    if heat.flat:
        return el("span", measure, el("b", heat.text(heat.low)), " everywhere")
    values = [(level, heat.low + (heat.high - heat.low) * level / (LEVELS - 1)) for level in range(0, LEVELS, 2)]
    steps = [join(el("b", heat.text(value), class_=f"h{level}"), " ") for level, value in values]
    return el("span", measure, *steps, "(the range of this text)")


def _text(view: View) -> Markup:
    """The whole text, chunk by chunk, in a box that scrolls on a screen and grows on paper."""
    inspection, count = view.inspection, len(view.inspection.tokens)
    pieces = []
    for index, (start, stop) in enumerate(inspection.chunks, start=1):
        entropy = finite(inspection.entropy[start:stop])
        mean = f" · mean entropy {format_number(fmean(entropy), digits=3)}" if entropy else ""
        pieces.append((f"Chunk {index} · tokens {start}–{stop - 1}{mean}", start, stop))
    end = inspection.chunks[-1][1]
    pieces.append((f"Last {count - end} tokens: no room for a rollout after them", end, count))
    parts = [el("div", el("h3", head), _tokens(view, *bounds), class_="chunk") for head, *bounds in pieces]
    box = {"tabindex": "0", "role": "region", "aria_label": "The text with its entropy"}
    return el("div", el("div", *parts, class_="text", **box), class_="card flow")


def _tokens(view: View, start: int, stop: int, *, plain: bool = False) -> Markup:
    """Tokens start ... stop-1; `plain` leaves out marks and tooltips."""
    parts = [Markup("… ")] if plain and start else []
    for index in range(start, stop):
        parts.append(_token(view, index, plain))
        order = view.order_after.get(index)
        if order and not plain:
            link = {"href": f"#p{order}", "id": f"t{order}", "aria_label": f"Position {order}: to its rollouts"}
            parts.append(el("a", order, class_="at", **link))
    return el("p", *parts, class_="tokens")


def _token(view: View, index: int, plain: bool) -> Markup:
    classes = []
    if level := view.level(index):
        classes.append(f"h{level}")
    if index in view.continuations and not plain:
        classes.append("gt")
    if view.inspection.tokens[index] in view.special:
        classes.append("special")
    title = None if plain else view.facts(index)
    return el("span", *_marked(view.shown[index]), class_=" ".join(classes) or None, title=title)


def _marked(parts: Sequence[Glyph]) -> list[Markup | str]:
    marked: list[Markup | str] = []
    for part in parts:
        if part.kind is Kind.TEXT:
            marked.append(part.text)
        elif part.kind is Kind.SPACE:
            marked.append(el("i", part.text))
        elif part.kind in (Kind.NEWLINE, Kind.TAB):
            marked += [el("b", class_=part.kind.value), part.text]
        else:
            marked.append(el("b", part.text, class_=part.kind.value))
    return marked


# The rollouts


def _reading(view: View) -> Markup:
    nsp = view.settings.nsp
    compared = (
        f"all {nsp.chunks * nsp.rollouts_per_position} rollouts"
        if nsp.group == "sequence"
        else f"the {nsp.rollouts_per_position} rollouts of its position"
    )
    how = "standardised" if view.settings.norm_adv_by_std_in_grpo else "less their mean"
    what = (
        f"its {view.reward} reward among those of {compared}, {how}."
        if nsp.credit == "rollout"
        else f"the mean over its tokens of what each and those after it earned ({view.reward} reward), {how} "
        f"place by place among {compared}; that of a token is its tooltip."
    )
    return el(
        "p",
        f"At each position the true continuation and what the model writes there. Tokens that are right at their place "
        f"are green and underlined; the highest cosine of a position is bold. The advantage says how much a rollout "
        f"would be reinforced (+) or discouraged ({MINUS}): {what}",
        class_="note reading",
    )


def _positions(view: View) -> list[Markup]:
    largest = max(finite([abs(rollout.advantage) for rollout in view.inspection.rollouts]), default=0.0)
    return [_position(view, order, position, largest) for order, position in enumerate(view.inspection.positions, 1)]


def _position(view: View, order: int, position: Position, largest: float) -> Markup:
    inspection, index = view.inspection, position.index
    facts = [
        f"next token: entropy {format_number(inspection.entropy[index + 1], digits=3)}",
        f"smoothed {format_number(inspection.smoothed[index + 1], digits=3)}",
    ]
    if score := view.score(index + 1):
        facts.append(score)
    if inspection.chance is not None:
        chance = format_number(inspection.chance[index], percent=True, digits=3)
        start, stop = inspection.chunks[order - 1]
        facts.append(f"chosen with probability {chance} among {stop - start}")
    start = max(index + 1 - PREFIX_TOKENS, 0)
    prefix = _tokens(view, start, index + 1, plain=True)
    names = view.rewards
    head = el(
        "tr",
        *(el("th", name) for name in ("", "continuation")),
        *(el("th", name, class_="number") for name in ("log p", *names, "advantage")),
    )
    numbers = number_cells([view.true_log_prob(position), *["–"] * (len(names) + 1)])
    truth = el("tr", el("th", "true"), _written(view, position, position.target), *numbers, class_="truth")
    rows = [_rollout(view, n, rollout, position, largest) for n, rollout in enumerate(position.rollouts, start=1)]
    table = el("table", el("thead", head), el("tbody", truth, *rows), class_="rollouts")
    back = el("a", order, class_="at", href=f"#t{order}", aria_label=f"Position {order}: to its place in the text")
    return el(
        "section",
        el("h3", back, f"After token {index}"),
        el("p", " · ".join(facts), class_="facts"),
        el("div", prefix, class_="prefix"),
        el("div", table, class_="scroll"),
        class_="card position",
        id=f"p{order}",
    )


def _rollout(view: View, n: int, rollout: Rollout, position: Position, largest: float) -> Markup:
    log_prob, rewards, advantage = rollout_figures(position, rollout, view.rewards)
    shown = [el("b", text, class_="best") if bold else text for text, bold in rewards]
    numbers = number_cells([log_prob, *shown, join(advantage, _bar(rollout.advantage, largest))])
    each = rollout.advantages if view.settings.nsp.credit == "token" else ()
    return el("tr", el("th", n), _written(view, position, rollout.tokens, position.right(rollout), each), *numbers)


def _written(
    view: View,
    position: Position,
    tokens: Sequence[int],
    right: Sequence[bool] = (),
    advantages: Sequence[float] = (),
) -> Markup:
    """A cell with a continuation in one line, whatever newlines it has; tokens' own advantages are tooltips."""
    shown, marks = [], right or [False] * len(tokens)
    titles: list[str | None] = [f"advantage {signed(value)}" for value in advantages] or [None] * len(tokens)
    for parts, good, title in zip(view.continuation(position, tokens), marks, titles, strict=True):
        signs = [Glyph(Kind.SIGN, "↵") if part.kind is Kind.NEWLINE else part for part in parts]
        shown.append(el("span", *_marked(signs), class_="same" if good else None, title=title))
    return el("td", *shown, class_="tokens")


def _bar(advantage: float, largest: float) -> Markup:
    share = 30 * advantage / largest if largest and math.isfinite(advantage) else 0.0
    left, width = (32.0, share) if share >= 0 else (32.0 + share, -share)
    bar = el("path", class_="up" if share >= 0 else "down", d=f"M{left:.1f} 1h{width:.1f}v8h-{width:.1f}z")
    return el(
        "svg", el("path", class_="axis", d="M32 0V10"), bar, class_="bars", viewBox="0 0 64 10", aria_hidden="true"
    )


def _settings(settings: InspectSettings) -> Markup:
    values = asdict(settings)
    nsp = values.pop("nsp")
    nsp.pop("grad_scope")
    return el("section", folded("Settings", key_table({**values, "refine": {"nsp": nsp}}), "card"))
