"""A LoRA adapter merged into a model directory: `python -m refine_verl.export` (docs/keep.md)."""
