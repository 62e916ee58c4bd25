"""Reports in a real browser: one run and several, light, dark and on paper."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from reference.browser import Browser, browser, find_browser

from refine_verl.record.metrics import MetricsWriter
from refine_verl.report import write_comparison, write_report

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome on this machine")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


def run_of(directory: Path, steps: int) -> Path:
    with MetricsWriter(directory / "metrics.jsonl") as writer:
        for step in range(1, steps + 1):
            norm = math.nan if step == 5 else 1.0 + step % 3
            writer.log({"actor/ntp_loss": 3 - step / 50, "nsp/reward/mean": step / 90, "actor/grad_norm": norm}, step)
        writer.log({"val/ntp_loss": 2.0, "val/ntp_accuracy": 0.5}, steps)
    return directory


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_page(chromium: Browser, tmp_path: Path, several: bool) -> None:
    runs = [run_of(tmp_path / name, steps) for name, steps in (("a", 60), ("b", 25))]
    page = write_comparison(runs, tmp_path / "page.html") if several else write_report(runs[0])
    chromium.emulate()
    chromium.open(page)
    assert chromium.requests == [page.resolve().as_uri()] and chromium.problems == []
    assert chromium.run("document.documentElement.scrollWidth <= innerWidth")
    charts = "[...document.querySelectorAll('figure')]"
    boxes = chromium.run(f"{charts}.map(f => f.querySelector('svg[role]').getBoundingClientRect().height)")
    assert len(boxes) == 4 + several and min(boxes) > 100
    lines = chromium.run(
        "[...document.querySelectorAll('figure svg[role] path.line:not(.raw)')]"
        ".map(p => [p.getTotalLength(), getComputedStyle(p).stroke, getComputedStyle(p).strokeDasharray])"
    )
    assert lines and all(length > 20 for length, _, _ in lines)
    assert len({stroke for _, stroke, _ in lines}) >= 1 + several
    if several:  # apart also without colour
        assert {dash for _, _, dash in lines} >= {"none", "7px, 4px"}
    light = chromium.run("getComputedStyle(document.body).backgroundColor")
    chromium.emulate("screen", "dark")
    assert chromium.run("getComputedStyle(document.body).backgroundColor") != light
    chromium.emulate("print", "dark")
    assert chromium.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


FOLDED = "[...document.querySelectorAll('details')].map(d => [d.className, d.querySelector('table').checkVisibility()])"


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_paper_unfolds_what_was_set_and_what_differs(chromium: Browser, tmp_path: Path, several: bool) -> None:
    runs = []
    for n, name in enumerate("ab"):
        runs.append(run_of(tmp_path / name, 3))
        values = {f"key{key}": n for key in range(80)}
        config = {"data": {"train_files": "x"}, "trainer": values, name: values, "refine": {"nsp": {"chunks": 4}}}
        (runs[-1] / "config.yaml").write_text(yaml.safe_dump(config))
    page = write_comparison(runs, tmp_path / "page.html") if several else write_report(runs[0])
    chromium.emulate()
    chromium.open(page)
    style = "" if several else "card"
    assert chromium.run(FOLDED) == [[style, False], [f"{style} screen".strip(), False]]
    chromium.emulate("print")
    assert chromium.run(FOLDED) == [[style, True], [f"{style} screen".strip(), False]]
    unfolded = chromium.run("document.querySelector('details table').getBoundingClientRect().height")
    assert unfolded > (1000 if several else 10)
