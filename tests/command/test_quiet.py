"""Only what is known to mean nothing here is left out."""

import os
import warnings

import pytest

from refine_verl.command.quiet import quieten_third_parties


def test_known_messages_are_left_out_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VERL_LOGGING_LEVEL", raising=False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quieten_third_parties()
        warnings.warn("Triton is not supported on current platform, roll back to CPU.", stacklevel=1)
        warnings.warn("SGLang engine is not available", stacklevel=1)
        warnings.warn("Triton is old", stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["Triton is old"]


def test_the_users_level_of_verls_log_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_LOGGING_LEVEL", "DEBUG")
    with warnings.catch_warnings():
        quieten_third_parties()
    assert os.environ["VERL_LOGGING_LEVEL"] == "DEBUG"
