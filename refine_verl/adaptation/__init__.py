"""Test-time training of one model on prompts, in this process: ``with refine_verl.adapt(...)``.

Needs torch, transformers and fla; knows neither verl nor Ray.
"""

from refine_verl.adaptation.prompts import PromptError, Prompts
from refine_verl.adaptation.session import Adapted, adapt
from refine_verl.adaptation.settings import AdaptSettings
