"""What every test gives back as it found it."""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Iterator

import pytest


def pytest_configure() -> None:
    """Ctrl-C reaches what tests start, also where they run in the background of a script, which ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with whole runs first: what is left to share at the end are files of seconds."""
    slow = {item.path for item in items if item.get_closest_marker("dist")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """All imports are made: what they left is not looked at again whenever Python looks for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def configurations_composed_once() -> Iterator[None]:
    """Two thousand configurations are composed here, of the same files."""
    from reference.configurations import shared_work

    with shared_work():
        yield


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Commands run in this process set up logging for it (Hydra's do), with handlers that hold a captured stream."""
    handlers, level = list(logging.root.handlers), logging.root.level
    ours, disabled = logging.getLogger("refine_verl").level, logging.root.manager.disable
    yield
    logging.getLogger("refine_verl").setLevel(ours)
    logging.disable(disabled)
    for handler in set(logging.root.handlers) - set(handlers):
        logging.root.removeHandler(handler)
    logging.root.setLevel(level)


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """Commands run in this process set variables for what they start: for a GPU run VERL_PLATFORM, on any machine."""
    before = dict(os.environ)
    yield
    for name in (before.keys() | os.environ.keys()) - {"PYTEST_CURRENT_TEST"}:
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]
