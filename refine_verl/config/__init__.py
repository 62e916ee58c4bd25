"""Typed settings: what keys exist, what they may hold, and what is said of those that cannot be used.

Loads no torch, ray, verl or transformers. `options` is what sections are made of, `nsp` has `refine.nsp:`, `sections`
the rest of `refine:` and `model:`, `data` has `data:`, of documents and of prompts, and `refusals` the errors.
"""

from refine_verl.config.data import DataSettings, FileSettings, PromptSettings, split_key
from refine_verl.config.lora import ALL_LINEAR, LORA_ALPHA, LoraSettings
from refine_verl.config.nsp import REWARDS, SELECTIONS, NSPSettings, RolloutLength
from refine_verl.config.options import Settings, did_you_mean, nearest, option, require_choice, require_names
from refine_verl.config.refusals import ConfigError, DataError, ModelError, Refusal, RunFailed
from refine_verl.config.sections import (
    ACTIVATION_CHECKPOINTING,
    CONVENTIONS,
    INNER,
    AnswerSettings,
    LossSettings,
    ModelSettings,
    RefineSettings,
    SettingInfo,
    TTTSettings,
    is_made_of_documents,
    list_settings,
)
