"""Scores of generated answers.

`score` is all that most callers need: `score(task, prediction, references)`. The measures themselves are in
`metrics`, what each task is scored by, and in which of the three published conventions, in `conventions`.
"""

from refine_verl.config import CONVENTIONS
from refine_verl.scoring.conventions import TASKS, MetricError, main_metric, register_task, score

__all__ = ["CONVENTIONS", "TASKS", "MetricError", "main_metric", "register_task", "score"]
