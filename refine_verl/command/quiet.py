"""What other packages say of parts of theirs that are not in use here, left out of the output of our commands."""

from __future__ import annotations

import logging
import os
import warnings

_SAYS_NOTHING_HERE = (
    ".*engine is not available",  # verl, of inference engines
    "Triton is not supported",  # fla, without a GPU: refine_verl.kernels stands in
    "'set_vital' is deprecated",  # torchdata
)


def quieten_third_parties() -> None:
    """For this process; call it before importing torch, fla or verl."""
    os.environ.setdefault("VERL_LOGGING_LEVEL", "WARN")
    for message in _SAYS_NOTHING_HERE:
        warnings.filterwarnings("ignore", message=message)
    # texts are as long as they are: the tokenizer's warning about its model's context means nothing here
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
