"""Hybrids: linear layers beside softmax attention. Importing this registers their adapters."""

from refine_verl.kernels.patch import allow_attention_layers
from refine_verl.models.adapters import FLA_THROUGH_THE_SAME_ADAPTER, FLA_VERIFIED_ON_CPU, register_adapter
from refine_verl.models.hybrid.adapter import DeltaRuleHybridAdapter, HybridAdapter, HybridTrace
from refine_verl.models.hybrid.mixers import MIXERS
from refine_verl.models.hybrid.state import SharedKeys

for _model_type in MIXERS:
    register_adapter(_model_type)(DeltaRuleHybridAdapter)
for _model_type in FLA_VERIFIED_ON_CPU:
    register_adapter(_model_type, with_attention=True)(DeltaRuleHybridAdapter)
for _model_type in FLA_THROUGH_THE_SAME_ADAPTER:
    register_adapter(_model_type, with_attention=True)(HybridAdapter)

allow_attention_layers()
