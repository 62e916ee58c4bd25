"""`make gpu-check`: its pieces run here at small sizes, a failing one is seen and stops no other."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType

ROOT = Path(__file__).resolve().parents[2]


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("gpu_check", monkeypatch)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load("gpu_pieces", monkeypatch)
    monkeypatch.setattr(module.adapters, "TOKENS_PER_PIECE", module.adapters.TOKENS_PER_PIECE)
    return module


def figures_of(pieces: ModuleType, name: str, target: Path) -> dict[str, Any]:
    pieces.main(name, "cpu", "tiny", str(target))
    return json.loads(target.read_text())


def test_every_piece_can_be_run(check: ModuleType, pieces: ModuleType) -> None:
    assert list(check.PIECES) == list(pieces.RUN)
    assert all(0 < piece.seconds <= check.TOTAL_SECONDS for piece in check.PIECES.values())
    assert check.TOTAL_SECONDS == 8 * 60


@pytest.mark.parametrize(
    "name",
    ["doctor", "bf16", "modes", "hybrids", "cost", "cost_kept", "cost_lact", "launches", "longest", "piece_sizes"],
)
def test_pieces_on_the_cpu(pieces: ModuleType, name: str, tmp_path: Path) -> None:
    found = figures_of(pieces, name, tmp_path / "figures.json")
    assert found["environment"]["torch"] == torch.__version__
    expected = {
        "doctor": {"findings"},
        "bf16": set(pieces.FAMILIES),
        "hybrids": {f"{family}{kept}" for family in pieces.HYBRIDS for kept in ("", ", none", ", layer")},
        "modes": {f"{family}, {kept}" for family in pieces.FAMILIES for kept in ("none", "layer")},
        "launches": {"sft", "two-phase", "fused"},
        "longest": {f"{kind}_longest" for kind in ("sft", "fork", "fused")},
        "piece_sizes": {"fork_32_seconds", "fork_64_seconds", "fused_64_peak_gib", "fused_fastest"},
    }.get(name, {"sft_seconds", "fork_over_sft", "fused_over_sft", "fused_tokens_per_second"})
    assert expected <= found.keys()
    if name in ("modes", "hybrids"):
        assert all(len(modes) == 6 for key, modes in found.items() if "," in key)
    if name == "longest":
        assert found["sft_longest"] == pieces.LONGEST["tiny"][-1]


def test_steps_are_measured_in_pieces_of_each_size(
    pieces: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One kind is fastest in pieces of the first size, the other in pieces of the second."""
    clock, default = [0.0], pieces.adapters.TOKENS_PER_PIECE
    seconds = {("fork", 32): 1.0, ("fork", 64): 2.0, ("fused", 32): 3.0, ("fused", 64): 2.0}

    def step(self: object, kind: str) -> None:
        clock[0] += seconds[kind, pieces.adapters.TOKENS_PER_PIECE]

    monkeypatch.setattr(pieces.Bench, "step", step)
    monkeypatch.setattr(pieces, "_now", lambda _: clock[0])
    found = figures_of(pieces, "piece_sizes", tmp_path / "figures.json")
    assert (found["fork_fastest"], found["fused_fastest"]) == (32, 64)
    assert found["fused_32_seconds"] == [3.0] * pieces.ROUNDS
    assert default == pieces.adapters.TOKENS_PER_PIECE


def test_wrong_states_are_seen(pieces: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Negative control of comparison and modes: states of the token before."""
    from refine_verl.models.adapters import _RecordedTrace

    honest = _RecordedTrace.after
    monkeypatch.setattr(_RecordedTrace, "after", lambda self, positions: honest(self, positions - 1))
    with pytest.raises(
        SystemExit, match="forked and recomputed differ by more than 0.001: delta_net: .*gated_deltanet"
    ):
        figures_of(pieces, "bf16", tmp_path / "figures.json")


def test_a_mode_that_does_not_agree_is_seen(
    pieces: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Negative control: a head that scores a little otherwise than it samples, and a gradient that is no number."""
    from refine_verl.models.head import FusedHead

    honest = FusedHead._log_probs

    def wrong(self: FusedHead, *args: Any, **kwargs: Any) -> Tensor:
        return honest(self, *args, **kwargs) * 1.01

    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="modes disagree by more than"):
        patched.setattr(FusedHead, "_log_probs", wrong)
        figures_of(pieces, "modes", tmp_path / "figures.json")
    actor = SimpleNamespace(parameters=lambda: [SimpleNamespace(grad=torch.tensor([1.0, torch.nan]))])
    assert pieces._gradients(actor) == float("inf")


def test_what_does_not_fit_is_a_figure(pieces: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Out of memory is what the longest document is found by, and one kind of step that does not fit stops no other."""
    sheet = pieces.Sheet("cpu", "tiny", tmp_path / "figures.json", {})
    bench = sheet.real("gpu")

    def fits(sheet: object, body: Any) -> object:
        body()
        tight = bench.kind == "fused" or bench.documents.total == 128
        return pieces.OUT_OF_MEMORY if tight else 1.5

    honest = bench.step

    def step(kind: str) -> None:
        bench.kind = kind
        honest(kind)

    monkeypatch.setattr(bench, "step", step)
    monkeypatch.setattr(pieces, "_peak", fits)
    pieces._cost(sheet, bench)
    assert sheet.figures["fused_peak_gib"] == pieces.OUT_OF_MEMORY and "fused_seconds" not in sheet.figures
    assert "fork_over_sft" in sheet.figures
    monkeypatch.setattr(pieces.Sheet, "real", lambda *_, **__: bench)
    pieces.longest(sheet)
    assert sheet.figures["sft_longest"] == 64 and "fused_longest" not in sheet.figures
    assert sheet.figures["longer_were_not_tried"] == []


def test_kernels_are_counted_and_copies_are_not(pieces: ModuleType) -> None:
    def event(name: str, device: DeviceType, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation)

    events = [
        event("chunk_fwd_kernel_o", DeviceType.CUDA),
        event("Memcpy HtoD (Pageable -> Device)", DeviceType.CUDA),
        event("Memset (Device)", DeviceType.CUDA),
        event("a range", DeviceType.CUDA, annotation=True),
        event("aten::mm", DeviceType.CPU),
    ]
    assert pieces.count_kernels(events) == 1


def test_a_failing_piece_stops_no_other(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.json"
    results = {
        "doctor": {"status": "passed", "seconds": 1.0, "figures": {"environment": {"device": "x"}}},
        "bf16": {"status": "failed", "seconds": 1.0, "figures": {"tolerance": 1}, "error": "why"},
    }
    asked = []

    def run_piece(name: str, device: str, size: str, seconds: float) -> dict[str, Any]:
        asked.append(seconds)
        if len(asked) == 2:  # the file is written after every piece
            assert list(json.loads(target.read_text())["pieces"]) == ["doctor"]
        return results.get(name, {"status": "passed", "seconds": 0.0, "figures": {}})

    monkeypatch.setattr(check, "run_piece", run_piece)
    assert check.main(["doctor", "bf16", "modes", "--json", str(target)]) == 1
    report = json.loads(target.read_text())
    assert [piece["status"] for piece in report["pieces"].values()] == ["passed", "failed", "passed"]
    assert report["environment"] == {"device": "x"} and report["pieces"]["bf16"]["figures"] == {"tolerance": 1}
    said = capsys.readouterr().out
    assert "why" in said and "Not passed: bf16." in said
    assert check.main(["doctor", "--json", str(target)]) == 0
    assert check.main(["doctor", "--json", str(target), "--seconds", "0"]) == 1
    assert json.loads(target.read_text())["pieces"]["doctor"]["status"] == "not run"


def test_the_whole_ends_in_time(check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every piece takes all it gets: the last ones are cut off or never begin, and that is said; pieces whose own
    limit was reached are not called cut off."""
    now, begun = [100.0], []

    def run_piece(name: str, device: str, size: str, seconds: float) -> dict[str, Any]:
        begun.append(name)
        now[0] += seconds
        return {"status": "timed out", "seconds": seconds, "figures": {}, "error": "?"}

    monkeypatch.setattr(check, "run_piece", run_piece)
    monkeypatch.setattr(check.time, "monotonic", lambda: now[0])
    target = tmp_path / "out.json"
    assert check.main(["--json", str(target)]) == 1
    found = json.loads(target.read_text())["pieces"]
    assert now[0] - 100 == check.TOTAL_SECONDS and list(found) == list(check.PIECES)
    states = [piece["status"] for piece in found.values()]
    assert states == ["timed out"] * (len(begun) - 1) + ["cut off"] + ["not run"] * (len(states) - len(begun))
    assert 4 < len(begun) < len(states)
    assert "the 480 s for all pieces were over" in found[begun[-1]]["error"]


def test_pieces_are_chosen_by_name(check: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(check.PIECES)
    with pytest.raises(SystemExit) as refused:
        check.main(["modes", "typo"])
    assert refused.value.code == 2 and "no such piece: typo" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_as_it_is_started(tmp_path: Path) -> None:
    """Processes: one that passes without asserts, and one that is stopped; the exit code says so."""
    target = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--size", "tiny", "--json", str(target)]
    done = subprocess.run([*command, "float32"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(target.read_text())
    assert report["pieces"]["float32"]["figures"]["tolerance"] == 1e-3
    done = subprocess.run([*command, "--seconds", "0.5", "modes"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "cut off" in done.stdout and "the 0.5 s for all" in done.stdout
    if not torch.cuda.is_available():
        cuda = [part if part != "cpu" else "cuda" for part in command]
        done = subprocess.run([*cuda, "doctor"], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1 and "no CUDA device is visible" in done.stdout


@pytest.mark.slow
def test_nothing_but_the_core_is_imported() -> None:
    code = "import sys, benchmarks.gpu_pieces; print(' '.join('.'.join(name.split('.')[:2]) for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    loaded = set(done.stdout.split())
    assert not {name.split(".")[0] for name in loaded} & {"verl", "ray", "hydra", "datasets", "tensordict", "lm_eval"}
    rooms = {name.split(".")[1] for name in loaded if name.startswith("refine_verl.")}
    assert rooms == {"config", "doctor", "kernels", "models", "nsp"}


REPORT = {
    "device": "cuda",
    "size": "full",
    "environment": {
        "device": "NVIDIA X", "memory_gib": 79.1, "capability": "9.0", "cuda": "12.9", "torch": "2.11.0",
        "triton": "3.7.1", "transformers": "5.9.0", "flash-linear-attention": "0.6.0", "python": "3.12.3",
    },
    "pieces": {
        "doctor": {"status": "passed", "seconds": 31.4, "figures": {}},
        "modes": {"status": "failed", "seconds": 3.0, "figures": {}, "error": "a\nb | c"},
        "cost": {
            "status": "timed out", "seconds": 150.0, "error": "not finished after 150 s",
            "figures": {
                "sft_peak_gib": 40.5, "sft_seconds": [1.0, 2.0, 3.0], "sft_tokens_per_second": 32768.0,
                "fused_peak_gib": "out of memory",
            },
        },
        "launches": {"status": "passed", "seconds": 9.0, "figures": {"sft": 2456, "two-phase": 13823}},
        "piece_sizes": {
            "status": "cut off", "seconds": 9.0, "error": "the 480 s for all pieces were over",
            "figures": {"fork_2048_peak_gib": 30.1, "fork_2048_seconds": [1.1, 1.3, 1.2], "fork_4096_peak_gib": 30.2},
        },
        "longest": {
            "status": "passed", "seconds": 9.0, "figures": {"sft_longest": 65536, "longer_were_not_tried": ["sft"]},
        },
    },
}  # fmt: skip


def test_the_section_says_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    section = load("gpu_section", monkeypatch)
    page, figures = tmp_path / "performance.md", tmp_path / "gpu_check.json"
    before = (ROOT / "docs/performance.md").read_text()
    page.write_text(before)
    figures.write_text(json.dumps(REPORT))
    for _ in range(2):  # again: it is replaced, not added
        section.main([str(figures), "--commit", "abc123", "--page", str(page)])
    text = page.read_text()
    head, tail = before.split(section.BEGIN)[0], before.split(section.END)[1]
    assert text.startswith(head + section.BEGIN) and text.endswith(section.END + tail)
    for line in (
        "NVIDIA X, 79.1 GiB, compute capability 9.0, CUDA 12.9; torch 2.11.0, triton 3.7.1, transformers 5.9.0, fla "
        "0.6.0, Python 3.12.3; commit `abc123`; `make gpu-check`.",
        "| `modes` | failed: b / c | 3 |",
        "| `cost` | timed out: not finished after 150 s | 150 |",
        "| DeltaNet-1.3B, layers recomputed | next-token step | 2.00 | 1 | 32,768 | 40.5 |",
        "| DeltaNet-1.3B, layers recomputed | fused step | - | - | - | out of memory |",
        "| two-phase | 13,823 |",
        "| `piece_sizes` | cut off: the 480 s for all pieces were over | 9 |",
        "| 2,048 | two-phase step | 1.20 | 30.1 |",
        "| 4,096 | two-phase step | - | 30.2 |",
        "| next-token step | 65,536 (longer ones were not tried) |",
    ):
        assert line in text, line


@pytest.mark.parametrize(("key", "value"), [("device", "cpu"), ("size", "tiny")])
def test_figures_of_no_gpu_are_not_quoted(monkeypatch: pytest.MonkeyPatch, key: str, value: str) -> None:
    section = load("gpu_section", monkeypatch)
    with pytest.raises(SystemExit, match="Only those of a GPU and of full size are quoted"):
        section.section({**REPORT, key: value}, "abc")
