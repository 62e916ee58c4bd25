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
from refine_verl.serving.adapters import room_for
from refine_verl.serving.distribution import answer_to_vllm
from refine_verl.serving.engine import FAMILIES, require_vllm, said_of
from refine_verl.serving.hybrids import HYBRIDS, STATES

_OURS = ("ttt", "adapt")
"""Arguments of model `refine` that change weights."""
_ADAPTER = ("lora_local_path", "adapter")


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
        ModelError: a model or an adapter that vLLM cannot serve, with the reason, or that do not belong together.
        DataError: a directory that is no adapter.
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
        more = _room(pretrained, arguments) | _adapter(pretrained, arguments)
        with said_of(f"pretrained={pretrained}"):
            make(self, pretrained, *positional, **arguments | more)

    return checked


def _room(pretrained: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What lets vLLM take prompts of the length that was asked for where the model has no positions, and of hybrids
    the type of states.
    """
    family = _family(pretrained)
    if family in HYBRIDS:
        return {} if "mamba_ssm_cache_dtype" in arguments else {"mamba_ssm_cache_dtype": STATES}
    length = arguments.get("max_model_len") or arguments.get("max_length")
    if not length or "hf_overrides" in arguments or family not in FAMILIES:
        return {}
    return {"hf_overrides": {"max_position_embeddings": int(length)}}


def _family(pretrained: str) -> str:
    """`model_type` of a model; empty where it cannot be read, which vLLM says with its reason."""
    try:
        return str(AutoConfig.from_pretrained(pretrained).model_type)
    except (OSError, ValueError):
        return ""


def _adapter(pretrained: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The harness's arguments of an adapter, which is checked; model `refine` calls it `adapter`, and so may this."""
    named = {name: arguments.pop(name) for name in _ADAPTER if arguments.get(name)}
    if len(named) > 1:
        raise ConfigError(_ADAPTER[1], f"and {_ADAPTER[0]} are the same. Leave one out.")
    for name, path in named.items():
        # which import fla
        from refine_verl.evaluate.served import check_base, require_served_adapter
        from refine_verl.models.lora import open_adapter

        adapter = open_adapter(path, key=name)
        require_served_adapter(adapter, _family(pretrained))
        check_base(pretrained, adapter, key="pretrained")
        rank = max(room_for(adapter.config.r), int(arguments.get("max_lora_rank") or 0))
        return {_ADAPTER[0]: str(adapter.path), "max_lora_rank": rank}
    return {}
