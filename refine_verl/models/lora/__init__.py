"""LoRA adapters of PEFT on the models of this package: put in and taken out, kept in files, merged.

PEFT takes seconds to import, so that nothing here imports it before adapters are asked for.
"""

from refine_verl.models.lora.files import (
    Adapter,
    apply_adapter,
    base_fingerprint,
    merge_adapter,
    open_adapter,
    write_adapter,
)
from refine_verl.models.lora.layers import (
    adapter_parameters,
    add_adapters,
    has_adapters,
    merged_weights,
    put_back,
    target_names,
    trainable_numbers,
)
