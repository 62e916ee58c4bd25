"""The page in a real browser: no request, no complaint, visible text and marks; by keyboard, in the dark, on paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from reference.browser import Browser, browser, find_browser

from refine_verl.inspect.page import render
from refine_verl.inspect.view import View

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome on this machine")

BACKGROUND = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def page(look: Callable[..., View], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(render(look("refine.nsp.chunks=3", "refine.nsp.rollout_length=4")), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


def test_nothing_is_asked_for_and_nothing_complained_about(chromium: Browser, page: Path) -> None:
    chromium.emulate()
    chromium.open(page)
    assert chromium.requests == [page.resolve().as_uri()]
    assert chromium.problems == []
    assert chromium.run("document.compatMode") == "CSS1Compat"
    assert chromium.run("document.documentElement.scrollWidth <= innerWidth")


def test_a_request_would_be_seen_and_refused(chromium: Browser, page: Path, tmp_path: Path) -> None:
    """Negative control: what a page that is not self-contained looks like from here."""
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("<main>", '<main><img src="other.png"/><script>1</script>'))
    chromium.open(broken)
    assert chromium.problems  # the content policy refused both


def test_text_and_marks_are_visible(chromium: Browser, page: Path) -> None:
    chromium.emulate()
    chromium.open(page)
    sizes = chromium.run(
        "[...document.querySelectorAll('.pins a, .text a.at')].map(a => a.getBoundingClientRect().width)"
    )
    assert len(sizes) == 6 and all(size > 5 for size in sizes)
    assert chromium.run("getComputedStyle(document.querySelector('b.nl'), '::before').content") == '"↵"'
    assert chromium.run("getComputedStyle(document.querySelector('.tokens i')).backgroundImage").startswith("radial")
    heats = chromium.run("[...document.querySelectorAll('.scale b')].map(b => getComputedStyle(b).backgroundColor)")
    assert len(set(heats)) == 5
    assert chromium.run("document.querySelectorAll('.position table tbody tr').length") == 15
    chromium.run("document.querySelectorAll('.text a.at').forEach(mark => { mark.style.display = 'none'; })")
    shown = chromium.run("document.querySelector('.text').innerText")
    for piece in ("</script> & <b>bold</b>", "naïve 中文 😀”,   then␍"):
        assert piece in shown


def test_keyboard_reaches_positions_and_follows_them(chromium: Browser, page: Path) -> None:
    chromium.emulate()
    chromium.open(page)
    chromium.press("Tab")
    assert chromium.run("document.activeElement.getAttribute('href')") == "#p1"
    assert "Position 1" in chromium.run("document.activeElement.getAttribute('aria-label')")
    chromium.press("Enter")
    assert chromium.run("location.hash") == "#p1"
    assert chromium.run("document.querySelector('#p1').getBoundingClientRect().top < innerHeight")


CONTRAST = """(() => {
  const rgb = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = (c) => { const f = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    return 0.2126 * f(c[0]) + 0.7152 * f(c[1]) + 0.0722 * f(c[2]); };
  const card = rgb(getComputedStyle(document.querySelector('.card')).backgroundColor);
  const probe = document.createElement('span'); document.querySelector('.text .tokens').append(probe);
  let worst = 99;
  for (let level = 1; level < 9; level++) {
    probe.className = 'h' + level;
    const style = getComputedStyle(probe), heat = rgb(style.backgroundColor), text = rgb(style.color);
    const alpha = heat[3] ?? 1, mixed = [0, 1, 2].map(i => heat[i] * alpha + card[i] * (1 - alpha));
    const [a, b] = [light(mixed), light(text)].sort((x, y) => y - x);
    worst = Math.min(worst, (a + 0.05) / (b + 0.05));
  }
  probe.remove(); return worst; })()"""


@pytest.mark.parametrize(("media", "scheme"), [("screen", "light"), ("screen", "dark"), ("print", "dark")])
def test_text_can_be_read_on_every_heat(chromium: Browser, page: Path, media: str, scheme: str) -> None:
    chromium.emulate(media, scheme)
    chromium.open(page)
    assert chromium.run(CONTRAST) >= 4.5


def test_dark_mode_and_paper(chromium: Browser, page: Path) -> None:
    seen = {}
    for media, scheme in (("screen", "light"), ("screen", "dark"), ("print", "dark")):
        chromium.emulate(media, scheme)
        chromium.open(page)
        seen[media, scheme] = chromium.run(BACKGROUND)
    assert seen["screen", "dark"] == "rgb(16, 20, 27)" and seen["print", "dark"] == "rgb(255, 255, 255)"
    assert chromium.run("getComputedStyle(document.querySelector('.text')).maxHeight") == "none"
    assert chromium.run("document.querySelector('details table').checkVisibility()")  # the settings, unfolded
    chromium.emulate()
    assert chromium.pdf().startswith(b"%PDF")


def test_narrow_screens_do_not_scroll_sideways(chromium: Browser, page: Path) -> None:
    chromium.emulate()
    chromium.open(page, width=400)
    assert chromium.run("document.documentElement.scrollWidth") <= 400
