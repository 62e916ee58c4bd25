"""The page: escaped, self-contained, complete, and usable for a long document."""

from __future__ import annotations

import math
import random
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from refine_verl.config import NSPSettings
from refine_verl.inspect.analysis import Inspection, Position, Rollout
from refine_verl.inspect.page import render
from refine_verl.inspect.settings import InspectSettings
from refine_verl.inspect.style import LEVELS
from refine_verl.inspect.terminal import WHOLE_TEXT_TOKENS, show
from refine_verl.inspect.view import View
from refine_verl.nsp import chunk_bounds

KEYS = ("refine.nsp.chunks=3", "refine.nsp.rollout_length=4")


@pytest.fixture(scope="module")
def view(look: Callable[..., View]) -> View:
    return look(*KEYS)


@pytest.fixture(scope="module")
def page(view: View) -> ET.Element:
    """As XML, which it also is: a stricter check than any HTML parser's."""
    return ET.fromstring(render(view).removeprefix("<!DOCTYPE html>\n"))


def with_class(root: ET.Element, name: str) -> list[ET.Element]:
    return [element for element in root.iter() if name in (element.get("class") or "").split()]


def made_up(count: int, chunks: int = 8, length: int = 5) -> View:
    """An inspection of `count` tokens without a model."""
    generator = random.Random(0)
    values = [float("nan"), *(generator.random() * 8 for _ in range(count - 1))]
    words = [b" the", b"\n", b" recurrent", b".", b" state"]
    bounds = chunk_bounds(count - length, chunks)
    rollout = Rollout([0, 1, 2, 3, 4], -9.0, {"cosine": 0.5, "binary": 0.2, "hybrid": 0.7}, [0.0] * 5)
    inspection = Inspection(
        score=None,
        tokens=[generator.randrange(5) for _ in range(count)],
        entropy=values,
        smoothed=values,
        surprise=values,
        correct=[False] * count,
        chunks=bounds,
        chance=[1 / count] * count,
        positions=[Position(start + 3, [0, 1, 2, 3, 4], [rollout] * 4) for start, _ in bounds],
        group_zero_std=1.0,
    )
    nsp = NSPSettings(chunks=chunks, rollout_length=length, rollouts_per_position=4)
    settings = InspectSettings(model="m", text="t", nsp=nsp)
    return View("t", "delta_net", inspection, settings, 0, lambda token: words[token])


def test_the_whole_text_is_there_and_escaped(page: ET.Element, view: View) -> None:
    (box,) = with_class(page, "text")
    shown = "".join("".join(token.itertext()) for token in box.iter("span"))
    for piece in ("</script> & <b>bold</b>", "“naïve 中文 😀”,   then␍\n", "\n\tIt said"):
        assert piece in shown
    assert not list(page.iter("script"))


def test_no_tag_of_the_text_becomes_markup(view: View) -> None:
    """Bytes are tokens here: joined without their spans they must still be escaped."""
    text = render(view)
    assert "<script" not in text and "</script" not in text
    whole = replace(view, to_bytes=lambda token: b"</script><img src=x onerror=alert(1)> & \"'")
    page = ET.fromstring(render(whole).removeprefix("<!DOCTYPE html>\n"))
    assert not list(page.iter("script")) and not list(page.iter("img"))
    (box,) = with_class(page, "text")
    assert "".join(next(box.iter("span")).itertext()) == "</script><img src=x onerror=alert(1)> & \"'"


def test_names_are_escaped(view: View) -> None:
    page = ET.fromstring(render(replace(view, name="<i>a & b</i>")).removeprefix("<!DOCTYPE html>\n"))
    assert page.findtext("body/main/header/h1") == "<i>a & b</i>"


def test_self_contained_without_script(page: ET.Element) -> None:
    assert not {e.tag for e in page.iter()} & {"script", "link", "img", "iframe", "object", "use", "image", "form"}
    for element in page.iter():
        assert not {name for name in element.attrib if name.startswith("on")} | ({"src", "style"} & set(element.attrib))
        assert (element.get("href") or "#").startswith("#")
    style = page.findtext("head/style") or ""
    assert "url(" not in style and "@import" not in style
    assert "prefers-color-scheme: dark" in style and "@media print" in style
    policy = next(meta.get("content") for meta in page.iter("meta") if meta.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_every_link_has_its_target(page: ET.Element) -> None:
    names = [element.get("id") for element in page.iter() if element.get("id")]
    assert len(names) == len(set(names))
    links = {element.get("href") for element in page.iter("a")}
    assert {f"#p{n}" for n in (1, 2, 3)} | {f"#t{n}" for n in (1, 2, 3)} == links
    assert {link[1:] for link in links} <= set(names)


def test_marks_lie_between_prefix_and_continuation(page: ET.Element, view: View) -> None:
    (box,) = with_class(page, "text")
    inline = [e for part in with_class(box, "tokens") for e in part]
    for order, position in enumerate(view.inspection.positions, start=1):
        place = next(i for i, e in enumerate(inline) if e.get("id") == f"t{order}")
        before = (inline[place - 1].get("title") or "").split(" · ")[0]
        after = [e for e in inline[place:] if e.tag == "span"][: len(position.target)]
        assert before == str(position.index)
        assert all("gt" in (token.get("class") or "").split() for token in after)


def test_tooltips_and_heat_follow_the_numbers(page: ET.Element, view: View) -> None:
    (box,) = with_class(page, "text")
    tokens = list(box.iter("span"))
    assert len(tokens) == len(view.inspection.tokens)
    hot = max(range(1, len(tokens)), key=lambda index: view.inspection.smoothed[index])
    assert f"h{LEVELS - 1}" in (tokens[hot].get("class") or "").split()
    assert f"smoothed {view.inspection.smoothed[hot]:.2f}" in (tokens[hot].get("title") or "")
    assert tokens[0].get("title") == "0 · nothing predicts the first token"


def test_the_scale_spans_what_is_there() -> None:
    view = made_up(400)
    order = sorted(range(1, 400), key=lambda index: view.inspection.smoothed[index])
    levels = [view.level(index) for index in order]
    assert levels == sorted(levels) and set(levels) == set(range(LEVELS))


def with_smoothed(view: View, values: Sequence[float]) -> View:
    return replace(view, inspection=replace(view.inspection, smoothed=[float("nan"), *values]))


def scale_text(view: View) -> str:
    (scale,) = with_class(ET.fromstring(render(view).removeprefix("<!DOCTYPE html>\n")), "scale")
    return " ".join("".join(scale[0].itertext()).split())


def test_a_model_that_is_unsure_everywhere_still_has_contrast() -> None:
    """Random weights: 4.80 to 4.90 nats would all be the hottest colour on a scale from 0."""
    view = with_smoothed(made_up(101), [4.8 + 0.001 * index for index in range(100)])
    levels = [view.level(index) for index in range(1, 101)]
    assert levels == sorted(levels) and set(levels) == set(range(LEVELS))
    # without the outermost 2%; the figures tell this page from one on which the model is sure of itself
    assert scale_text(view) == "Smoothed entropy, nats: 4.80 4.83 4.85 4.87 4.90 (the range of this text)"
    assert "smoothed 4.85 " in view.facts(51)
    sure = with_smoothed(made_up(101), [0.02 * index for index in range(100)])
    assert scale_text(sure) == "Smoothed entropy, nats: 0.0 0.5 1.0 1.5 1.9 (the range of this text)"


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([5.0] * 100, "5.00"),
        ([5.0 + 1e-6 * (index % 3) for index in range(100)], "5.00"),  # rounding is not blown up
        ([math.nan] * 100, "–"),
        ([2.5] + [math.nan] * 99, "2.50"),
    ],
    ids=["equal", "rounding", "not finite", "one"],
)
def test_nothing_to_tell_apart(values: list[float], shown: str) -> None:
    view = with_smoothed(made_up(101), values)
    assert {view.level(index) for index in range(101)} == {0}
    assert scale_text(view) == f"Smoothed entropy, nats: {shown} everywhere"
    text = printed(view)
    assert f"bars {shown} everywhere · colours {shown} everywhere" in text and not set("▂▃▄▅▆▇█") & set(text)


def test_a_few_that_differ_from_all_others_are_seen() -> None:
    view = with_smoothed(made_up(201), [5.0] * 199 + [1.0])
    assert [view.level(index) for index in (1, 199, 200)] == [LEVELS - 1, LEVELS - 1, 0]


def test_a_long_document_stays_usable() -> None:
    text = render(made_up(16384))
    assert len(text.encode()) < 5_000_000
    root = ET.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    (box,) = with_class(root, "text")
    assert len(list(box.iter("span"))) == 16384 and len(with_class(box, "chunk")) == 9
    assert all(len(path.get("d") or "") < 20_000 for path in root.iter("path"))


def test_settings_are_on_the_page(page: ET.Element) -> None:
    text = " ".join(" ".join(page.find(".//details").itertext()).split())  # type: ignore[union-attr]
    assert "refine.nsp.chunks 3" in text and "seed 0" in text and "grad_scope" not in text


# Terminal


def printed(view: View, width: int = 120) -> str:
    console = Console(file=StringIO(), width=width, force_terminal=False)
    show(view, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_terminal_shows_text_marks_and_rollouts(view: View) -> None:
    text = printed(view)
    assert "</script> & <b>bold</b>" in re.sub("┃|▶.◀", "", text)
    for order, position in enumerate(view.inspection.positions, start=1):
        assert text.count(f"▶{order}◀") == 1
        assert f"position {order} after token {position.index} · next token: entropy" in text
    assert text.count("┃") >= 2 and "↵" in text and "⇥" in text
    rewards = [line for line in text.splitlines() if line.startswith(("1 ", "2 ", "3 ", "4 "))]
    assert len(rewards) == 12


def test_an_adapter_is_named(view: View) -> None:
    model = view.settings.model
    adapted = replace(view, settings=replace(view.settings, adapter="kept/adapter"))
    for shown, plain in ((printed(adapted), printed(view)), (render(adapted), render(view))):
        assert f"{model} with kept/adapter" in shown and "with kept" not in plain


def test_terminal_shows_surroundings_of_a_long_text() -> None:
    view = made_up(WHOLE_TEXT_TOKENS + 1)
    text = printed(view)
    assert "shown around the positions only" in text and text.count("▶8◀") == 1
    assert len(text) < 40_000
    assert "shown around" not in printed(made_up(WHOLE_TEXT_TOKENS))


def test_bars_span_the_range_they_name() -> None:
    """Bars are means over tokens and differ less than tokens do: they have a range of their own."""
    waves = [4.85 + 0.04 * math.sin(index / 50) + 0.05 * (-1) ** index for index in range(1199)]
    text = printed(with_smoothed(made_up(1200, chunks=2), waves))
    assert set("▁▂▃▄▅▆▇█") <= set(text)
    assert "bars ▁ 4.81 to █ 4.89 · colours 4.76 to 4.94" in text
