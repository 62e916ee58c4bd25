"""The progress display on a terminal and its plain lines elsewhere."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest
from rich.console import Console

from refine_verl.record.progress import TrainingProgress

STEP = {
    "nsp/reward/mean": 0.5,
    "actor/ntp_loss": 3.25,
    "perf/forward_tokens_per_token": 2.03,
    "actor/unknown": 9.0,
}


def plain_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=60)


def terminal() -> Console:
    environ = {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    return Console(file=io.StringIO(), force_terminal=True, force_interactive=True, width=100, _environ=environ)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def test_without_a_terminal_one_plain_line_per_step() -> None:
    console = plain_console()
    with TrainingProgress(3, console=console) as progress:
        progress.update(0, {"val/ntp_loss": 4.0, "val/ntp_accuracy": 0.25})
        progress.message("[bold]a path: /tmp/[x]")
        progress.update(1, STEP)
        progress.update(3, {"val/ntp_loss": 3.5, "val/ntp_accuracy": 0.27})
    lines = written(console).splitlines()
    assert lines[0] == "training 0/3 | validation loss 4 | validation accuracy 25.00%"
    assert lines[1] == "[bold]a path: /tmp/[x]"
    assert re.fullmatch(
        r"training 1/3 \| reward 0\.5000 \| next-token loss 3\.250 \| forward tokens per token 2\.030 "
        r"\| 0:00:00 left",
        lines[2],
    )
    assert lines[3] == "training 3/3 | validation loss 3.500 (−0.500) | validation accuracy 27.00% (+2.00 pts)"
    assert len(lines) == 4
    assert isinstance(console.file, io.StringIO)
    assert "\x1b" not in console.file.getvalue()


def test_not_finite_values_are_named() -> None:
    console = plain_console()
    with TrainingProgress(2, console=console) as progress:
        progress.update(1, {"actor/ntp_loss": None, "actor/pg_loss": float("nan"), "phase": "refine"})
    assert "| next-token loss not finite | policy loss not finite |" in written(console)


def test_history_counts_changes_from_the_first_validation_of_the_run() -> None:
    console = plain_console()
    history = [{"step": 0, "val/ntp_loss": 5.0}, {"step": 4, "val/ntp_loss": 4.5}]
    with TrainingProgress(10, initial=4, console=console, history=history) as progress:
        progress.update(5, {"val/ntp_loss": 4.0})
    assert "5/10 | validation loss 4 (−1)" in written(console)


def test_terminal_shows_bar_table_and_change() -> None:
    console = terminal()
    with TrainingProgress(10, console=console) as progress:
        progress.update(0, {"val/ntp_loss": 4.0, "val/ruler/accuracy": 0.5})
        progress.message("checkpoint saved")
        progress.update(10, {**STEP, "val/ntp_loss": 3.5})
    text = written(console)
    last = text[text.rindex("reward") :]  # the display drawn last
    assert "checkpoint saved" in text
    for expected in ("0.5000", "next-token loss", "3.250", "−0.500", "ruler/accuracy", "training", "10/10"):
        assert expected in last
    assert "unknown" not in text


def test_what_others_print_and_log_goes_above_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    outside = sys.stderr
    handler = logging.StreamHandler(sys.stderr)  # holds the stream, as basicConfig's handler does
    log = logging.getLogger("test_progress")
    monkeypatch.setattr(log, "propagate", False)  # handlers that other tests left behind are not the matter here
    log.addHandler(handler)
    try:
        with TrainingProgress(2, console=console) as progress:
            progress.update(1, STEP)
            sys.stdout.write("printed by a worker\n")
            log.warning("logged by verl")
        assert handler.stream is outside
        log.warning("after the run")
    finally:
        log.removeHandler(handler)
    assert "printed by a worker" in written(console)
    assert "logged by verl" in written(console)
    assert isinstance(outside, io.StringIO)
    assert outside.getvalue() == "after the run\n"


def test_an_error_inside_leaves_a_working_terminal() -> None:
    console = terminal()
    with pytest.raises(RuntimeError, match="boom"), TrainingProgress(2, console=console) as progress:
        progress.update(1, STEP)
        raise RuntimeError("boom")
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is shown again
