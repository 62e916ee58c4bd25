"""Launches, model passes and operator calls per document (`benchmarks.launches`): one pass too many fails here."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from refine_verl.config import NSPSettings
from refine_verl.kernels import patch
from refine_verl.models import adapters
from refine_verl.models.adapters import FlaAdapter

LAYERS, LENGTH, VOCABULARY, PIECES = 2, 1024, 256, 4
K = NSPSettings().rollout_length
PASSES = {"forward": 1, "sft": 1, "rollout": 1 + K, "update": 2, "two-phase": 3 + K, "fused": 1 + K}
"""Read S and write k tokens; train S and the branches; or all of it, S once."""
READ = PIECES + 1
"""Operator calls of a layer for a pass whose states are had afterwards: the pieces, and one look-up of all states."""
OPERATORS = {
    "forward": 1,
    "sft": 1,
    "rollout": READ + K,
    "update": READ + 1,
    "two-phase": READ + K + READ + 1,
    "fused": READ + K,
}
TOLERATED = 1.02
"""Launches over those that were counted: another torch may split an operation. A pass of the trunk is 3 to 12%."""
LAUNCHES = {
    "delta_net": {"sft": 226, "two-phase": 1387, "fused": 1126},
    "gated_deltanet": {"sft": 262, "two-phase": 1681, "fused": 1314},
}
WITH_LAYER = {
    "delta_net": {"sft": 294, "two-phase": 1637, "fused": 1628},
    "gated_deltanet": {"sft": 344, "two-phase": 1979, "fused": 1880},
}
"""Layers are computed again in the backward pass."""
DOCUMENTED = {
    "next-token loss alone": "sft",
    "rollouts": "rollout",
    "update": "update",
    "two-phase step": "two-phase",
    "fused step (`refine.on_policy=true`)": "fused",
}
"""Rows of the table in docs/performance.md."""


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    monkeypatch.setattr(adapters, "TOKENS_PER_PIECE", LENGTH // PIECES)
    return importlib.import_module("benchmarks.launches")


@pytest.mark.parametrize("family", LAUNCHES)
def test_what_a_document_costs(launches: ModuleType, family: str) -> None:
    found = launches.measure(launches.narrow(family, LAYERS, LENGTH, VOCABULARY, "none"))
    assert {kind: found[kind].model_passes for kind in PASSES} == PASSES
    assert {kind: counts.operator_calls for kind, counts in found.items()} == {
        kind: LAYERS * calls for kind, calls in OPERATORS.items()
    }
    assert all(counts.layer_calls == LAYERS * counts.model_passes for counts in found.values())
    assert_launches(found, LAUNCHES[family])


def assert_launches(found: dict, counted: dict[str, int]) -> None:
    for kind, number in counted.items():
        assert 0.8 * number < found[kind].launches <= TOLERATED * number, (kind, found[kind])


@pytest.mark.slow
def test_what_a_document_of_the_paper_costs(launches: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/performance.md says, but for the chunks of a large vocabulary, some 60 launches."""
    monkeypatch.setattr(adapters, "TOKENS_PER_PIECE", 16384 // PIECES)
    found = launches.measure(launches.narrow("delta_net", 24, 16384, VOCABULARY, "none"))
    page = (Path(__file__).resolve().parents[2] / "docs" / "performance.md").read_text()
    rows = {line.split("|")[1].strip(): line.split("|") for line in page.splitlines() if line.startswith("| ")}
    for name, kind in DOCUMENTED.items():
        _, _, passes, calls, number, _ = (cell.strip() for cell in rows[name])
        assert found[kind].model_passes == sum(K if part == "k" else int(part) for part in passes.split(" + "))
        assert found[kind].operator_calls == int(calls)
        assert found[kind].launches == pytest.approx(int(number.replace(",", "")), abs=120), name


@pytest.mark.parametrize("family", WITH_LAYER)
def test_layers_are_computed_again_but_documents_are_not_cut(launches: ModuleType, family: str) -> None:
    """The plain step that others are divided by is one pass, its layers run once more in the backward pass."""
    found = launches.measure(launches.narrow(family, LAYERS, LENGTH, VOCABULARY, "layer"))
    assert found["sft"].model_passes == 1 and found["sft"].layer_calls == 2 * LAYERS
    assert found["update"].model_passes == PASSES["update"] and found["update"].layer_calls == 4 * LAYERS
    assert_launches(found, WITH_LAYER[family])


def test_a_pass_too_many_is_seen(launches: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    honest = FlaAdapter.trace

    def twice(self: FlaAdapter, model: object, documents: object, positions: object = None) -> object:
        honest(self, model, documents, positions)  # type: ignore[arg-type]
        return honest(self, model, documents, positions)  # type: ignore[arg-type]

    monkeypatch.setattr(FlaAdapter, "trace", twice)
    found = launches.measure(launches.narrow("delta_net", LAYERS, LENGTH, VOCABULARY, "none"))
    for kind in ("two-phase", "fused"):
        assert found[kind].launches > TOLERATED * LAUNCHES["delta_net"][kind]
    assert found["fused"].model_passes == PASSES["fused"] + 1


def test_everything_is_left_as_it_was(launches: ModuleType) -> None:
    bench = launches.narrow("delta_net", 1, 64, 32, "none")
    names = [(target, getattr(*patch._resolve(target))) for target in (*patch.OPERATORS, patch.CONVOLUTION)]
    in_use, backward = patch.cpu_kernels_in_use(), torch.Tensor.backward
    with launches.counting(bench.actor):
        assert not patch.cpu_kernels_in_use()
    assert patch.cpu_kernels_in_use() == in_use and torch.Tensor.backward is backward
    for target, before in names:
        assert getattr(getattr(*patch._resolve(target)), "uncut", None) is getattr(before, "uncut", None), target


def test_the_command(launches: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    target = tmp_path / "launches.json"
    arguments = ["--layers", "1", "--length", "512", "--vocabulary", "64", "--json", str(target)]
    monkeypatch.setattr("sys.argv", ["launches", *arguments])
    launches.main()
    written = json.loads(target.read_text())
    assert written["settings"]["length"] == 512 and list(written["counts"]) == list(launches.MEASURED)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("two-phase"))
    assert row.split()[-1].replace(",", "") == str(written["counts"]["two-phase"]["launches"])
