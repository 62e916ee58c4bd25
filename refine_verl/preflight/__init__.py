"""Everything that is checked with the model, the data or the cluster before a run starts.

`run` is the whole of it, `prompts` what post-training and test-time training add, `checkpoints` whether a run can
resume from what is there, `answers` whether vLLM can write answers, `cluster` and `storage` what several machines need.
"""
