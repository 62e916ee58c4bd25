"""Several runs on one page: lines, axes, tables, and what is refused."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from refine_verl.record.metrics import MetricsWriter
from refine_verl.record.run import ReportError
from refine_verl.report import write_comparison
from refine_verl.report.__main__ import main
from refine_verl.report.compare import MAX_RUNS
from refine_verl.report.settings import FOLD_FROM


def run_of(
    directory: Path, steps: int, metrics: Callable[[int], dict[str, Any]], config: dict[str, Any] | None = None
) -> Path:
    with MetricsWriter(directory / "metrics.jsonl") as writer:
        for step in range(1, steps + 1):
            writer.log(metrics(step), step)
    if config is not None:
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory


def refine(step: int) -> dict[str, Any]:
    return {
        "actor/ntp_loss": 3.0 - 0.01 * step,
        "nsp/reward/mean": 0.3 + 0.01 * step,
        "val/ntp_loss": 2.5 - 0.01 * step,
    }


def sft(step: int) -> dict[str, Any]:
    return {"actor/ntp_loss": 2.9 - 0.01 * step, "val/ntp_loss": 2.4 - 0.01 * step}


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    config = {
        "trainer": {"experiment_name": "refine", "total_training_steps": 20},
        "refine": {"loss": {"rl_coef": 0.2}},
    }
    other = {"trainer": {"experiment_name": "sft", "total_training_steps": 20}, "refine": {"loss": {"rl_coef": 0.0}}}
    return [run_of(tmp_path / "a", 20, refine, config), run_of(tmp_path / "b", 12, sft, other)]


def page_of(path: Path) -> ET.Element:
    return ET.fromstring(path.read_text().removeprefix("<!DOCTYPE html>\n"))


def text_of(element: ET.Element) -> str:
    return " ".join(" ".join(element.itertext()).split())


def figures(page: ET.Element) -> dict[str, ET.Element]:
    return {figure.find("figcaption/h3").text: figure for figure in page.iter("figure")}  # type: ignore[union-attr]


def legend(figure: ET.Element) -> list[str]:
    return [text_of(item) for item in figure.findall("figcaption/ul/li")]


def rows(page: ET.Element, heading: str) -> dict[str, list[str]]:
    section = next(s for s in page.iter("section") if s.findtext("h2") == heading)
    found = [[text_of(cell) for cell in row] for row in section.iter("tr")]
    return {row[0]: row[1:] for row in found}


def test_two_runs(two: list[Path], tmp_path: Path) -> None:
    path = write_comparison(two, tmp_path / "out" / "both.html")
    assert path == tmp_path / "out" / "both.html"
    page = page_of(path)
    found = figures(page)
    assert list(found) == ["Reward", "Next-token loss: training", "Next-token loss: validation"]
    averaged, last = "figures: mean of the last tenth", "figures: last value"
    assert legend(found["Reward"]) == ["refine 0.4950", averaged]  # the other run has none
    assert legend(found["Next-token loss: training"]) == ["refine 2.805", "sft 2.780", averaged]
    assert legend(found["Next-token loss: validation"]) == ["refine 2.300", "sft 2.280", last]
    lines = [e.get("class") for e in found["Next-token loss: validation"].find("svg").iter("path")]  # type: ignore[union-attr]
    assert "line c1" in lines and "line c2 d2" in lines and "mark c2" in lines
    assert "a run" not in text_of(page)
    progress = {text_of(row[0]): text_of(row[1]) for row in page.find("body/main/section").iter("tr")}  # type: ignore[union-attr]
    assert progress == {"run": "done", "refine": "20 steps", "sft": "12 of 20 steps"}


def test_lines_end_where_their_runs_end(two: list[Path], tmp_path: Path) -> None:
    figure = figures(page_of(write_comparison(two, tmp_path / "p.html")))["Next-token loss: training"]
    ends = {}
    for path in figure.find("svg").iter("path"):  # type: ignore[union-attr]
        if (path.get("class") or "").startswith("line"):
            ends[path.get("class")] = float((path.get("d") or "").split("L")[-1].split()[0])
    left, width, margin = 52, 540 - 52 - 10, 0.5
    place = {step: left + (step - 1 + margin) / (19 + 2 * margin) * width for step in (12, 20)}
    assert ends == {"line c1": pytest.approx(place[20], abs=0.1), "line c2 d2": pytest.approx(place[12], abs=0.1)}


def bold(page: ET.Element) -> list[str | None]:
    section = next(s for s in page.iter("section") if s.findtext("h2") == "Final values")
    return [b.text for b in section.iter("b")]


def test_final_values_and_the_best(two: list[Path], tmp_path: Path) -> None:
    two[1] = run_of(tmp_path / "sft", 20, sft)
    page = page_of(write_comparison(two, tmp_path / "p.html"))
    table = rows(page, "Final values")
    assert table["metric"] == ["refine", "sft"]
    assert table["Next-token loss: validation val/ntp_loss"] == ["2.300", "2.200"]
    # means of the last tenth: steps 19 and 20
    assert table["Next-token loss: training actor/ntp_loss"] == ["2.805", "2.705"]
    assert table["Reward nsp/reward/mean"] == ["0.4950", "–"]
    assert bold(page) == ["2.705", "2.200"]  # no best of a single value


def test_runs_of_unequal_length_are_not_ranked_together(two: list[Path], tmp_path: Path) -> None:
    """The shorter run has the lower loss here, and would have had the higher one at the same step."""
    page = page_of(write_comparison(two, tmp_path / "p.html"))
    table = rows(page, "Final values")
    assert table["Next-token loss: training actor/ntp_loss"] == ["2.805 at 20", "2.780 at 12"]
    assert table["Next-token loss: validation val/ntp_loss"] == ["2.300 at 20", "2.280 at 12"]
    assert table["Reward nsp/reward/mean"] == ["0.4950", "–"]
    assert bold(page) == []
    worse = run_of(tmp_path / "worse", 20, lambda step: {"val/ntp_loss": 2.4})
    page = page_of(write_comparison([*two, worse], tmp_path / "p.html", "step"))
    cells = rows(page, "Final values")["Next-token loss: validation val/ntp_loss"]
    assert cells == ["2.300 at 20", "2.280 at 12", "2.400 at 20"]
    assert bold(page) == ["2.300"]  # the better of the two that came as far


def test_a_diverged_run_ends_where_its_last_value_is(tmp_path: Path) -> None:
    lost = run_of(tmp_path / "a", 9, lambda step: {"val/ntp_loss": math.nan if step > 4 else 1.0})
    whole = run_of(tmp_path / "b", 9, lambda step: {"val/ntp_loss": 2.0})
    page = page_of(write_comparison([lost, whole], tmp_path / "p.html"))
    assert rows(page, "Final values")["Next-token loss: validation val/ntp_loss"] == ["1 at 4", "2 at 9"]
    assert bold(page) == []


def test_settings_that_differ(two: list[Path], tmp_path: Path) -> None:
    config = yaml.safe_load((two[1] / "config.yaml").read_text())
    config["trainer"] |= {"default_local_dir": "/x", "api_key": "s3cret"}
    config["data"] = {"seed": None}
    (two[1] / "config.yaml").write_text(yaml.safe_dump(config))
    for directory, version in zip(two, ("2.12", "2.13"), strict=True):
        (directory / "environment.json").write_text(
            json.dumps({"torch": version, "python": "3.11", "started": version})
        )
    path = write_comparison(two, tmp_path / "p.html")
    page = page_of(path)
    assert rows(page, "Settings that differ") == {
        "key": ["refine", "sft"],
        "data.seed": ["–", "null"],
        "refine.loss.rl_coef": ["0.2", "0.0"],
        "trainer.api_key": ["–", "(hidden)"],
    }
    assert rows(page, "Environments that differ") == {"key": ["refine", "sft"], "torch": ["2.12", "2.13"]}
    assert "s3cret" not in path.read_text()


def test_keys_that_a_run_lacks_do_not_bury_those_that_differ(tmp_path: Path) -> None:
    """A run of another version, or one whose configuration was written by hand."""
    full = {"verl": {f"key{n}": n for n in range(FOLD_FROM + 1)}, "refine": {"rl_coef": 0.2}, "same": 1}
    few = {"refine": {"rl_coef": 0.0}, "same": 1}
    runs = [run_of(tmp_path / name, 2, sft, config) for name, config in (("a", full), ("b", few))]
    page = page_of(write_comparison(runs, tmp_path / "p.html"))
    (folded,) = page.iter("details")
    assert folded.get("class") == "screen"
    assert folded.findtext("summary") == f"{FOLD_FROM + 1} keys that only some of the runs have, also in config.yaml"
    assert "verl.key60 60 –" in text_of(folded) and "rl_coef" not in text_of(folded)
    section = next(s for s in page.iter("section") if s.findtext("h2") == "Settings that differ")
    table = section.find("div")
    assert table is not None and text_of(table) == "key a b refine.rl_coef 0.2 0.0"
    assert f"1 of {FOLD_FROM + 3} keys; the same in all runs: 1." in text_of(section)
    del full["verl"]["key0"]  # type: ignore[attr-defined]
    (runs[0] / "config.yaml").write_text(yaml.safe_dump(full))
    page = page_of(write_comparison(runs, tmp_path / "p.html"))
    assert rows(page, "Settings that differ")["verl.key60"] == ["60", "–"]  # so many are one table with the others


def test_equal_settings_are_said_to_be_equal(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / name, 3, sft, {"refine": {"inner": "none"}}) for name in "ab"]
    page = page_of(write_comparison([*runs, run_of(tmp_path / "c", 3, sft)], tmp_path / "p.html"))
    assert "None of 1." in text_of(page)


def test_not_a_number_breaks_the_line_and_is_marked(tmp_path: Path) -> None:
    bad = run_of(tmp_path / "a", 6, lambda step: {"actor/grad_norm": math.nan if step == 3 else 1.0})
    lost = run_of(tmp_path / "b", 6, lambda step: {"actor/grad_norm": math.inf})
    figure = figures(page_of(write_comparison([bad, lost], tmp_path / "p.html")))["Gradient norm"]
    marks = [e.findtext("title") for e in figure.iter("path") if e.get("class") == "bad"]
    assert marks[0] == "step 3: a not finite" and len(marks) == 7
    assert legend(figure)[:2] == ["a 1", "b –"]


def test_by_tokens_and_by_time(tmp_path: Path) -> None:
    def metrics(step: int) -> dict[str, Any]:
        return {"actor/ntp_loss": 1.0, "timing_s/step": 2.0, "perf/tokens_per_second": 500.0}

    runs = [run_of(tmp_path / name, steps, metrics) for name, steps in (("a", 4), ("b", 2))]
    for axis, last, label in (("tokens", "4000", "document tokens"), ("time", "8", "seconds of training steps")):
        page = page_of(write_comparison(runs, tmp_path / "p.html", axis))
        figure = figures(page)["Next-token loss: training"]
        titles = [rect.findtext("title") or "" for rect in figure.iter("rect")]
        assert titles[-1].split("\n")[0].split()[-1] == last
        assert label in text_of(figure)
    with pytest.raises(ReportError, match=r"have no timing_s/step, so there is no time axis; leave --x out"):
        write_comparison([*runs, run_of(tmp_path / "c", 2, sft)], tmp_path / "p.html", "time")


def test_names_are_told_apart(tmp_path: Path) -> None:
    config = {"trainer": {"experiment_name": "midtrain"}}
    runs = [run_of(tmp_path / name / "run", 2, sft, config) for name in ("one", "two")]
    figure = figures(page_of(write_comparison(runs, tmp_path / "p.html")))["Next-token loss: training"]
    assert legend(figure)[:2] == ["midtrain (one/run) 2.880", "midtrain (two/run) 2.880"]


def test_many_runs_have_styles_of_their_own(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / f"r{n}", 2, sft) for n in range(13)]
    page = page_of(write_comparison(runs, tmp_path / "p.html"))
    styles = [span.find("svg/path").get("class") for span in page.iter("span") if span.get("class") == "swatch"]  # type: ignore[union-attr]
    assert len(styles) == 13 == len(set(styles))


def test_refused(two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.html"

    def refused(*arguments: str) -> str:
        assert main(arguments) == 2
        assert not out.exists()
        return capsys.readouterr().err

    empty = tmp_path / "empty"
    empty.mkdir()
    a, b = map(str, two)
    assert f"{empty}: no metrics.jsonl there" in refused(a, str(empty), "--out", str(out))
    assert f"{a}: given twice" in refused(a, b, a, "--out", str(out))
    assert "is a directory; give a file" in refused(a, b, "--out", str(empty))
    with pytest.raises(ReportError, match="at most"):
        write_comparison([tmp_path / f"x{n}" for n in range(MAX_RUNS + 1)], out)
    assert "--x is for several runs" in refused(a, "--x", "time")
    assert "x: unknown value 'tokns'. Allowed: step, tokens, time. Did you mean 'tokens'?" in refused(a, b, "x=tokns")


def test_command_line(two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(two[0]), str(two[1])]) == 0
    assert capsys.readouterr().out == "comparison.html\n"
    assert (tmp_path / "comparison.html").is_file()
