"""Typed settings of the `refine:` and `model:` sections (C7, C9). Loads no torch, ray, verl or transformers.

Every class is frozen and keyword-only, checks itself when it is made, and names the dotted key in each error.
`list_settings` yields every key with its default, meaning and paper value; docs/recipes.md is held to it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

SELECTIONS = ("entropy", "uniform", "max_entropy", "min_entropy")
ANCHORS = ("prediction", "token")
GROUPS = ("sequence", "position")
GRAD_SCOPES = ("full", "branch")
ROLLOUTS = ("fork", "prefix")
REWARDS = ("cosine", "binary", "hybrid")
ACTIVATION_CHECKPOINTING = ("none", "segment")

S = TypeVar("S", bound="Settings")


class ConfigError(ValueError):
    """A setting that cannot be used; `key` is its dotted name and the message says what would work."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}" if key else message)
        self.key = key


def did_you_mean(value: object, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """` Did you mean 'x'?` for the nearest of `known`, or an empty string if none is near."""
    near = difflib.get_close_matches(str(value), list(known), n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""


def require_choice(key: str, value: object, choices: Iterable[str], *, kind: str = "value") -> None:
    """Refuse a `value` that is not one of `choices`.

    Raises:
        ConfigError: with the allowed values and the nearest one.
    """
    choices = tuple(choices)
    if value not in choices:
        hint = did_you_mean(value, choices)
        raise ConfigError(key, f"unknown {kind} {value!r}. Allowed: {', '.join(choices)}.{hint}")


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    paper: str | None = None,
) -> Any:
    """A dataclass field with its meaning, its bounds and the paper's value."""
    metadata = {"help": help, "choices": choices, "at_least": at_least, "above": above, "paper": paper}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all sections: checks types and bounds of every field, then the rules between fields."""

    SECTION: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            key = f"{self.SECTION}.{field.name}"
            value = _checked(key, getattr(self, field.name), hints[field.name], field.metadata)
            object.__setattr__(self, field.name, value)
        self._check_rules()

    def _check_rules(self) -> None:
        """Rules between fields; each raises `ConfigError`."""

    @classmethod
    def from_mapping(cls: type[S], mapping: Mapping[str, Any]) -> S:
        """Build the section from a plain (or OmegaConf) mapping.

        Raises:
            ConfigError: unknown key (with the nearest one), wrong type, value out of bounds, contradiction.
        """
        hints = typing.get_type_hints(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        values: dict[str, Any] = {}
        for key in mapping:
            if key not in names:
                hint = did_you_mean(key, names)
                raise ConfigError(f"{cls.SECTION}.{key}", f"unknown key. Allowed: {', '.join(names)}.{hint}")
            values[key] = _nested(f"{cls.SECTION}.{key}", mapping[key], hints[key])
        return cls(**values)


def _nested(key: str, value: Any, hint: Any) -> Any:
    if not (isinstance(hint, type) and issubclass(hint, Settings)) or isinstance(value, Settings):
        return value
    if value is None:
        return hint()
    if not isinstance(value, Mapping):
        raise ConfigError(key, f"is a section with keys of its own, got {value!r}.")
    return hint.from_mapping(value)


def _checked(key: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None:
        if types.NoneType in allowed:
            return None
        raise ConfigError(key, f"needs a value ({_type_name(allowed)}), got null.")
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    origins = tuple(typing.get_origin(kind) or kind for kind in allowed)
    if dict in origins and isinstance(value, Mapping):
        value = dict(value)
    if not isinstance(value, origins) or (isinstance(value, bool) and bool not in origins):
        raise ConfigError(key, f"must be {_type_name(allowed)}, got {value!r}.")
    _check_bounds(key, value, metadata)
    return value


def _check_bounds(key: str, value: Any, metadata: Mapping[str, Any]) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(key, f"must be a finite number, got {value}.")
    if metadata.get("choices"):
        require_choice(key, value, metadata["choices"])
    if metadata.get("at_least") is not None and value < metadata["at_least"]:
        raise ConfigError(key, f"must be at least {metadata['at_least']}, got {value}.")
    if metadata.get("above") is not None and value <= metadata["above"]:
        raise ConfigError(key, f"must be greater than {metadata['above']}, got {value}.")


def _type_name(kinds: tuple[Any, ...]) -> str:
    names = {
        int: "an integer",
        float: "a number",
        str: "a string",
        bool: "true or false",
        types.NoneType: "null",
    }
    return " or ".join(names.get(kind, "a mapping" if typing.get_origin(kind) is dict else str(kind)) for kind in kinds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NSPSettings(Settings):
    """`refine.nsp`: next-sequence prediction, from choosing positions to the advantage (paper, section 3)."""

    SECTION: ClassVar[str] = "refine.nsp"

    chunks: int = option(
        8, "c: chunks per document; one position is drawn in each (Eq. 6)", at_least=1, paper="8 (Tab. 2)"
    )
    rollout_length: int = option(5, "k: tokens generated after each position (Eq. 7)", at_least=1, paper="5 (Tab. 2)")
    rollouts_per_position: int = option(1, "n: rollouts generated from each position", at_least=1, paper="1 (Tab. D.1)")
    selection: str = option(
        "entropy", "how the position is drawn within its chunk", choices=SELECTIONS, paper="entropy (Eq. 6)"
    )
    anchor: str = option(
        "prediction",
        "which token the entropy belongs to: the rollout's first token (prediction) or the prefix's last (token)",
        choices=ANCHORS,
        paper="token (Eq. 5-7); the authors' code: prediction",
    )
    entropy_temperature: float = option(
        1.0,
        "tau of the softmax over a chunk's entropies (Eq. 6); only for selection=entropy",
        above=0,
        paper="1",
    )
    smoothing_window: int | None = option(
        None, "width of the average pooling over entropies; null: rollout_length", at_least=1, paper="k"
    )
    temperature: float = option(1.0, "sampling temperature of the rollouts", above=0, paper="1.0 (Tab. D.1)")
    reward: str = option(
        "cosine",
        "cosine (Eq. 9), binary (Eq. 11), hybrid (Eq. 12), or the import path of a function of yours",
        paper="cosine; hybrid in post-training, binary at test time",
    )
    group: str = option(
        "sequence",
        "rollouts whose rewards are standardised together: all of a sequence's, or one position's",
        choices=GROUPS,
        paper="sequence",
    )
    grad_scope: str = option(
        "full",
        "full: the RL gradient flows through the prefix's state; branch: the state is detached",
        choices=GRAD_SCOPES,
        paper="full",
    )
    rollout: str = option(
        "fork",
        "fork the state at each position, or recompute every prefix (slow; the oracle of the tests)",
        choices=ROLLOUTS,
        paper="prefix",
    )

    @property
    def pooling_window(self) -> int:
        """`smoothing_window`, or `rollout_length` where it is null."""
        return self.rollout_length if self.smoothing_window is None else self.smoothing_window

    @property
    def shortest_document(self) -> int:
        """Fewest tokens that hold c positions with k tokens after each: c + k."""
        return self.chunks + self.rollout_length

    def _check_rules(self) -> None:
        if self.selection != "entropy" and self.entropy_temperature != 1.0:
            raise ConfigError(
                "refine.nsp.entropy_temperature",
                f"has no effect with refine.nsp.selection={self.selection}: remove it or set selection=entropy.",
            )
        if "." not in self.reward and ":" not in self.reward:
            hint = did_you_mean(self.reward, REWARDS)
            if self.reward not in REWARDS:
                raise ConfigError(
                    "refine.nsp.reward",
                    f"unknown reward {self.reward!r}. Allowed: {', '.join(REWARDS)}, or the import path of a "
                    f"function (package.module.function).{hint}",
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSettings(Settings):
    """`refine.loss`: what is minimised, rl_coef * PPO-clip + sft_coef * next-token cross-entropy (Eq. 10)."""

    SECTION: ClassVar[str] = "refine.loss"

    rl_coef: float = option(
        0.2,
        "lambda_RL, weight of the policy loss; 0 turns RL off",
        at_least=0,
        paper="0.2; test time 0.4 (Tab. D.1)",
    )
    sft_coef: float = option(1.0, "lambda_SFT, weight of the next-token loss", at_least=0, paper="1 (Tab. D.1)")

    def _check_rules(self) -> None:
        if self.rl_coef == 0 and self.sft_coef == 0:
            raise ConfigError(
                "refine.loss",
                "rl_coef and sft_coef are both 0, so there is nothing to learn. Raise one of them.",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefineSettings(Settings):
    """The whole `refine:` section."""

    SECTION: ClassVar[str] = "refine"

    nsp: NSPSettings = dataclasses.field(default_factory=NSPSettings)
    loss: LossSettings = dataclasses.field(default_factory=LossSettings)
    ppo_mini_batch_size: int = option(
        32,
        "sequences per optimiser step, over all workers",
        at_least=1,
        paper="32; post-training 16; test time 4",
    )
    warmup_steps: int = option(
        0,
        "first steps of a run with the next-token loss only (a base model in the same run)",
        at_least=0,
        paper="0",
    )

    def _check_rules(self) -> None:
        nsp, loss = self.nsp, self.loss
        if loss.sft_coef == 0 and self.warmup_steps > 0:
            raise ConfigError(
                "refine.warmup_steps",
                f"{self.warmup_steps} warm-up steps train on the next-token loss only, but "
                f"refine.loss.sft_coef=0. "
                "Set one of them to another value.",
            )
        if loss.rl_coef == 0:
            return
        if nsp.group == "position" and nsp.rollouts_per_position == 1:
            raise ConfigError(
                "refine.nsp.group",
                "'position' compares the rollouts of one position, but "
                "refine.nsp.rollouts_per_position=1 leaves "
                "nothing to compare. Set refine.nsp.rollouts_per_position to 2 or more, or group=sequence.",
            )
        if nsp.chunks * nsp.rollouts_per_position == 1:
            raise ConfigError(
                "refine.nsp.chunks",
                "one chunk with one rollout leaves nothing to compare a reward with. Raise "
                "refine.nsp.chunks or "
                "refine.nsp.rollouts_per_position, or set refine.loss.rl_coef=0.",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """The `model:` section: where the model comes from."""

    SECTION: ClassVar[str] = "model"

    path: str | None = option(None, "directory or hub id of a Hugging Face checkpoint; null: random weights")
    tokenizer: str | None = option(
        None,
        "directory or hub id, bytes, or bpe:SIZE (trained on the training text); null: the model's own",
    )
    config: dict[str, Any] = option({}, "configuration of a model with random weights; presets fill it in")
    config_tokenizer: str | None = option(None, "the tokenizer that belongs to model.config; presets fill it in")
    activation_checkpointing: str = option(
        "none",
        "segment: recompute each segment of the document in the backward pass, for long documents",
        choices=ACTIVATION_CHECKPOINTING,
    )

    @property
    def random_weights(self) -> bool:
        """True if the model starts from `config` alone."""
        return self.path is None

    @property
    def tokenizer_source(self) -> str | None:
        """The tokenizer to load: `tokenizer` if given, else that of the checkpoint, else that of `config`."""
        return self.tokenizer or self.path or self.config_tokenizer

    @property
    def init_config(self) -> dict[str, Any] | None:
        """`config` for random weights; None where `path` says it all."""
        return dict(self.config) if self.random_weights else None

    def _check_rules(self) -> None:
        if self.path is not None and not self.path.strip():
            raise ConfigError("model.path", "is empty. Give a directory or a hub id.")
        if self.random_weights and not self.config:
            raise ConfigError(
                "model.path",
                "no model given. Set model.path=DIR_OR_HUB_ID, or choose a preset with random "
                "weights, such as "
                "model=tiny_deltanet.",
            )
        if self.tokenizer_source is None:
            raise ConfigError(
                "model.tokenizer",
                "a model from model.config needs a tokenizer: a directory or hub id, bytes, or bpe:SIZE.",
            )


SECTIONS: tuple[type[Settings], ...] = (RefineSettings, NSPSettings, LossSettings, ModelSettings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SettingInfo:
    """One key for the documentation: dotted key, type, default, paper value (or None) and meaning."""

    key: str
    type: str
    default: Any
    paper: str | None
    help: str
    choices: tuple[str, ...] | None


def list_settings(*sections: type[Settings]) -> Iterator[SettingInfo]:
    """Every key of `sections` (default: all), in the order of the code; docs/recipes.md must agree."""
    for section in sections or SECTIONS:
        for field in dataclasses.fields(section):
            if "help" not in field.metadata:
                continue
            factory = field.default_factory
            yield SettingInfo(
                key=f"{section.SECTION}.{field.name}",
                type=str(field.type),
                default=field.default if factory is dataclasses.MISSING else factory(),
                paper=field.metadata["paper"],
                help=field.metadata["help"],
                choices=field.metadata["choices"],
            )
