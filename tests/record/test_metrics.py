"""metrics.jsonl: appended across resumes, no step twice, at most the line being written lost."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from refine_verl.record.metrics import MetricsError, MetricsWriter, merge_steps, read_metrics


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def write(path: Path, steps: range, *, value: float = 0.0, resume_step: int | None = None) -> None:
    with MetricsWriter(path, resume_step=resume_step) as writer:
        for step in steps:
            writer.log({"actor/ntp_loss": value + step}, step)


def test_lines_come_back_as_written(path: Path) -> None:
    with MetricsWriter(path) as writer:
        writer.log({"val/ntp_loss": 3.5}, 0)
        writer.log({"actor/lr": 1e-6, "phase": "warmup"}, 1)
    assert read_metrics(path) == [
        {"step": 0, "val/ntp_loss": 3.5},
        {"step": 1, "actor/lr": 1e-6, "phase": "warmup"},
    ]


def test_scalars_of_all_kinds_become_floats_without_losing_a_bit(path: Path) -> None:
    third = np.float32(1 / 3)
    with MetricsWriter(path) as writer:
        writer.log(
            {"f32": third, "f64": np.float64(0.1), "int": np.int64(7), "array": np.array(2.5), "bool": True},
            1,
        )
    (record,) = read_metrics(path)
    assert record == {"step": 1, "f32": float(third), "f64": 0.1, "int": 7.0, "array": 2.5, "bool": 1.0}
    assert all(isinstance(value, float) for key, value in record.items() if key != "step")


def test_not_finite_values_are_null_and_lines_are_strict_json(path: Path) -> None:
    with MetricsWriter(path) as writer:
        writer.log({"nan": math.nan, "inf": -math.inf, "none": None}, 1)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record == {"step": 1, "nan": None, "inf": None, "none": None}


def test_a_list_is_refused_with_the_name_of_the_metric_and_nothing_is_written(path: Path) -> None:
    with MetricsWriter(path) as writer:
        with pytest.raises(TypeError, match=r"actor/grad_norm must be a scalar, got list: \[1.0, 2.0\]"):
            writer.log({"actor/grad_norm": [1.0, 2.0]}, 1)
        with pytest.raises(ValueError, match="'step' is taken"):
            writer.log({"step": 3}, 1)
        with pytest.raises(ValueError, match="0 or more, got -1"):
            writer.log({}, -1)
    assert read_metrics(path) == []


def test_appends_across_openings(path: Path) -> None:
    write(path, range(1, 4))
    write(path, range(4, 6))
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5]


def test_resume_drops_later_steps_and_keeps_earlier_lines_byte_for_byte(path: Path) -> None:
    write(path, range(0, 8))
    before = path.read_bytes().splitlines()
    write(path, range(5, 8), value=100.0, resume_step=4)
    after = path.read_bytes().splitlines()
    assert after[:5] == before[:5]
    assert [record["actor/ntp_loss"] for record in read_metrics(path)] == [0, 1, 2, 3, 4, 105, 106, 107]
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]  # no temporary file left


def test_without_resume_step_later_steps_stay(path: Path) -> None:
    write(path, range(0, 3))
    write(path, range(1, 3))
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 1, 2]


def test_fresh_start_drops_all(path: Path) -> None:
    write(path, range(0, 3))
    MetricsWriter(path, resume_step=-1).close()
    assert path.read_bytes() == b""


def test_an_intact_file_is_not_rewritten(path: Path) -> None:
    write(path, range(0, 3))
    inode = path.stat().st_ino
    MetricsWriter(path, resume_step=2).close()
    assert path.stat().st_ino == inode
    MetricsWriter(path, resume_step=1).close()
    assert path.stat().st_ino != inode  # a new file took its place


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "actor/ntp', b'{"step": 3', b"{", b'{"step": 3, "a": "\xc3', b"\x00\x00"]
)
def test_torn_last_line_is_skipped_and_then_repaired(path: Path, torn: bytes) -> None:
    write(path, range(0, 3))
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2]
    write(path, range(3, 4))
    assert path.read_bytes().startswith(whole)
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3]


def test_a_whole_last_line_without_newline_is_kept(path: Path) -> None:
    write(path, range(0, 3))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    write(path, range(3, 4))
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3]


@pytest.mark.parametrize("line", ["not json", "[1, 2]", '{"loss": 1.0}', '{"step": "2"}', '{"step": true}'])
def test_a_damaged_line_in_the_middle_is_named(path: Path, line: str) -> None:
    path.parent.mkdir()
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(MetricsError, match=r"metrics\.jsonl, line 2: not a metrics line"):
        read_metrics(path)
    with pytest.raises(MetricsError, match="line 2"):
        MetricsWriter(path)
    assert line in path.read_text()
    path.write_text(f'{{"step": 1}}\n{line}\n')  # it ends, so it is not torn
    with pytest.raises(MetricsError, match="line 2"):
        read_metrics(path)


def test_killed_writer_loses_at_most_the_line_being_written(path: Path) -> None:
    program = f"""
        from refine_verl.record.metrics import MetricsWriter
        writer = MetricsWriter({str(path)!r})
        for step in range(10**9):
            writer.log({{"loss": step / 3}}, step)
            if step == 500:
                import sys
                sys.stdout.write("ready")
                sys.stdout.flush()
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        assert process.stdout.read(5) == b"ready"
        os.kill(process.pid, signal.SIGKILL)
    records = read_metrics(path)
    assert len(records) > 500  # what was logged before the kill is there although nothing was closed
    assert [record["step"] for record in records] == list(range(len(records)))
    write(path, range(501, 503), resume_step=500)
    assert [record["step"] for record in read_metrics(path)] == list(range(503))


def test_merge_joins_the_lines_of_a_step() -> None:
    records = [{"step": 2, "a": 1.0}, {"step": 0, "v": 5.0}, {"step": 2, "a": 2.0, "b": 3.0}]
    assert merge_steps(records) == [{"step": 0, "v": 5.0}, {"step": 2, "a": 2.0, "b": 3.0}]


def test_needs_no_torch_ray_or_verl() -> None:
    program = "import sys, refine_verl.report, refine_verl.report.__main__; " + (
        "sys.exit(','.join({'torch', 'ray', 'verl', 'transformers', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
