"""What can be had of the Hugging Face hub: whether it answers (asked once: the library itself retries for half a
minute), and whether a file from there is the file itself."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

OFFLINE_VARIABLE = "HF_HUB_OFFLINE"
LFS_POINTER = "is a Git LFS pointer and not the file itself. Run `git lfs pull` there."
"""What is said of such a file."""
_SECONDS = 5.0


@functools.cache
def hub_is_reachable() -> bool:
    """One request without retries, through the session, endpoint and proxies of huggingface_hub.

    False also where HF_HUB_OFFLINE is set. Where the hub does not answer, HF_HUB_OFFLINE is set for the processes to
    come, so that workers take what the cache holds at once.
    """
    import httpx
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except httpx.TransportError as error:
        logger.info("%s cannot be reached (%s); only what the local cache holds is used", constants.ENDPOINT, error)
        os.environ.setdefault(OFFLINE_VARIABLE, "1")
        return False
    return True


def local_files_only(name: str) -> bool:
    """For ``from_pretrained``: True for a directory, and for a hub id that cannot be asked for."""
    return os.path.isdir(name) or not hub_is_reachable()


def why_not(name: str) -> str:
    """The reason and the cure where a hub id was not found in the cache and the hub was not asked."""
    from huggingface_hub import constants

    if hub_is_reachable():
        return f"is it a hub id that exists, and may you read it? ({constants.ENDPOINT}/{name})"
    if constants.is_offline_mode():
        return f"{OFFLINE_VARIABLE} is set and the local cache does not hold it"
    return f"{constants.ENDPOINT} cannot be reached and the local cache does not hold it"


def is_lfs_pointer(file: Path) -> bool:
    """Whether a repository was cloned without this file's content."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(40).startswith(b"version https://git-lfs")
