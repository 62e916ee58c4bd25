"""No secrets in what is written, logged or shown: which keys hold one, and a configuration without their values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(hidden)"
SECRET_KEY = re.compile(
    r"(^|[_.-])("
    r"(api|access|secret|private|auth|signing)_?key(_id)?|secret(_\w+)?|pass(word|wd|phrase)|credentials?"
    # not the names of special tokens: eos_token is no secret
    r"|(?<!bos_)(?<!eos_)(?<!pad_)(?<!unk_)(?<!cls_)(?<!sep_)(?<!mask_)(?<!image_)(?<!video_)(?<!audio_)(?<!per_)token"
    r"|\w*apikey|\w*authtoken"
    r")$",
    re.IGNORECASE,
)
"""Keys of settings and names of environment variables whose values are secrets."""

_ENVIRONMENT_KEY = re.compile(r"[A-Z0-9_]+_KEY")
"""`OPENAI_KEY`. Settings that name a column, such as `data.prompt_key`, are in small letters."""

_KEY_IN_ENVIRONMENT = re.compile(r"keys?(_?(id|\d+))?$", re.IGNORECASE)
"""Among environment variables there are no columns: `openai_key`, `MYKEY`, `OPENAI_KEY_2`."""

_IN_URL = re.compile(r"(\w://[^/:@\s]*:)[^/@\s]+@")


def is_secret(key: str) -> bool:
    """Whether the last part of a dotted key names a secret: `...env_vars.WANDB_API_KEY`, `logger.password`."""
    section, _, name = key.rpartition(".")
    if SECRET_KEY.search(name) or _ENVIRONMENT_KEY.fullmatch(name):
        return True
    return section.rpartition(".")[2] == "env_vars" and _KEY_IN_ENVIRONMENT.search(name) is not None


def redacted(value: Any, key: str = "") -> Any:
    """A copy of nested mappings and lists without secrets: their values, and passwords in URLs, are replaced.

    Args:
        value: plain containers, as `OmegaConf.to_container` makes them.
        key: the dotted key under which ``value`` stands.
    """
    if isinstance(value, Mapping):
        return {name: redacted(item, f"{key}.{name}") for name, item in value.items()}
    if is_secret(key) and value not in (None, ""):
        return HIDDEN
    if isinstance(value, (list, tuple)):
        return [redacted(item) for item in value]
    return _IN_URL.sub(rf"\1{HIDDEN}@", value) if isinstance(value, str) else value
