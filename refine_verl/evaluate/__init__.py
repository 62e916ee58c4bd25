"""Evaluation of trained models: `python -m refine_verl.evaluate`, and lm-evaluation-harness with our models.

`model` reads, scores and writes; `lm` is the same as a model class of lm-evaluation-harness. How an answer is scored
is the business of `refine_verl.scoring`.
"""
