"""A fast-weight model that fla does not have, made known to REFINE: the worked example of docs/extending.md.

Importing the package registers the model with transformers and its adapter with REFINE.
"""

from new_model.adapter import DecayMemoryAdapter
from new_model.modeling import DecayMemoryConfig, DecayMemoryForCausalLM

__all__ = ["DecayMemoryAdapter", "DecayMemoryConfig", "DecayMemoryForCausalLM"]
