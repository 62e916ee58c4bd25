"""Files of torch.save are read as data: what a checkpoint holds is let through, code is not, and is named."""

from __future__ import annotations

import os
import random
from fractions import Fraction
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import pytest
import torch
from reference.crafted import craft
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.serialization import get_safe_globals, safe_globals
from trajectories.scenarios import unpack_old_run

from refine_verl.models.stored_types import SAFE_TYPES, only_safe_types, unsafe_content


def verls_load(file: Path) -> object:
    return torch.load(file, weights_only=False)


def test_what_runs_code_is_not_read(tmp_path: Path) -> None:
    file, marker = tmp_path / "crafted.pt", tmp_path / "the_code_was_run"
    craft(file, marker)
    with only_safe_types(), pytest.raises(UnpicklingError, match=r"posix\.mkdir|nt\.mkdir"):
        verls_load(file)
    problem = unsafe_content(file)
    assert problem is not None and problem.startswith("it needs posix.mkdir") and not marker.exists()
    verls_load(file)  # negative control
    assert marker.exists()


def test_a_harmless_type_that_is_not_listed_is_not_read_either(tmp_path: Path) -> None:
    torch.save({"a": Fraction(1, 3)}, tmp_path / "more.pt")
    problem = unsafe_content(tmp_path / "more.pt")
    assert problem is not None and "fractions.Fraction" in problem
    with only_safe_types(), pytest.raises(UnpicklingError, match="Fraction"):
        verls_load(tmp_path / "more.pt")


NO_FILES_OF_TORCH = {"text": b"data", "nothing": b"", "a pickle alone": b"cos\nsystem\n(S'true'\ntR."}


@pytest.mark.parametrize("content", NO_FILES_OF_TORCH)
def test_what_torch_did_not_write(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.pt").write_bytes(NO_FILES_OF_TORCH[content])
    problem = unsafe_content(tmp_path / "data.pt")
    assert problem is not None and "torch.save" in problem
    with pytest.raises(FileNotFoundError):
        unsafe_content(tmp_path / "elsewhere.pt")


def test_random_states_are_read_as_they_were(tmp_path: Path) -> None:
    states = {"numpy": np.random.get_state(), "random": random.getstate(), "cpu": torch.get_rng_state()}
    torch.save(states, tmp_path / "extra.pt")
    assert unsafe_content(tmp_path / "extra.pt") is None
    with only_safe_types():
        read = verls_load(tmp_path / "extra.pt")
    assert isinstance(read, dict) and read["random"] == states["random"] and torch.equal(read["cpu"], states["cpu"])
    for got, wanted in zip(read["numpy"], states["numpy"], strict=True):
        assert np.array_equal(got, wanted)


def test_checkpoints_of_an_earlier_version_are_read_as_they_were(tmp_path: Path) -> None:
    """Shards of FSDP2 with their mesh, the optimiser, the schedule, the place in the data."""
    unpack_old_run(tmp_path)
    files = sorted((tmp_path / "run" / "global_step_2").rglob("*.pt"))
    assert len(files) == 4
    for file in files:
        assert unsafe_content(file) is None, file
        with only_safe_types():
            read = verls_load(file)
        assert same(read, verls_load(file)), file


def same(one: object, other: object) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, DTensor) and isinstance(other, DTensor):
        return one.placements == other.placements and torch.equal(one._local_tensor, other._local_tensor)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_the_process_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # torch refuses both at once
    torch.save({"a": 1}, tmp_path / "data.pt")
    before = dict(os.environ)
    with safe_globals([Fraction, SAFE_TYPES[1]]):
        known = set(get_safe_globals())
        with only_safe_types():
            assert verls_load(tmp_path / "data.pt") == {"a": 1}
        assert set(get_safe_globals()) == known and dict(os.environ) == before
    assert not set(SAFE_TYPES) & set(get_safe_globals())
