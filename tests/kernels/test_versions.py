"""Which Triton trains what where: fla's own check, held to fla, and the refusals before a run."""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.version import Version

from refine_verl.config import ModelError
from refine_verl.doctor.findings import FAIL, OK, WARN
from refine_verl.doctor.kernels import triton_on
from refine_verl.kernels import versions
from refine_verl.kernels.versions import Installed, doubt, why_not_trainable
from refine_verl.preflight.run import check_gpu_kernels

H100, A100, B200 = (9, 0), (8, 0), (10, 0)


def model(kind: str, **values: Any) -> SimpleNamespace:
    return SimpleNamespace(model_type=kind, **values)


def have(triton: str, tilelang: bool = False) -> Installed:
    return Installed(Version(triton), tilelang)


@pytest.mark.parametrize(("triton", "refused"), [("3.3.1", False), ("3.4.0", True), ("3.6.0", True), ("3.7.0", True),
                                                 ("3.7.1", False), ("3.9.0", False)])  # fmt: skip
def test_what_fla_refuses_on_hopper(triton: str, refused: bool) -> None:
    gated = model("gated_deltanet")
    assert (why_not_trainable(gated, H100, have(triton)) is not None) == refused
    assert why_not_trainable(gated, H100, have(triton, tilelang=True)) is None
    for capability in (A100, B200, None):
        assert why_not_trainable(gated, capability, have(triton)) is None
    for kind in ("delta_net", "lact_swiglu", "gla", "hgrn2", "kda"):
        assert why_not_trainable(model(kind), H100, have(triton)) is None
    assert (why_not_trainable(model("gated_deltaproduct", use_forget_gate=True), H100, have(triton)) is None) != refused
    assert why_not_trainable(model("gated_deltaproduct", use_forget_gate=False), H100, have(triton)) is None


def test_the_bounds_are_those_of_fla() -> None:
    """A later fla may refuse something else: then this module has to follow."""
    from fla.ops.common import chunk_o

    source = inspect.getsource(chunk_o)
    said = re.search(r"Triton >= ([\d.]+) and < ([\d.]+) on Hopper", source)
    assert said is not None and tuple(map(Version, said.groups())) == versions.WRONG_ON_HOPPER
    assert re.search(r"BLACKWELL_8_WARP_RACE = .* not TRITON_ABOVE_3_8_0", source)


def test_the_preflight_says_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        ModelError, match=r"model: the gradients of a gated_deltanet .*triton 3\.6\.0.*tilelang\[nvcc\]"
    ):
        check_gpu_kernels(model("gated_deltanet"), H100, have("3.6.0"))
    check_gpu_kernels(model("gated_deltanet"), H100, have("3.7.1"))
    assert not caplog.records
    check_gpu_kernels(model("gated_deltanet"), B200, have("3.7.1"))
    assert "race on Blackwell" in caplog.text


def test_doctor_says_so() -> None:
    refused, doubted, good = (
        triton_on("GPU 0, triton", *case)
        for case in ((H100, have("3.6.0")), (B200, have("3.7.1")), (H100, have("3.9.0")))
    )
    assert refused.status == FAIL and "triton 3.6.0" in refused.detail and "pip install" in refused.fix
    assert doubted.status == WARN and "race" in doubted.detail and "3.8.0" in doubted.fix
    assert good.status == OK and not good.fix
    assert doubt(model("delta_net"), B200, have("3.7.1")) is None


@pytest.mark.parametrize(("compiler", "environment", "usable"), [
    (True, {}, True), (False, {}, False), (True, {"FLA_TILELANG": "0"}, False), (True, {"FLA_TILELANG": "1"}, True),
    (True, {"FLA_DISABLE_BACKEND_DISPATCH": "1"}, False),
])  # fmt: skip
def test_tilelang_counts_if_fla_would_use_it(
    compiler: bool, environment: dict[str, str], usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fla.utils.env

    for name in ("FLA_TILELANG", "FLA_DISABLE_BACKEND_DISPATCH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(fla.utils.env, "has_usable_nvcc", lambda: compiler)
    monkeypatch.setattr(versions.importlib.util, "find_spec", lambda name: None)
    assert not versions.installed().tilelang
    monkeypatch.setattr(versions.importlib.util, "find_spec", lambda name: object())
    assert versions.installed().tilelang == usable
