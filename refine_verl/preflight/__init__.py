"""Everything that is checked with the model, the data or the cluster before a run starts.

`run` is the whole of it, `prompts` what post-training and test-time training add, `estimator` whether advantages can be
had, `checkpoints` whether a run can go on from what is there, `cluster` and `storage` what several machines need.
"""
