"""Only what is known to mean nothing here is left out."""

import io
import logging
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


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("ray._private.authentication.authentication_token_setup", "Token authentication is enabled for this"),
        ("transformers.models.qwen3_next.modeling_qwen3_next", "The fast path is not available because"),
        ("transformers.configuration_utils", "You are using a model of type `delta_net` to instantiate"),
    ],
)
def test_known_lines_of_logs_are_left_out(name: str, left_out: str, caplog: pytest.LogCaptureFixture) -> None:
    quieten_third_parties()
    logger = logging.getLogger(name)
    with caplog.at_level(logging.WARNING, logger=name):
        logger.addHandler(caplog.handler)
        try:
            logger.warning("%s ...", left_out)
            logger.warning("another")
        finally:
            logger.removeHandler(caplog.handler)
    assert set(caplog.messages) == {"another"}


def test_bars_are_drawn_for_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
        monkeypatch.setattr("sys.stderr", io.StringIO())
        monkeypatch.setattr("sys.stderr.isatty", lambda answer=terminal: answer, raising=False)
        quieten_third_parties()
        assert ("HF_HUB_DISABLE_PROGRESS_BARS" in os.environ) is not terminal
