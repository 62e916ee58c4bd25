"""Fast-weight models: their state, packed batches and the passes REFINE makes. torch, transformers and fla only."""

from refine_verl.config import ModelError
from refine_verl.models.actor import FastWeightActor, make_actor, snapshot_count
from refine_verl.models.adapters import ModelAdapter, get_adapter, known_model_types, register_adapter
from refine_verl.models.loading import ModelInfo, inspect_model, load_model, open_model
from refine_verl.models.packing import Documents, Packed, pack
from refine_verl.models.rollouts import Branches, RolloutBatch, RolloutDraws, documents_together
from refine_verl.models.state import FastWeightState
