"""The inspection on a terminal: the same text, marks and tables as the page, as far as a terminal goes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from refine_verl.inspect.analysis import Position, Rollout
from refine_verl.inspect.glyphs import Glyph, Kind, plain
from refine_verl.inspect.style import LEVELS
from refine_verl.inspect.view import Scale, View, finite, rollout_figures
from refine_verl.record.format import format_number
from refine_verl.report.series import buckets

WHOLE_TEXT_TOKENS = 1200
"""A longer text is shown around its positions only; the page has all of it."""

_AROUND = 40  # tokens of a longer text shown before and after a position
_BLOCKS = "▁▂▃▄▅▆▇█"
_COLD, _HOT = (70, 60, 50), (190, 88, 20)  # backgrounds on which white stays readable


def show(view: View, console: Console) -> None:
    """Print the whole inspection."""
    for part in _parts(view, console):
        console.print(part, soft_wrap=isinstance(part, Text) and part.no_wrap is True)


def _parts(view: View, console: Console) -> Iterator[Text | Table]:
    inspection = view.inspection
    left_out = f", {view.left_out} more left out by max_length" if view.left_out else ""
    yield Text.assemble(
        (view.name, "bold"), f" · {view.model} ({view.model_type}) · {len(inspection.tokens)} tokens{left_out}"
    )
    loss, right = fmean(inspection.surprise[1:]), sum(inspection.correct) / (len(inspection.tokens) - 1)
    rewards = [rollout.rewards[view.reward] for rollout in inspection.rollouts]
    yield Text(
        f"next-token loss {format_number(loss)} nats, {format_number(right, percent=True)} right · "
        f"mean {view.reward} reward {format_number(fmean(rewards))} · "
        f"groups without signal {format_number(inspection.group_zero_std, percent=True)}"
    )
    yield Text()
    yield from _profile(view, console.width)
    yield Text()
    yield from _text(view)
    for order, position in enumerate(inspection.positions, start=1):
        yield Text()
        yield _title(view, order, position)
        yield _table(view, position)


def _profile(view: View, width: int) -> Iterator[Text | Table]:
    """What positions are drawn by along each chunk, in block characters, blue at the chosen position."""
    table = Table.grid(padding=(0, 2))
    columns = max(min(width - 40, 60), 10)
    chunks = [_columns(view, start, stop, columns) for start, stop in view.inspection.chunks]
    scale = Scale.of(mean for chunk in chunks for _, _, mean in chunk)  # means differ less than tokens do
    for index, (chunk, position) in enumerate(zip(chunks, view.inspection.positions, strict=True), start=1):
        blocks = Text()
        for first, last, mean in chunk:
            chosen = first <= position.index < last
            block = _BLOCKS[round(scale.share(mean) * (len(_BLOCKS) - 1))]
            blocks.append(block, "bold blue" if chosen else "yellow")
        tokens = Text(f"tokens {chunk[0][0]}–{chunk[-1][1] - 1}", style="dim")
        table.add_row(Text(f"chunk {index}"), tokens, blocks, Text(f"position {index} after {position.index}", "blue"))
    yield table
    yield Text(f"{view.measure}: bars {_ends(scale, _BLOCKS)} · colours {_ends(view.heat)}", "dim")


def _columns(view: View, start: int, stop: int, columns: int) -> list[tuple[int, int, float]]:
    """(first token, token behind the last, mean of what positions are drawn by) of each bar of a chunk."""
    found = []
    for first, last in buckets(stop - start, columns):
        values = finite(view.inspection.looked_by[start + first : start + last])
        found.append((start + first, start + last, fmean(values) if values else math.nan))
    return found


def _ends(scale: Scale, blocks: str = "") -> str:
    """`▁ 4.81 to █ 4.90`"""
    if scale.flat:
        return f"{scale.text(scale.low)} everywhere"
    low, high = scale.text(scale.low), scale.text(scale.high)
    return f"{blocks[0]} {low} to {blocks[-1]} {high}" if blocks else f"{low} to {high}"


def _text(view: View) -> Iterator[Text]:
    count = len(view.inspection.tokens)
    if count <= WHOLE_TEXT_TOKENS:
        yield _tokens(view, 0, count)
        return
    yield Text(f"{count} tokens: shown around the positions only; out=page.html shows all of them", style="dim")
    for position in view.inspection.positions:
        start, stop = max(position.index - _AROUND, 0), min(position.index + _AROUND, count)
        yield Text.assemble("… ", _tokens(view, start, stop), " …")


def _tokens(view: View, start: int, stop: int) -> Text:
    """Tokens on backgrounds from cold to hot; `┃` is a chunk border, `▶3◀` the end of position 3's prefix."""
    borders = {first for first, _ in view.inspection.chunks[1:]}
    text = Text()
    for index in range(start, stop):
        if index in borders:
            text.append("┃", "bold")
        style = _heat(view.level(index)) + Style(underline=index in view.continuations)
        for part in view.shown[index]:
            if part.kind is Kind.NEWLINE:
                text.append("↵", style + Style(dim=True))
                text.append("\n")
            else:
                text.append(plain([part]), style)
        if order := view.order_after.get(index):
            text.append(f"▶{order}◀", "bold white on blue")
    return text


def _heat(level: int) -> Style:
    if not level:
        return Style()
    share = level / (LEVELS - 1)
    red, green, blue = (round(cold + share * (hot - cold)) for cold, hot in zip(_COLD, _HOT, strict=True))
    return Style(color="white", bgcolor=f"rgb({red},{green},{blue})")


def _title(view: View, order: int, position: Position) -> Text:
    seen, index = view.inspection, position.index
    chance = "" if seen.chance is None else format_number(seen.chance[index], percent=True, digits=3)
    return Text.assemble(
        (f"position {order}", "bold blue"),
        f" after token {index} · next token: entropy {format_number(seen.entropy[index + 1], digits=3)}, smoothed "
        f"{format_number(seen.smoothed[index + 1], digits=3)}"
        + (f" · {score}" if (score := view.score(index + 1)) else "")
        + (f" · chosen with probability {chance}" if chance else ""),
    )


def _table(view: View, position: Position) -> Table:
    table = Table(show_edge=False, pad_edge=False, expand=True, header_style="dim")
    table.add_column("")
    table.add_column("continuation", overflow="fold", ratio=1, min_width=12)
    for name in ("log p", *view.rewards, "advantage"):
        table.add_column(name, justify="right", no_wrap=True)
    true = _continuation(view.continuation(position, position.target))
    table.add_row("true", true, view.true_log_prob(position), *["–"] * (len(view.rewards) + 1))
    for n, rollout in enumerate(position.rollouts, start=1):
        table.add_row(str(n), *_rollout(view, position, rollout))
    return table


def _rollout(view: View, position: Position, rollout: Rollout) -> list[Text]:
    log_prob, rewards, advantage = rollout_figures(position, rollout, view.rewards)
    color = "green" if rollout.advantage > 0 else "yellow" if rollout.advantage < 0 else "dim"
    return [
        _continuation(view.continuation(position, rollout.tokens), position.right(rollout)),
        Text(log_prob),
        *(Text(text, "bold" if bold else "") for text, bold in rewards),
        Text(advantage, color),
    ]


def _continuation(parts: Sequence[list[Glyph]], right: Sequence[bool] = ()) -> Text:
    shown = zip(parts, right or [False] * len(parts), strict=True)
    return Text.assemble(*((plain(part), "bold green underline" if good else "") for part, good in shown))
