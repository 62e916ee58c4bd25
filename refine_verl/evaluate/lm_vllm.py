"""lm-evaluation-harness's own model `vllm` with the models that vLLM gets from this package: `--model vllm`.

The harness's class is used as it is. What would only fail in its engine, or mean something else than it says, is
refused before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import AutoConfig

from refine_verl.config import ConfigError
from refine_verl.serving.distribution import answer_to_vllm
from refine_verl.serving.engine import FAMILIES, require_vllm, said_of

_OURS = ("ttt", "adapt")
"""Arguments of model `refine` that change weights."""


def prepare() -> None:
    """Let the harness find vLLM, by whichever name it is installed, and check what its model is made with.

    Raises:
        ConfigError: no vLLM, or another release.
    """
    require_vllm("model")
    answer_to_vllm()
    from lm_eval.models.vllm_causallms import VLLM

    if not hasattr(VLLM.__init__, "__wrapped__"):
        VLLM.__init__ = _checked(VLLM.__init__)


def _checked(make: Callable[..., None]) -> Callable[..., None]:
    """The harness's `VLLM.__init__`, with refusals.

    Raises:
        ConfigError: test-time training.
        ModelError: a model that vLLM cannot serve, with the reason.
    """

    @functools.wraps(make)
    def checked(self: Any, pretrained: str = "", *positional: Any, **arguments: Any) -> None:
        if not pretrained:
            raise ConfigError("pretrained", "is missing: --model_args pretrained=DIR names the model.")
        for name in _OURS:
            if arguments.pop(name, None) not in (None, "none"):
                raise ConfigError(
                    name, "vLLM serves weights as they are; for test-time training use --model refine. Leave it out."
                )
        with said_of(f"pretrained={pretrained}"):
            make(self, pretrained, *positional, **arguments, **_room(pretrained, arguments))

    return checked


def _room(pretrained: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What lets vLLM take prompts of the length that was asked for, where the model has no positions."""
    length = arguments.get("max_model_len") or arguments.get("max_length")
    if not length or "hf_overrides" in arguments or AutoConfig.from_pretrained(pretrained).model_type not in FAMILIES:
        return {}
    return {"hf_overrides": {"max_position_embeddings": int(length)}}
