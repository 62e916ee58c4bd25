"""Settings of test-time training; the defaults are the paper's (Tab. 2 and D.1). Loads no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from refine_verl.config import (
    ACTIVATION_CHECKPOINTING,
    ALL_LINEAR,
    LORA_ALPHA,
    ConfigError,
    LoraSettings,
    LossSettings,
    NSPSettings,
    RefineSettings,
    RolloutLength,
    Settings,
    option,
)
from refine_verl.config.lora import check_names

METHODS = ("refine", "sft", "none")
BACKUPS = ("cpu", "device")

# What the paper sets differently at test time than in mid-training.
_TEST_TIME: dict[str, dict[str, Any]] = {"nsp": {"reward": "binary"}, "loss": {"rl_coef": 0.4}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptSettings(Settings):
    """How ``refine_verl.adapt`` trains. Keys have the names they have in a recipe.

    Raises:
        ConfigError: a value out of bounds, of the wrong type, or that contradicts another.
    """

    SECTION: ClassVar[str] = "adapt"

    method: str = option(
        "refine",
        "refine: policy loss and next-token loss; sft: next-token loss only; none: leave the weights alone",
        choices=METHODS,
    )
    nsp: NSPSettings = dataclasses.field(default_factory=lambda: NSPSettings(**_TEST_TIME["nsp"]))
    loss: LossSettings = dataclasses.field(default_factory=lambda: LossSettings(**_TEST_TIME["loss"]))
    steps: int = option(1, "passes over the prompts; each writes its rollouts anew", at_least=1)
    mini_batch_size: int = option(4, "prompts per optimiser step", at_least=1, paper="4 (Tab. D.1)")
    micro_batch_size: int = option(1, "prompts in one forward and backward pass; more need more memory", at_least=1)
    lr: float = option(1e-6, "learning rate, constant", above=0, paper="1e-6 (Tab. 2)")
    betas: tuple[float, float] = option((0.9, 0.999), "of AdamW", paper="(0.9, 0.999) (Tab. D.1)")
    eps: float = option(1e-8, "of AdamW", above=0)
    weight_decay: float = option(0.01, "of AdamW", at_least=0, paper="0.01 (Tab. D.1)")
    clip_grad: float = option(1.0, "largest norm of a step's gradient", above=0, paper="1.0 (the authors' code)")
    clip_ratio: float = option(0.2, "epsilon of PPO-clip (Eq. 10)", above=0, paper="0.2 (Tab. D.1)")
    norm_adv_by_std_in_grpo: bool = option(True, "divide advantages by their group's standard deviation", paper="true")
    lora_rank: int = option(
        0, "rank of LoRA adapters, which alone are trained, and can be saved; 0: all weights are trained", at_least=0
    )
    lora_alpha: int = option(LORA_ALPHA, "adapters count lora_alpha / lora_rank", at_least=1)
    target_modules: str | tuple[str, ...] = option(
        ALL_LINEAR, "linear layers that get an adapter: all-linear, a list of names, or a pattern", empty=False
    )
    exclude_modules: str | tuple[str, ...] | None = option(
        None, "linear layers that get none: a list of names, or a pattern", empty=False
    )
    seed: int = option(0, "of positions, rollouts and sampled answers", at_least=0)
    on_policy: bool = option(
        False,
        "true: rollouts inside the pass that is trained; the ratio is exactly 1, and prompts are not read beforehand "
        "(with activation checkpointing they are)",
        paper="false",
    )
    activation_checkpointing: str = option(
        "none",
        "layer: recompute each layer in the backward pass, for long prompts; segment: cut prompts instead, for models "
        "whose layers are not known",
        choices=ACTIVATION_CHECKPOINTING,
    )
    backup: str = option(
        "cpu", "where the copy of the original weights lies: host memory, or the model's own device", choices=BACKUPS
    )

    def _check_rules(self) -> None:
        numbers = [beta for beta in self.betas if isinstance(beta, (int, float)) and 0 <= beta < 1]
        if len(self.betas) != 2 or len(numbers) != 2:
            raise ConfigError("adapt.betas", f"must be two numbers in [0, 1), got {self.betas!r}.")
        if self.method == "sft" and self.loss.sft_coef == 0:
            raise ConfigError(
                "adapt.loss.sft_coef", "is 0, but method=sft has no other loss. Raise it, or set method=refine."
            )
        if self.loss.old_log_probs != "rollout":
            raise ConfigError(
                "adapt.loss.old_log_probs",
                f"{self.loss.old_log_probs} is for training runs: here rollouts and updates share one process. Leave "
                "it out.",
            )
        length = self.nsp.rollout_length
        if isinstance(length, RolloutLength) and length.by == "sentence":
            raise ConfigError(
                "adapt.nsp.rollout_length.by",
                "sentence needs a tokenizer, and prompts are token ids here. Set by=entropy.",
            )
        if self.method == "refine":  # the rules between nsp and loss are those of a recipe
            RefineSettings(
                nsp=self.nsp, loss=self.loss, ppo_mini_batch_size=self.mini_batch_size, on_policy=self.on_policy
            )
        self._check_adapters()
        if not self.reinforces:
            self.nsp.check_without_rollouts("adapt.nsp")
        if self.method != "refine" and self.on_policy:
            raise ConfigError("adapt.on_policy", f"true has no effect with method={self.method}: leave it out.")

    def _check_adapters(self) -> None:
        names = [field.name for field in dataclasses.fields(LoraSettings) if field.name in _fields(self)]
        for name in names[1:]:
            if not self.lora_rank and getattr(self, name) != _fields(self)[name]:
                raise ConfigError(
                    f"adapt.{name}",
                    f"{getattr(self, name)!r} has no effect with lora_rank=0: there are no adapters. Leave it out, or "
                    "set lora_rank.",
                )
        if self.lora_rank and self.method == "none":
            raise ConfigError("adapt.lora_rank", f"{self.lora_rank} has no effect with method=none: leave it out.")
        for name in ("target_modules", "exclude_modules"):
            check_names("adapt", name, getattr(self, name))

    @property
    def lora(self) -> LoraSettings:
        """The keys of adapters."""
        names = [field.name for field in dataclasses.fields(LoraSettings) if field.name in _fields(self)]
        return LoraSettings(**{name: getattr(self, name) for name in names})

    @property
    def reinforces(self) -> bool:
        """Whether rollouts are written: not for the next-token loss alone."""
        return self.method == "refine" and self.loss.rl_coef > 0

    @property
    def shortest_prompt(self) -> int:
        """Fewest tokens of a prompt: c + k with rollouts, 2 for the next-token loss, 1 without training."""
        if self.method == "none":
            return 1
        return max(2, self.nsp.shortest_document) if self.reinforces else 2


def _fields(settings: AdaptSettings) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(settings)}


def read_settings(config: AdaptSettings | Mapping[str, Any] | None) -> AdaptSettings:
    """Settings from a mapping; what a section leaves out has the default of test-time training.

    Raises:
        ConfigError: unknown key (with the nearest one), wrong type, value out of bounds, contradiction.
    """
    if config is None:
        return AdaptSettings()
    if isinstance(config, AdaptSettings):
        return config
    if not isinstance(config, Mapping):
        raise ConfigError("config", f"must be AdaptSettings, a mapping or None, got a {type(config).__name__}.")
    filled = dict(config)
    for section, defaults in _TEST_TIME.items():
        given = filled.get(section)
        if given is None:
            filled.pop(section, None)
        elif isinstance(given, Mapping):
            filled[section] = {**defaults, **given}
    return AdaptSettings.from_mapping(filled)
