"""What a run writes and reads back: metrics, progress, predictions, checkpoints, configuration without secrets.

Loads no torch, ray or verl.
"""
