"""REFINE for verl: reinforcement learning on next-sequence prediction for fast-weight language models.

Importing the package loads nothing heavy; see ``refine_verl.config`` for the settings and
``python -m refine_verl.main --help`` for the command line.
"""

__version__ = "0.1.0"
