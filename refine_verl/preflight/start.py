"""What Ray and the loggers would stumble over once everything else is done: said before, with the cure."""

from __future__ import annotations

import importlib.util
import inspect
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from omegaconf import DictConfig, OmegaConf

from refine_verl.compose.validate import why_not_writable
from refine_verl.compose.verl_keys import require_number
from refine_verl.config import ConfigError, did_you_mean

RAY_INIT = "ray_kwargs.ray_init"
LOGGER_MODULES = {
    "wandb": "wandb",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "vemlp_wandb": "volcengine_ml_platform",
    "tensorboard": "tensorboard",
    "clearml": "clearml",
    "trackio": "trackio",
    "rl_insight": "rl_insight",
}
"""What verl imports for a logger; the others need nothing."""
_WANDB_HOST = "https://api.wandb.ai"
_WANDB_WITHOUT_KEY = ("offline", "disabled", "dryrun")
_SMALLEST_STORE = 75 * 1024 * 1024
"""Bytes; Ray refuses a smaller object store."""


def check_loggers(names: str | list[str]) -> None:
    """Refuse loggers that are not installed, and Weights & Biases without a key.

    Raises:
        ConfigError: with what to install or set.
    """
    for name in [names] if isinstance(names, str) else names:
        module = LOGGER_MODULES.get(name)
        if module is not None and importlib.util.find_spec(module) is None:
            raise ConfigError(
                "trainer.logger",
                f"{name} needs the package {module}, which is not installed. Install it or leave it out.",
            )
        if name == "wandb" and not _has_wandb_key():
            raise ConfigError(
                "trainer.logger",
                "wandb has no key. Run `wandb login`, set WANDB_API_KEY, or keep files here with WANDB_MODE=offline.",
            )


def check_callback(name: str | None) -> None:
    """Refuse a `trainer.checkpoint_callback_class` that cannot be imported. Imports verl.

    Raises:
        ConfigError: with what went wrong.
    """
    from verl.utils.import_utils import load_class_from_fqn

    try:
        if name is not None:
            load_class_from_fqn(name)
    except Exception as error:  # a user's module may fail in any way while it is imported
        raise ConfigError(
            "trainer.checkpoint_callback_class", f"{name} cannot be imported ({type(error).__name__}: {error})."
        ) from error


def _has_wandb_key() -> bool:
    """Whether wandb would start without asking: a key in the environment or in .netrc, or a mode that needs none."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    if os.environ.get("WANDB_MODE", "").lower() in _WANDB_WITHOUT_KEY:
        return True
    configured = Path(os.environ.get("WANDB_CONFIG_DIR", Path.home() / ".config" / "wandb"))
    for settings in (Path("wandb"), configured):  # of `wandb offline`
        file = settings / "settings"
        if file.is_file() and any(mode in file.read_text(errors="replace") for mode in _WANDB_WITHOUT_KEY):
            return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", _WANDB_HOST)).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def check_ray_options(config: DictConfig, *, local: bool) -> None:
    """Hold ``ray_kwargs.ray_init`` to what ``ray.init`` takes. Imports Ray.

    Args:
        config: resolved.
        local: the run starts a Ray of its own.

    Raises:
        ConfigError: with the key, the value and what would work.
    """
    import ray
    from ray.runtime_env import RuntimeEnv

    options: dict[str, Any] = OmegaConf.to_container(config.ray_kwargs.ray_init, resolve=True)  # type: ignore[assignment]
    known = [name for name, item in inspect.signature(ray.init).parameters.items() if item.kind is not item.VAR_KEYWORD]
    for name in options:
        if name not in known and not name.startswith("_"):  # Ray takes some with an underscore that it does not list
            raise ConfigError(f"{RAY_INIT}.{name}", f"ray.init has no such argument.{did_you_mean(name, known)}")
    workers = config.trainer.n_gpus_per_node * config.trainer.nnodes
    least = {"num_cpus": workers, "num_gpus": 0, "object_store_memory": _SMALLEST_STORE}
    for name, at_least in least.items():
        if options.get(name) is None:
            continue
        if not local and name in ("num_cpus", "num_gpus"):
            raise ConfigError(
                f"{RAY_INIT}.{name}", "belongs to a Ray that the run starts, and this one joins a cluster."
            )
        require_number(f"{RAY_INIT}.{name}", options[name], whole=True, at_least=at_least)
    given = {name: value for name, value in (options.get("runtime_env") or {}).items() if value is not None}
    _check_texts(given.get("env_vars") or {})
    try:
        RuntimeEnv(**given)
    except Exception as error:  # TypeError, ValueError, and what Ray makes of paths
        raise ConfigError(f"{RAY_INIT}.runtime_env", f"Ray refuses it: {' '.join(str(error).split())}") from error


def _check_texts(variables: object) -> None:
    key = f"{RAY_INIT}.runtime_env.env_vars"
    if not isinstance(variables, Mapping):
        raise ConfigError(key, f"is a section with a variable in each line, got {variables!r}.")
    for name, value in variables.items():
        if not isinstance(value, str):
            shown = str(value).lower() if isinstance(value, bool) else value
            raise ConfigError(f"{key}.{name}", f"takes a text, got {value!r}. Write \"{key}.{name}='{shown}'\".")


def check_own_ray(config: DictConfig) -> None:
    """Whether a Ray that starts on this machine has room for its sockets and for its token.

    Raises:
        ConfigError: the directory of temporary files is too long or cannot be written to, or the home directory cannot.
    """
    _check_sockets(config.ray_kwargs.ray_init.get("_temp_dir"))
    _check_token()


def _check_sockets(given: str | None) -> None:
    from ray._common.utils import get_default_ray_temp_dir
    from ray._private.utils import validate_socket_filepath

    name = (
        f"{RAY_INIT}._temp_dir" if given else next((n for n in ("RAY_TMPDIR", "TMPDIR") if n in os.environ), "TMPDIR")
    )
    place = Path(given or get_default_ray_temp_dir()).absolute()
    longest = place / f"session_2026-01-01_00-00-00_000000_{os.getpid()}" / "sockets" / "plasma_store"
    try:
        validate_socket_filepath(str(longest))
    except OSError as error:
        raise ConfigError(
            name,
            f"{place} is too long: Ray's sockets lie in it, and a socket's path has about 100 characters at most. Set "
            f"{name} to a short directory, such as /tmp.",
        ) from error
    if problem := why_not_writable(place):
        raise ConfigError(name, f"{problem}, and Ray keeps its files there. Set {name} to a directory that can.")


def _check_token() -> None:
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    token = Path.home() / ".ray" / "auth_token"
    problem = None if token.is_file() else why_not_writable(token.parent)
    if problem:
        raise ConfigError(
            "HOME",
            f"{problem}, and Ray keeps the token of its own cluster in {token}. Set HOME to another directory, or "
            "RAY_AUTH_MODE=disabled to do without a token.",
        )
