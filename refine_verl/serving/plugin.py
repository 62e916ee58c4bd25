"""What vLLM calls in each of its processes (entry point ``vllm.general_plugins``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, MambaModelConfig
from vllm.platforms import current_platform

from refine_verl.serving.configs import layer_settings, register_configs, why_not_on_cpu, why_not_served
from refine_verl.serving.parent import end_with_parent

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

ARCHITECTURES = ("DeltaNetForCausalLM", "GatedDeltaNetForCausalLM", "LaCTForCausalLM")


def register() -> None:
    """Make the families known to vLLM; may be called several times."""
    end_with_parent()
    register_configs()
    for architecture in ARCHITECTURES:
        # named, not imported: the module asks for the device
        ModelRegistry.register_model(architecture, "refine_verl.serving.model:FastWeightForCausalLM")
        MODELS_CONFIG_MAP[architecture] = FastWeightModelConfig


class FastWeightModelConfig(MambaModelConfig):
    """What vLLM asks about these models before it starts anything."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Refuse what cannot be served.

        Raises:
            ValueError: a model that vLLM's layer does not compute, or not here; says why.
        """
        config = model_config.hf_config
        reason = why_not_served(config)
        if reason is None and current_platform.is_cpu():
            reason = why_not_on_cpu(layer_settings(config)) or _why_not_dtype(str(model_config.dtype))
        if reason is None and model_config.quantization:
            reason = f"quantization={model_config.quantization} has not been tried with it. Leave it out."
        if reason is not None:
            raise ValueError(f"vLLM cannot serve this {config.model_type} ({model_config.model}): {reason}")

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Recurrent states in float32 unless asked otherwise, and blocks of states for prefix caching."""
        if vllm_config.cache_config.mamba_ssm_cache_dtype == "auto":
            vllm_config.cache_config.mamba_ssm_cache_dtype = "float32"
        super().verify_and_update_config(vllm_config)


def _why_not_dtype(dtype: str) -> str | None:
    if dtype == "torch.bfloat16":
        return None
    return f"vLLM's CPU kernels compute in bfloat16, not in {dtype.removeprefix('torch.')}. Set dtype=bfloat16."
