"""What other packages say of parts of theirs that are not in use here, left out of the output of our commands."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings

_SAYS_NOTHING_HERE = (
    ".*engine is not available",  # verl, of inference engines
    "Triton is not supported",  # fla, without a GPU: refine_verl.kernels stands in
    "'set_vital' is deprecated",  # torchdata
)

_HYBRIDS = ("olmo_hybrid", "qwen3_5", "qwen3_next")
_LOGGED_FOR_NOTHING = {
    # a run on one machine listens to that machine only, and Ray has just made its token
    "ray._private.authentication.authentication_token_setup": "Token authentication is enabled",
    # a tokenizer is loaded by the model's configuration, whose classes transformers does not all have
    "transformers.configuration_utils": "You are using a model of type",
    # the linear layers of hybrids run through fla, or what stands in for it, and not through transformers' own ways
    **{f"transformers.models.{kind}.modeling_{kind}": "The fast path is not available" for kind in _HYBRIDS},
}


def quieten_third_parties() -> None:
    """For this process; call it before importing torch, fla or verl."""
    os.environ.setdefault("VERL_LOGGING_LEVEL", "WARN")
    for message in _SAYS_NOTHING_HERE:
        warnings.filterwarnings("ignore", message=message)
    for name, beginning in _LOGGED_FOR_NOTHING.items():
        logging.getLogger(name).addFilter(functools.partial(_begins_otherwise, beginning))
    if not sys.stderr.isatty():  # bars are drawn for a person; in a file they are thousands of lines
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers reads it, too
    # texts are as long as they are: the tokenizer's warning about its model's context means nothing here
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)


def _begins_otherwise(beginning: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(beginning)
