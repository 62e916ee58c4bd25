"""report.html: complete, well-formed, self-contained, with the right figures, for every kind of run."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from refine_verl.record.metrics import MetricsWriter
from refine_verl.record.run import ReportError
from refine_verl.report import write_report
from refine_verl.report.settings import settings_section

ROOT = Path(__file__).parents[2]

REFINE_CHARTS = [
    "Reward",
    "Reward by kind",
    "Next-token loss",
    "Next-token accuracy",
    "Validation: accuracy",
    "Entropy",
    "Policy loss",
    "KL to the rollout policy",
    "Lost signal",
    "Gradient norm",
    "Learning rate",
    "Time per step",
    "Throughput",
    "Forward tokens per token",
    "Peak memory",
]
SFT_CHARTS = [title for title in REFINE_CHARTS if title in {
    "Next-token loss", "Next-token accuracy", "Gradient norm", "Learning rate", "Time per step", "Throughput",
    "Forward tokens per token", "Peak memory",
}]  # fmt: skip


def sft_step(step: int) -> dict[str, Any]:
    return {
        "actor/ntp_loss": 3.0 - 0.01 * step,
        "actor/grad_norm": 0.8,
        "actor/lr": 1e-6,
        "perf/tokens_per_second": 1500.0 + step,
        "perf/forward_tokens_per_token": 1.0,
        "perf/max_memory_gb": 3.1,
        "timing_s/update": 3.0,
        "timing_s/step": 3.5,
    }


def refine_step(step: int) -> dict[str, Any]:
    return sft_step(step) | {
        "nsp/reward/mean": 0.4 + 0.01 * step,
        "nsp/reward/std": 0.1,
        "nsp/reward/min": 0.1,
        "nsp/reward/max": 0.9,
        "nsp/reward_cosine/mean": 0.4 + 0.01 * step,
        "nsp/reward_binary/mean": 0.1,
        "nsp/entropy/mean": 2.5,
        "nsp/entropy/selected_mean": 4.0,
        "nsp/group_zero_std": 0.0,
        "actor/pg_loss": -0.001,
        "actor/ppo_kl": 1e-4,
        "actor/pg_clipfrac": 0.002,
        "perf/forward_tokens_per_token": 2.0,
        "timing_s/rollout": 1.0,
        "timing_s/reward": 0.1,
        "timing_s/step": 4.75,
        "refine/active": 1.0,
    }


def validation(step: int) -> dict[str, Any]:
    return {"val/ntp_loss": 2.9 - 0.01 * step, "val/ntp_accuracy": 0.41 + 0.002 * step}


def run_of(directory: Path, lines: Iterable[tuple[int, dict[str, Any]]], config: dict[str, Any] | None = None) -> Path:
    with MetricsWriter(directory / "metrics.jsonl") as writer:
        for step, metrics in lines:
            writer.log(metrics, step)
    if config is not None:
        (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return directory


def refine_run(directory: Path, steps: int = 20) -> Path:
    task = {"val/niah/accuracy": 0.3, "val/tracking/accuracy": 0.2}
    lines = [(0, validation(0) | task), *((step, refine_step(step)) for step in range(1, steps + 1))]
    lines.append((steps, validation(steps) | task | {"val/niah/accuracy": 0.42}))
    config = {
        "refine": {"nsp": {"chunks": 8}},
        "trainer": {"experiment_name": "midtrain", "total_training_steps": steps},
    }
    return run_of(directory, lines, config)


def parse(path: Path) -> ET.Element:
    """The page as XML, which it also is: a stricter check than any HTML parser's."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n")
    return ET.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def text_of(element: ET.Element) -> str:
    return " ".join(" ".join(element.itertext()).split())


def figures(page: ET.Element) -> dict[str, ET.Element]:
    return {figure.find("figcaption/h3").text: figure for figure in page.iter("figure")}  # type: ignore[union-attr]


def with_class(root: ET.Element, name: str) -> list[ET.Element]:
    return [element for element in root.iter() if name in (element.get("class") or "").split()]


def tiles(page: ET.Element) -> dict[str, str]:
    found = {}
    for tile in with_class(page, "tile"):
        name, *rest = tile
        found[text_of(name)] = " | ".join(text_of(part) for part in rest)
    return found


def test_refine_run_has_every_chart_and_key_figure(tmp_path: Path) -> None:
    path = write_report(refine_run(tmp_path))
    assert path == tmp_path / "report.html"
    page = parse(path)
    assert list(figures(page)) == REFINE_CHARTS
    assert tiles(page) == {
        "Validation loss": "2.700 −0.200 | from 2.900 at step 0",
        "Validation accuracy": "45.00% +4.00 pts | from 41.00% at step 0",
        "niah, accuracy": "42.00% +12.00 pts | from 30.00% at step 0",
        "tracking, accuracy": "20.00% 0.00 pts | from 20.00% at step 0",
        # a tenth of 20 steps is 2: mean of 0.41, 0.42 and of 0.59, 0.60
        "Reward": "0.5950 +0.180 | from 0.4150; means of the first and last 2 steps",
        "Throughput": "1510 tokens/s | median; 20 steps in 1 min 35 s",
        "Cost": "2.00 | forward tokens per document token",
    }
    assert {element.get("class") for element in with_class(page, "tile")[0].iter("small")} == {"good"}


def test_scores_at_test_time_stand_beside_those_without_adaptation(tmp_path: Path) -> None:
    """They are means over all answers so far: the first one is that of a few prompts and says little."""
    lines = [
        (1, {"val/niah/accuracy": 0.9, "val/niah/before/accuracy": 0.8}),
        (2, {"val/niah/accuracy": 0.5, "val/niah/before/accuracy": 0.4}),
    ]
    page = parse(write_report(run_of(tmp_path, lines)))
    assert tiles(page)["niah, accuracy"] == "50.00% +10.00 pts | from 40.00% without adaptation"
    assert not [name for name in tiles(page) if "before" in name]


def test_getting_worse_is_not_shown_as_good(tmp_path: Path) -> None:
    page = parse(write_report(run_of(tmp_path, [(0, {"val/ntp_loss": 2.0}), (1, {"val/ntp_loss": 2.5})])))
    assert tiles(page) == {"Validation loss": "2.500 +0.500 | from 2 at step 0"}
    assert [element.text for element in with_class(page, "poor")] == ["+0.500"]
    assert not with_class(page, "good")


def test_sft_run_has_no_chart_of_rewards_or_policy(tmp_path: Path) -> None:
    lines = [(0, validation(0)), *((step, sft_step(step)) for step in range(1, 6)), (5, validation(5))]
    page = parse(write_report(run_of(tmp_path, lines)))
    assert list(figures(page)) == SFT_CHARTS
    assert list(tiles(page)) == ["Validation loss", "Validation accuracy", "Throughput", "Cost"]
    assert "nsp/" not in text_of(page)


def test_self_contained_without_script(tmp_path: Path) -> None:
    path = write_report(refine_run(tmp_path))
    page = parse(path)
    tags = {element.tag for element in page.iter()}
    assert not tags & {"script", "link", "img", "iframe", "object", "use", "image"}
    attributes = {name for element in page.iter() for name in element.attrib}
    assert not {name for name in attributes if name.startswith("on")} | (attributes & {"src", "href", "style"})
    style = page.findtext("head/style") or ""
    assert "url(" not in style and "@import" not in style
    assert "prefers-color-scheme: dark" in style and "@media print" in style
    policy = next(meta.get("content") for meta in page.iter("meta") if meta.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('1')</script> & \"quoted\" \x07"
    config = {"trainer": {"experiment_name": evil}, "refine": {evil: evil}}
    run_of(tmp_path, [(1, {"val/<b>/a&b": 0.5, "actor/ntp_loss": 1.0})], config)
    (tmp_path / "environment.json").write_text(json.dumps({"host <i>": evil}))
    page = parse(write_report(tmp_path))
    assert not list(page.iter("script")) and not list(page.iter("b"))[0].findall("*")
    assert page.find("body/main/header/h1").text == evil.replace("\x07", "")  # type: ignore[union-attr]
    assert "Validation: a&b" in figures(page)
    assert "host <i>" in text_of(page)


def test_settings_refine_first_rest_folded_secrets_hidden(tmp_path: Path) -> None:
    config = {
        "data": {"train_files": ["a.parquet"], "tokenizer": "bytes"},
        "trainer": {"wandb": {"api_key": "s3cret"}, "hf_token": "t0ken", "password": None},
        "refine": {"nsp": {"chunks": 8, "reward": "cosine"}, "inner": {}},
        "model": {"path": "m", "config": {"hidden_size": 8}},
    }
    page = parse(write_report(run_of(tmp_path, [(1, sft_step(1))], config)))
    named, rest = page.iter("details")
    assert "open" not in named.attrib and "open" not in rest.attrib
    assert "screen" in (rest.get("class") or "") and "screen" not in (named.get("class") or "")
    folded, whole = text_of(rest), text_of(page)
    assert folded.startswith("verl's other settings (4), also in config.yaml data.tokenizer bytes")
    assert "api_key (hidden)" in folded and "hf_token (hidden)" in folded and "password null" in folded
    assert text_of(named).startswith("Model, data and training (3) data.train_files")
    assert 'data.train_files ["a.parquet"] model.path m model.config.hidden_size 8' in text_of(named)
    assert "s3cret" not in whole and "t0ken" not in whole
    assert "refine.nsp.chunks 8 refine.nsp.reward cosine" in whole and "refine.nsp" not in folded


def test_what_the_command_gave_comes_first(tmp_path: Path) -> None:
    config = {"refine": {"nsp": {"chunks": 4}}, "model": {"path": "m"}}
    run_of(tmp_path, [(1, sft_step(1))], config)
    assert "command line" not in text_of(parse(write_report(tmp_path)))
    given = {"recipe": ["midtrain", "mine"], "refine.nsp.chunks": 4, "a.api_key": "s3cret"}
    (tmp_path / "overrides.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    whole = text_of(parse(write_report(tmp_path)))
    shown = 'Settings Given on the command line: recipe ["midtrain", "mine"] refine.nsp.chunks 4 a.api_key (hidden)'
    assert f"{shown} refine.nsp.chunks 4 " in whole and "s3cret" not in whole


def test_what_any_recipe_sets_is_not_among_the_rest() -> None:
    """Paper leaves the rest folded."""
    for path in (ROOT / "recipes").glob("*.yaml"):
        recipe = yaml.safe_load(path.read_text())
        recipe.pop("defaults", None)
        section = settings_section(recipe)
        assert section is not None and "verl's other settings" not in section, path


def test_warmup_is_shaded_in_every_chart(tmp_path: Path) -> None:
    lines = [(step, sft_step(step) | {"refine/active": 0.0}) for step in range(1, 5)]
    lines += [(step, refine_step(step)) for step in range(5, 10)]
    page = parse(write_report(run_of(tmp_path, lines)))
    for title, figure in figures(page).items():
        assert len(with_class(figure, "warmup")) == 1, title
    plain = parse(write_report(refine_run(tmp_path / "plain")))
    assert not with_class(plain, "warmup")


def test_gap_breaks_the_line_and_is_marked_and_counted(tmp_path: Path) -> None:
    norms = [1.0, 2.0, math.nan, math.inf, 1.5, 1.0]
    lines = [(step, {"actor/grad_norm": norm}) for step, norm in enumerate(norms, start=1)]
    page = parse(write_report(run_of(tmp_path, lines)))
    figure = figures(page)["Gradient norm"]
    (line,) = [path for path in with_class(figure, "line") if (path.get("d") or "").count("L")]
    assert (line.get("d") or "").count("M") == 2
    assert [mark.findtext("title") for mark in with_class(figure, "bad")] == [
        "step 3: gradient norm not finite",
        "step 4: gradient norm not finite",
    ]
    assert "4 (2 not finite)" in text_of(page)


def test_all_values_not_finite(tmp_path: Path) -> None:
    page = parse(write_report(run_of(tmp_path, [(step, {"actor/ntp_loss": math.nan}) for step in (1, 2)])))
    assert len(with_class(figures(page)["Next-token loss"], "bad")) == 2
    assert "actor/ntp_loss – – – – – 0 (2 not finite)" in text_of(page)


def test_single_step_and_constant_zero(tmp_path: Path) -> None:
    page = parse(write_report(run_of(tmp_path, [(7, refine_step(7) | {"actor/pg_loss": 0.0})])))
    found = figures(page)
    assert len(with_class(found["Policy loss"], "dot")) == 1
    assert len(with_class(found["Reward"], "band")) == 2  # in the legend and in the drawing
    assert tiles(page)["Reward"] == "0.4700 | measured once"
    assert "nan" not in (tmp_path / "report.html").read_text().lower()


def test_stacked_times_name_the_rest(tmp_path: Path) -> None:
    page = parse(write_report(run_of(tmp_path, [(1, refine_step(1)), (2, refine_step(2))])))
    figure = figures(page)["Time per step"]
    assert [bar.findtext("title") for bar in with_class(figure, "bar")] == [
        f"step {step}\nrollout: 1\nreward: 0.1000\nupdate: 3\nother: 0.6500" for step in (1, 2)
    ]
    shapes = [part.get("d") or "" for part in with_class(with_class(figure, "bar")[0], "fill")]
    matches = [re.fullmatch(r"M\S+ (\S+)V(\S+)H\S+V\1Z", shape) for shape in shapes]
    spans = [(float(match[1]), float(match[2])) for match in matches if match]
    assert len(spans) == 4
    assert [bottom for bottom, _ in spans[1:]] == [top for _, top in spans[:-1]]  # one on top of the other
    heights = [bottom - top for bottom, top in spans]
    assert heights[2] / heights[0] == pytest.approx(3.0, rel=0.01)
    assert heights[3] / heights[0] == pytest.approx(0.65, rel=0.02)


def test_every_drawn_coordinate_lies_in_the_view_box(tmp_path: Path) -> None:
    lines = [(step, refine_step(step) | {"actor/grad_norm": 10.0**step}) for step in range(1, 12)]
    page = parse(write_report(run_of(tmp_path, lines)))
    circles = list(page.iter("circle"))
    assert circles
    for circle in circles:
        assert 0 <= float(circle.get("cx", "-1")) <= 540
        assert 0 <= float(circle.get("cy", "-1")) <= 240


def test_ten_thousand_steps_stay_small_and_keep_the_spike(tmp_path: Path) -> None:
    lines = [(step, refine_step(step % 50) | {"actor/grad_norm": 1.0 + 99 * (step == 6789)}) for step in range(10_000)]
    path = write_report(run_of(tmp_path, lines))
    assert path.stat().st_size < 600_000
    figure = figures(parse(path))["Gradient norm"]
    (line,) = [element for element in with_class(figure, "line") if len(element.get("d") or "") > 20]
    points = [tuple(map(float, point.split())) for point in (line.get("d") or "").removeprefix("M").split("L")]
    assert len(points) <= 410
    top = min(points, key=lambda point: point[1])
    assert top[0] == pytest.approx(52 + 478 * (6789 + 0.012 * 9999) / (1.024 * 9999), abs=0.2)


def test_still_running_run_says_so(tmp_path: Path) -> None:
    config = {"trainer": {"total_training_steps": 50}, "model": {"path": "out/base"}}
    page = parse(write_report(run_of(tmp_path, [(3, sft_step(3))], config)))
    assert "model out/base · 3 of 50 steps" in text_of(page.find("body/main/header"))  # type: ignore[arg-type]


def test_damaged_side_files_do_not_cost_the_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_of(tmp_path, [(1, sft_step(1))])
    (tmp_path / "config.yaml").write_text("a: [1,\n b: }")
    (tmp_path / "environment.json").write_text("{")
    page = parse(write_report(tmp_path, tmp_path / "deep" / "out.html"))
    assert (tmp_path / "deep" / "out.html").is_file() and not (tmp_path / "report.html").exists()
    assert not list(page.iter("details"))
    assert "config.yaml" in caplog.text and "environment.json" in caplog.text


def test_nothing_to_report_on(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"no metrics\.jsonl there"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "act')
    with pytest.raises(ReportError, match="no complete line yet"):
        write_report(tmp_path)


def test_command_line(tmp_path: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "refine_verl.report", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)

    missing = call(str(tmp_path / "nowhere"))
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith("error: ") and "no metrics.jsonl there" in missing.stderr
    assert not (tmp_path / "nowhere").exists()
    run_of(tmp_path, [(1, sft_step(1))])
    done = call(str(tmp_path))
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(tmp_path / "report.html"), "")


def test_phases_have_charts_of_their_own(tmp_path: Path) -> None:
    answers = {
        "answer/reward/mean": 0.3,
        "answer/ntp_loss": 1.2,
        "answer/group_zero_std": 0.5,
        "answer/length/mean": 4.0,
        "answer/grad_norm": 0.2,
        "ttt/loss_before": 3.0,
        "ttt/loss_after": 2.0,
        "timing_s/answer": 0.2,
        "timing_s/score": 0.05,
        "timing_s/validate": 7.0,
        "timing_s/save_checkpoint": 3.0,
    }
    page = parse(write_report(run_of(tmp_path, [(step, refine_step(step) | answers) for step in (1, 2)])))
    found = figures(page)
    for title in ("Score of sampled answers", "Loss on answers", "Lost signal of answers", "Length of answers"):
        assert title in found
    assert "before 3 after 2" in text_of(found["Loss around test-time training"])
    assert "validate 7 save checkpoint 3" in text_of(found["Time between steps"])
    # what happens between steps is no part of a step: rollout 1, reward 0.1, update 3, answers 0.25, other 0.4 of 4.75
    bars = [bar.findtext("title") for bar in with_class(found["Time per step"], "bar")]
    assert bars[0] == "step 1\nrollout: 1\nreward: 0.1000\nupdate: 3\nanswers: 0.2500\nother: 0.4000"


def test_updates_left_out_are_drawn_where_there_are_some(tmp_path: Path) -> None:
    fine = parse(write_report(run_of(tmp_path / "a", [(1, sft_step(1) | {"actor/skipped_updates": 0.0})])))
    assert "Updates left out" not in figures(fine)
    bad = parse(write_report(run_of(tmp_path / "b", [(1, sft_step(1) | {"actor/skipped_updates": 2.0})])))
    assert "Updates left out" in figures(bad)


def test_the_signal_in_the_gradient_is_drawn_where_it_was_measured(tmp_path: Path) -> None:
    """Every few steps a value, which is no gap; and no empty chart where none was."""
    name, cosine = "Signal in the policy gradient", "Policy gradient and next-token gradient"
    lines = [
        (step, refine_step(step) | ({"nsp/gradient_snr": 0.01 * step - 0.05} if step % 3 == 0 else {}))
        for step in range(1, 13)
    ]
    found = figures(parse(write_report(run_of(tmp_path, lines))))
    assert name in found and cosine not in found
    assert not with_class(found[name], "bad")
    assert name not in figures(parse(write_report(refine_run(tmp_path / "without"))))


def test_labels_of_small_numbers_fit_left_of_the_axis(tmp_path: Path) -> None:
    lines = [(step, {"actor/pg_loss": -0.00115 + 0.00002 * step}) for step in range(1, 12)]
    figure = figures(parse(write_report(run_of(tmp_path, lines))))["Policy loss"]
    labels = [tick.text or "" for tick in with_class(figure, "tick") if tick.get("text-anchor") == "end"]
    assert "×10⁻³" in labels and max(map(len, labels)) <= 6
