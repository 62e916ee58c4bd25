"""A hub id where there is no hub: said at once, and from the cache where that suffices."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants

from refine_verl.config.hub import OFFLINE_VARIABLE, hub_is_reachable, local_files_only
from refine_verl.main import main


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(OFFLINE_VARIABLE, "")  # so that what the code sets is taken back
    monkeypatch.delenv(OFFLINE_VARIABLE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub_is_reachable.cache_clear()
    yield
    hub_is_reachable.cache_clear()


class Session:
    """Stands for huggingface_hub's; counts the requests."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.requests: list[str] = []

    def head(self, url: str, timeout: float) -> None:
        assert timeout <= 5
        self.requests.append(url)
        if self.error is not None:
            raise self.error


def use(session: Session, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    return session


def test_no_retries_and_one_clear_message(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], empty_directory: Path
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waited {seconds} s for another try"))
    assert main(["recipe=midtrain", "data.train_files=x", "model.path=nobody/nothing"]) == 2
    said = capfd.readouterr().err
    assert "model.path=nobody/nothing: there is no such directory, and as a hub id it cannot be read" in said
    assert "http://127.0.0.1:9 cannot be reached and the local cache does not hold it" in said
    assert "download the model elsewhere and give its directory" in said
    assert "Traceback" not in said and not list(empty_directory.iterdir())


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    session = use(Session(httpx.ConnectTimeout("slow")), monkeypatch)
    assert local_files_only("some/model") and local_files_only("other/model")
    assert session.requests == [constants.ENDPOINT]
    assert os.environ[OFFLINE_VARIABLE] == "1"  # for the workers


def test_a_hub_that_answers_is_used_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    session = use(Session(), monkeypatch)
    assert not local_files_only("some/model") and not local_files_only("other/model")
    assert len(session.requests) == 1
    assert OFFLINE_VARIABLE not in os.environ


def test_offline_by_wish_or_a_directory_asks_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    session = use(Session(), monkeypatch)
    assert local_files_only(str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_files_only("some/model")
    assert session.requests == []
