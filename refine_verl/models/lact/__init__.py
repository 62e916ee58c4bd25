"""LaCT: large-chunk test-time training. Importing this registers ``lact_swiglu`` with transformers and with REFINE."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from refine_verl.models.adapters import register_adapter
from refine_verl.models.lact.adapter import LaCTAdapter
from refine_verl.models.lact.configuration import LaCTConfig
from refine_verl.models.lact.modeling import LaCTForCausalLM, LaCTModel
from refine_verl.models.lact.state import LaCTCache, LaCTState

# some other package may know this model type already; this is the one that has a state
AutoConfig.register(LaCTConfig.model_type, LaCTConfig, exist_ok=True)
AutoModel.register(LaCTConfig, LaCTModel, exist_ok=True)
AutoModelForCausalLM.register(LaCTConfig, LaCTForCausalLM, exist_ok=True)
register_adapter(LaCTConfig.model_type)(LaCTAdapter)
