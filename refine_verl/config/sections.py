"""Typed settings of the `refine:` and `model:` sections, and the list of all keys. Loads no torch, ray or verl.

Every class is frozen and keyword-only, checks itself when it is made, and names the dotted key in each error.
`list_settings` yields every key with its default, meaning and paper value; docs/recipes.md is held to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from refine_verl.config.data import DataSettings, PromptSettings
from refine_verl.config.nsp import NSPSettings
from refine_verl.config.options import Settings, option
from refine_verl.config.refusals import ConfigError

ACTIVATION_CHECKPOINTING = ("none", "layer", "segment")
READING = ("whole", "segments")
INNER = ("none", "sft", "refine")
OUTER = ("none", "sft", "grpo")
CONVENTIONS = ("paper", "lm_eval", "official")
OLD_LOG_PROBS = ("rollout", "recomputed")
ENGINES = ("own", "vllm")


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
    old_log_probs: str = option(
        "rollout",
        "what the ratio of the policy loss is to: the probabilities with which tokens were written (rollout), or those "
        "that the trained pass gives them before the first update of a batch, for one more forward pass (recomputed)",
        choices=OLD_LOG_PROBS,
        paper="not stated; the authors' code: recomputed",
    )

    def _check_rules(self) -> None:
        if self.rl_coef == 0 and self.sft_coef == 0:
            raise ConfigError(
                "refine.loss",
                "rl_coef and sft_coef are both 0, so there is nothing to learn. Raise one of them.",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerSettings(Settings):
    """`refine.answers`: who writes answers to prompts, how they are sampled for `refine.outer=grpo`, and scored."""

    SECTION: ClassVar[str] = "refine.answers"

    engine: str = option(
        "own",
        "who writes the answers of refine.phase=posttrain, those of its validation included: the training workers "
        "(own), or vLLM servers beside them, which are sent the weights before (vllm)",
        choices=ENGINES,
    )
    gap_warning: float = option(
        0.15,
        "mean distance between vLLM's log-probabilities of sampled answers and the trainer's above which a step is "
        "warned about; only for engine=vllm",
        above=0,
    )

    samples: int = option(
        8, "n: answers sampled for each prompt and compared with each other; only for refine.outer=grpo", at_least=2
    )
    temperature: float = option(1.0, "sampling temperature of these answers; validation is greedy", above=0)
    convention: str = option(
        "paper",
        "how answers are scored: as the paper's authors do (first line, any reference), as lm-eval does, or as the "
        "benchmarks' own scripts do",
        choices=CONVENTIONS,
        paper="paper",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TTTSettings(Settings):
    """`refine.ttt`: adapting on prompts at test time (paper, section 4.4)."""

    SECTION: ClassVar[str] = "refine.ttt"

    reset: str = option(
        "batch",
        "when weights and optimiser state return to the start: after each batch, after each sample (which is "
        "then adapted to alone), or never (none)",
        choices=("batch", "sample", "none"),
        paper="not stated; the authors' code: none",
    )
    steps: int = option(1, "passes over the batch's prompts before it is answered", at_least=1, paper="1")
    baseline: bool = option(True, "answer before adaptation too; false saves that time")
    curve: bool = option(
        True,
        "record the prompts' next-token loss around every step, for one more forward pass each; false: rewards only",
    )
    keep: str | None = option(
        None,
        "a directory for what was learned of each batch, or sample, as a LoRA adapter; needs "
        "actor_rollout_ref.model.lora_rank",
        empty=False,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefineSettings(Settings):
    """The whole `refine:` section."""

    SECTION: ClassVar[str] = "refine"

    phase: str = option(
        "documents",
        "what is trained on: documents, prompts with answers (posttrain), or test prompts (ttt)",
        choices=("documents", "posttrain", "ttt"),
    )
    inner: str = option(
        "none",
        "what is done with the prompts of a batch: nothing, next-token loss (sft), or REFINE",
        choices=INNER,
        paper="refine (Sec. 4.3, 4.4)",
    )
    outer: str = option(
        "none",
        "what is done with its answers, after the prompts: next-token loss (sft), or sample and reward them (grpo)",
        choices=OUTER,
        paper="sft (Sec. 4.3)",
    )
    nsp: NSPSettings = dataclasses.field(default_factory=NSPSettings)
    loss: LossSettings = dataclasses.field(default_factory=LossSettings)
    answers: AnswerSettings = dataclasses.field(default_factory=AnswerSettings)
    ttt: TTTSettings = dataclasses.field(default_factory=TTTSettings)
    ppo_mini_batch_size: int = option(
        32,
        "sequences per optimiser step, over all workers",
        at_least=1,
        paper="32; post-training 16; test time 4",
    )
    outer_mini_batch_size: int | None = option(
        None,
        "rows per optimiser step on the answers of a batch; null: ppo_mini_batch_size",
        at_least=1,
        paper="not stated; the authors' code: the whole batch",
    )
    on_policy: bool = option(
        False,
        "true: positions, rollouts and rewards inside the pass that is trained, by the weights of the moment; "
        "the ratio is exactly 1, and documents are not read beforehand (with activation checkpointing they are)",
        paper="false: a whole batch is rolled out first",
    )
    warmup_steps: int = option(
        0,
        "first steps of a run with the next-token loss only (a base model in the same run)",
        at_least=0,
        paper="0",
    )
    gradient_snr_every: int = option(
        0, "steps between measurements of the signal in the policy gradient (nsp/gradient_snr); 0: none", at_least=0
    )
    gradient_cosine: bool = option(
        False, "measure the policy gradient's cosine with the next-token gradient (nsp/gradient_cosine_ntp), too"
    )

    @property
    def uses_rollouts(self) -> bool:
        """True if documents or prompts are trained on with REFINE and not with the next-token loss alone."""
        return self.loss.rl_coef > 0 if self.phase == "documents" else self.inner == "refine"

    def _check_rules(self) -> None:
        self._check_phase()
        nsp, loss = self.nsp, self.loss
        if loss.sft_coef == 0 and self.warmup_steps > 0:
            raise ConfigError(
                "refine.warmup_steps",
                f"{self.warmup_steps} warm-up steps train on the next-token loss only, but refine.loss.sft_coef=0. Set "
                "one of them to another value.",
            )
        self._check_on_policy()
        self._check_gradient_signal()
        if not self.uses_rollouts:
            return
        if nsp.group == "position" and nsp.rollouts_per_position == 1:
            raise ConfigError(
                "refine.nsp.group",
                "'position' compares the rollouts of one position, but refine.nsp.rollouts_per_position=1 leaves "
                "nothing to compare. Set refine.nsp.rollouts_per_position to 2 or more, or group=sequence.",
            )
        if nsp.chunks * nsp.rollouts_per_position == 1:
            raise ConfigError(
                "refine.nsp.chunks",
                "one chunk with one rollout leaves nothing to compare a reward with. Raise refine.nsp.chunks or "
                "refine.nsp.rollouts_per_position, or set refine.loss.rl_coef=0.",
            )

    def _check_gradient_signal(self) -> None:
        every, key = self.gradient_snr_every, "refine.gradient_snr_every"
        if self.gradient_cosine and not every:
            raise ConfigError(
                "refine.gradient_cosine", f"true has no effect with {key}=0, which says how often. Raise it."
            )
        if every and (self.phase != "documents" or not self.uses_rollouts):
            why = "refine.loss.rl_coef=0" if self.phase == "documents" else f"refine.phase={self.phase}"
            raise ConfigError(
                key, f"{every} has no effect with {why}: mid-training's rollouts are measured. Set it to 0."
            )

    def _check_on_policy(self) -> None:
        if not self.on_policy:
            return
        if not self.uses_rollouts:
            raise ConfigError("refine.on_policy", "true has no effect without rollouts: leave it out.")
        if self.nsp.rollout == "prefix":
            raise ConfigError(
                "refine.on_policy",
                "true continues from the states of the trained pass, but refine.nsp.rollout=prefix has none. Set "
                "refine.nsp.rollout=fork.",
            )
        if self.loss.old_log_probs != "rollout" and self.outer != "grpo":
            raise ConfigError(
                "refine.loss.old_log_probs",
                f"{self.loss.old_log_probs} has no effect with refine.on_policy=true, where the old log-probabilities "
                "are those of the trained pass: leave it out.",
            )

    def _check_phase(self) -> None:
        """Which of inner and outer a phase needs, and what has no effect in it."""
        allowed = {"documents": (("none",), ("none",)), "posttrain": (INNER, OUTER[1:]), "ttt": (INNER[1:], ("none",))}
        for name, choices in zip(("inner", "outer"), allowed[self.phase], strict=True):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"refine.{name}",
                    f"{getattr(self, name)} does not go with refine.phase={self.phase}, which takes "
                    f"{' or '.join(choices)}. Prompts with answers need refine.phase=posttrain, test prompts "
                    "refine.phase=ttt (recipe=posttrain, recipe=ttt).",
                )
        if self.outer == "none" and self.outer_mini_batch_size is not None:
            raise ConfigError(
                "refine.outer_mini_batch_size",
                f"{self.outer_mini_batch_size} has no effect with refine.outer=none: leave it out.",
            )
        if not self.uses_rollouts:
            self.nsp.check_without_rollouts()
        if self.loss.old_log_probs != "rollout" and not self.uses_rollouts and self.outer != "grpo":
            raise ConfigError(
                "refine.loss.old_log_probs",
                f"{self.loss.old_log_probs} has no effect where no policy loss is trained: leave it out.",
            )
        if self.phase != "documents" and self.warmup_steps:
            raise ConfigError(
                "refine.warmup_steps",
                f"{self.warmup_steps} has no effect with refine.phase={self.phase}: set it to 0, or warm up in a "
                "run on documents and start from its model.",
            )
        if self.inner == "refine" and self.loss.rl_coef == 0:
            raise ConfigError(
                "refine.loss.rl_coef", "0 turns REFINE off, but refine.inner=refine. Set refine.inner=sft."
            )
        if self.inner == "sft" and self.loss.sft_coef == 0:
            raise ConfigError("refine.loss.sft_coef", "0 leaves refine.inner=sft nothing to learn from. Raise it.")
        if self.phase != "ttt" and self.ttt != TTTSettings():
            raise ConfigError("refine.ttt", f"has no effect with refine.phase={self.phase}: leave it out.")
        self._check_answers()

    def _check_answers(self) -> None:
        answers, default = self.answers, AnswerSettings()
        if answers.engine != "own" and self.phase != "posttrain":
            raise ConfigError(
                "refine.answers.engine",
                f"{answers.engine} has no effect with refine.phase={self.phase}: vLLM writes the answers of "
                "refine.phase=posttrain; at test time a model is adapted for each batch and answers in the training "
                "workers. Leave it out.",
            )
        if answers.gap_warning != default.gap_warning and (answers.engine == "own" or self.outer != "grpo"):
            raise ConfigError(
                "refine.answers.gap_warning",
                f"{answers.gap_warning} has no effect with refine.answers.engine={answers.engine} "
                f"refine.outer={self.outer}: answers that vLLM sampled are compared. Leave it out.",
            )
        unused = dataclasses.replace(answers, samples=default.samples, temperature=default.temperature)
        if self.outer != "grpo" and answers != unused:
            raise ConfigError(
                "refine.answers",
                f"samples and temperature have no effect with refine.outer={self.outer}: leave them out.",
            )


def is_made_of_documents(tokenizer: str) -> bool:
    """Whether the tokenizer of this name, ``bpe:SIZE``, has to be trained first."""
    return tokenizer == "bpe" or tokenizer.startswith("bpe:")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """The `model:` section: where the model comes from."""

    SECTION: ClassVar[str] = "model"

    path: str | None = option(None, "directory or hub id of a Hugging Face checkpoint; null: random weights")
    tokenizer: str | None = option(
        None,
        "directory or hub id, bytes, or bpe:SIZE (trained on the training text); null: the model's own",
        empty=False,
    )
    config: dict[str, Any] = option({}, "configuration of a model with random weights; presets fill it in")
    config_tokenizer: str | None = option(None, "the tokenizer that belongs to model.config; presets fill it in")
    activation_checkpointing: str = option(
        "none",
        "layer: recompute each layer in the backward pass, for long documents; segment: cut documents instead, for "
        "models whose layers are not known",
        choices=ACTIVATION_CHECKPOINTING,
    )
    reading: str = option(
        "whole",
        "how documents are read for rollouts: whole, or in segments between which alone states are kept, for documents "
        "so long that the former does not fit, and up to 1/8 more tokens",
        choices=READING,
    )
    balance_coef: float = option(
        0.0,
        "weight of the load-balance loss of a model's experts, over the tokens of documents and not those of rollouts; "
        "where transformers computes it, its weight is the model's router_aux_loss_coef, 0.001 by default",
        at_least=0,
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
                "no model given. Set model.path=DIR_OR_HUB_ID, or choose a preset with random weights, such as "
                "model=tiny_deltanet.",
            )
        if self.tokenizer_source is None:
            raise ConfigError(
                "model.tokenizer",
                "a model from model.config needs a tokenizer: a directory or hub id, bytes, or bpe:SIZE.",
            )


SECTIONS: tuple[type[Settings], ...] = (
    RefineSettings,
    NSPSettings,
    LossSettings,
    AnswerSettings,
    TTTSettings,
    ModelSettings,
    DataSettings,
    PromptSettings,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SettingInfo:
    """One key for the documentation: dotted key, default, paper value (or None), meaning and allowed values."""

    key: str
    default: Any
    paper: str | None
    help: str
    choices: tuple[str, ...] | None


def list_settings(*sections: type[Settings]) -> Iterator[SettingInfo]:
    """Every key of `sections` (default: all) once, in the order of the code; docs/recipes.md must agree."""
    listed = set()
    for section in sections or SECTIONS:
        for field in dataclasses.fields(section):
            key = f"{section.SECTION}.{field.name}"
            if "help" not in field.metadata or key in listed:
                continue
            listed.add(key)
            meaning = {name: field.metadata[name] for name in ("paper", "help", "choices")}
            yield SettingInfo(key=key, default=field.metadata["configured"], **meaning)
