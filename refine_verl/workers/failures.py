"""Telling the loss of another process from an error of one's own. Loads no ray."""

from __future__ import annotations

import re

_PEER_GONE = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|remote process exited|socket timeout|"
    r"timed out waiting|no route to host|peer (is|was)? ?(gone|closed)",
    re.IGNORECASE,
)


def lost_connection(error: BaseException) -> bool:
    """Whether an error of a collective operation or a socket says that the process at the other end is gone.

    Goes by the message where it must: gloo and NCCL raise RuntimeError for everything.
    """
    if isinstance(error, ConnectionError):
        return True
    return isinstance(error, RuntimeError) and _PEER_GONE.search(str(error)) is not None
