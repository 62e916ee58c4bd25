"""The last checks before anything starts: the model, the reward, the tokenizer and the documents.

Slower than `validate` (torch, transformers and the user's files are read) but still without weights, and without Ray
unless the run would join a cluster. The cache of tokenised documents and `PreparedRun.launch_config`'s directory are
written last.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from refine_verl.compose.validate import ValidConfig, check_against_verl
from refine_verl.config import (
    ALL_LINEAR,
    LORA_ALPHA,
    ConfigError,
    DataSettings,
    ModelSettings,
    NSPSettings,
    PromptSettings,
    RefineSettings,
    RolloutLength,
)
from refine_verl.config.refusals import with_article
from refine_verl.preflight.answers import answered_splits, check_lengths, check_servers
from refine_verl.preflight.cluster import check_cluster, joins_cluster
from refine_verl.preflight.prompts import PROMPT_DATASET, prepare_prompt_splits
from refine_verl.preflight.reward_function import load_reward_function
from refine_verl.preflight.start import check_callback, check_loggers, check_ray_options

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from refine_verl.data.prepare import Prepared
    from refine_verl.data.statistics import DataStatistics
    from refine_verl.kernels.versions import Installed
    from refine_verl.models.adapters import ModelAdapter
    from refine_verl.models.loading import ModelInfo

logger = logging.getLogger(__name__)

_OFFERED = ("token_level_rewards", "response_mask", "index", "norm_adv_by_std_in_grpo", "config")
"""What an advantage estimator may ask for."""

BPE_TRAINING_CHARACTERS = 20_000_000
"""Text a tokenizer is trained on at most; more changes a small vocabulary little and costs minutes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that can start.

    Attributes:
        valid: the configuration and its typed sections.
        model: what is known of the model before its weights are read.
        tokenizer: fits the model's vocabulary.
        train, validation: directories of tokenised documents or prompts; validation is None without
            `data.val_files`. For test-time training both are the test set.
    """

    valid: ValidConfig
    model: ModelInfo
    tokenizer: PreTrainedTokenizerBase
    train: Prepared[Any]
    validation: Prepared[Any] | None

    def launch_config(self) -> DictConfig:
        """The configuration with everything in files: what `trainer.launch.train` takes.

        Writes `initial_model/` into the run directory: the tokenizer, and for random weights the model's
        configuration. verl and its workers read models and tokenizers from directories only.
        """
        config = copy.deepcopy(self.valid.config)
        directory = Path(config.trainer.default_local_dir) / "initial_model"
        self.tokenizer.save_pretrained(str(directory))
        config.actor_rollout_ref.model.tokenizer_path = str(directory)
        if self.valid.model.random_weights:
            self.model.config.save_pretrained(str(directory))
            config.actor_rollout_ref.model.path = str(directory)
        config.data.train_files = [str(self.train.path)]
        config.data.val_files = [] if self.validation is None else [str(self.validation.path)]
        if not isinstance(self.valid.data, DataSettings):
            config.data.custom_cls.update(PROMPT_DATASET)
        if self.validation is None:
            # verl takes the size of the (empty) validation set for null, and no loader can have batches of 0
            config.data.val_batch_size = 1
        return config


def prepare_run(valid: ValidConfig, *, starts_here: bool = False) -> PreparedRun:
    """Check what `valid` refers to, and tokenise the documents.

    Args:
        valid: from `validate`.
        starts_here: the run is to start from this process: the cluster it would join, or the GPUs of this machine, are
            checked, too.

    Raises:
        ConfigError, DataError, ModelError: a reward, a file, a
            tokenizer or a model that cannot be used.
    """
    from refine_verl.data.sources import say_if_counted_twice
    from refine_verl.models.weights import check_stored_numbers
    from refine_verl.nsp import sentence_ends

    info = check_run(valid)
    if starts_here:
        check_cluster(valid.config, info.config)
        if valid.model.path is not None:
            check_stored_numbers(valid.model.path, info.config)
    _say_where_weights_come_from(valid, info)
    _say_if_all_is_warm_up(valid)
    say_if_read_twice(valid)
    say_if_counted_twice(valid.data)
    tokenizer = load_run_tokenizer(valid, info)
    sentence_ends(tokenizer, valid.refine.nsp)  # refuses
    train: Prepared[Any]
    validation: Prepared[Any] | None
    if isinstance(valid.data, DataSettings):
        train = _prepare_training(valid, tokenizer)
        validation = _prepare_validation(valid.data, tokenizer)
    else:
        train, validation = prepare_prompt_splits(valid, tokenizer)
        if valid.refine.answers.engine == "vllm":
            splits = ([train.path], [] if validation is None else [validation.path])
            check_lengths(valid.config, answered_splits(valid.refine, *splits))
    return PreparedRun(valid=valid, model=info, tokenizer=tokenizer, train=train, validation=validation)


def check_run(valid: ValidConfig) -> ModelInfo:
    """Everything that can be checked without reading documents; writes nothing.

    Raises:
        ConfigError, DataError, ModelError: see `prepare_run`.
    """
    from refine_verl.kernels.versions import installed, oldest_capability
    from refine_verl.models.adapters import adapter_for, check_selection, sizes
    from refine_verl.models.loading import import_external, open_model
    from refine_verl.nsp import check_functions
    from refine_verl.preflight.checkpoints import check_checkpoint

    _check_device(valid.config.trainer.device)
    packages = valid.config.actor_rollout_ref.model.external_lib or []
    for package in [packages] if isinstance(packages, str) else packages:  # what verl will import
        import_external(package, "actor_rollout_ref.model.external_lib")
    info = open_model(valid.model.path, valid.model.init_config)
    if valid.config.trainer.device == "cuda":
        check_gpu_kernels(info.config, oldest_capability(), installed())
    check_functions(valid.refine.nsp, *sizes(info.config))
    check_against_verl(valid.config)
    check_loggers(valid.config.trainer.logger)
    check_callback(valid.config.trainer.checkpoint_callback_class)
    check_ray_options(valid.config, local=not joins_cluster(valid.config))
    load_reward_function(valid.config)
    check_estimator(valid.config.algorithm.adv_estimator)
    adapter = adapter_for(info.config)
    if valid.refine.on_policy:
        check_on_policy(valid)
    if valid.model.activation_checkpointing == "layer":
        check_recomputed_layers(adapter)
    if valid.model.balance_coef:
        check_balance(info.config, valid.model, valid.refine)
    if valid.model.reading == "segments":
        check_reading(info.model_type, adapter, valid.refine.nsp)
    if valid.refine.uses_rollouts:
        check_selection(valid.refine.nsp, adapter)
    if valid.lora.lora_rank:
        check_adapters(valid, info)
    check_checkpoint(valid.config, info.config, valid.lora)
    if valid.refine.answers.engine == "vllm":
        check_servers(valid, info.config)
    _find_documents(valid.data)
    return info


def _check_device(device: str) -> None:
    import torch

    if device == "cpu" and torch.cuda.is_available():
        raise ConfigError(
            "trainer.device",
            "cpu is for hosts without a GPU: fla's kernels are taken wherever one is visible. Hide the GPUs with "
            "CUDA_VISIBLE_DEVICES= (empty) to run on the CPU.",
        )
    if device == "cuda" and not torch.cuda.is_available():
        # the driver of a cluster may sit on a node without a GPU; verl must not take it for a CPU run
        os.environ.setdefault("VERL_PLATFORM", "nvidia")


def check_gpu_kernels(config: PretrainedConfig, capability: tuple[int, int] | None, have: Installed) -> None:
    """Check that fla trains the model with what is installed.

    Args:
        config: of the model.
        capability: of the GPU.
        have: `kernels.versions.installed`.

    Raises:
        ModelError: it refuses to.
    """
    from refine_verl.config import ModelError
    from refine_verl.kernels.versions import doubt, why_not_trainable

    if refused := why_not_trainable(config, capability, have):
        raise ModelError(f"model: {refused}")
    if doubtful := doubt(config, capability, have):
        logger.warning(doubtful)


def check_estimator(name: str) -> None:
    """Check that verl's advantage estimator ``name`` can work with what a rollout offers.

    Raises:
        ConfigError: it also needs values, log-probabilities or rewards of a baseline.
    """
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    parameters = inspect.signature(get_adv_estimator_fn(name)).parameters.values()
    named = (parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD)
    missing = [p.name for p in named if p.default is p.empty and p.name not in _OFFERED]
    if missing:
        raise ConfigError(
            "algorithm.adv_estimator",
            f"{name} needs {', '.join(missing)}, which REFINE's rollouts do not have; they have rewards and groups. "
            "grpo is the paper's.",
        )


def check_on_policy(valid: ValidConfig) -> None:
    """Check that what compares and trains rollouts can do with those of one micro-batch.

    Raises:
        ConfigError: several passes over the same rollouts, or an estimator that needs those of the whole batch.
    """
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    from refine_verl.nsp.advantage import compares_within_documents

    actor, algorithm, nsp = valid.config.actor_rollout_ref.actor, valid.config.algorithm, valid.refine.nsp
    if actor.ppo_epochs > 1:
        raise ConfigError(
            "refine.on_policy",
            f"true writes new rollouts in every pass, but actor_rollout_ref.actor.ppo_epochs={actor.ppo_epochs} asks "
            "for several passes over the same ones. Set ppo_epochs=1, or refine.on_policy=false.",
        )
    if isinstance(nsp.rollout_length, RolloutLength) and actor.loss_agg_mode == "token-mean":
        raise ConfigError(
            "refine.on_policy",
            "true with rollouts of unequal lengths (refine.nsp.rollout_length) does not know how many tokens a "
            "mini-batch will have, which actor_rollout_ref.actor.loss_agg_mode=token-mean divides by. Set "
            "loss_agg_mode=seq-mean-token-mean, or refine.on_policy=false.",
        )
    estimator = get_adv_estimator_fn(algorithm.adv_estimator)
    shape = (nsp.chunks, nsp.rollouts_per_position)
    if not compares_within_documents(estimator, nsp.longest_rollout, nsp.group, algorithm, shape):
        raise ConfigError(
            "refine.on_policy",
            f"true compares the rollouts of one document, but algorithm.adv_estimator={algorithm.adv_estimator} needs "
            "those of the whole batch. Set algorithm.adv_estimator=grpo, or refine.on_policy=false.",
        )


def check_recomputed_layers(adapter: ModelAdapter) -> None:
    """Check that activation checkpointing per layer is possible.

    Raises:
        ConfigError: the adapter does not know the model's layers.
    """
    from refine_verl.models.adapters import NO_LAYERS, RecomputingAdapter

    if not isinstance(adapter, RecomputingAdapter):
        raise ConfigError("model.activation_checkpointing", NO_LAYERS)


def check_adapters(valid: ValidConfig, info: ModelInfo) -> None:
    """Check that the model has the layers that are to get adapters, from its configuration.

    Raises:
        ConfigError: no such layers; random weights; or an adapter to go on from that contradicts the keys.
        DataError, ModelError: an adapter to go on from that cannot be read, or is of another model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from refine_verl.models.lora import apply_adapter, open_adapter, target_names

    lora, key = valid.lora, f"{valid.lora.SECTION}.lora_rank"
    if not info.has_weights:
        raise ConfigError(
            key,
            f"{lora.lora_rank} trains adapters of a model, and this one has random weights, which are not kept: an "
            "adapter would belong to nothing. Set model.path to a model with weights, or lora_rank=0.",
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(info.config)
    if lora.lora_adapter_path is None:
        target_names(model, lora)
        return
    adapter = open_adapter(lora.lora_adapter_path, f"{lora.SECTION}.lora_adapter_path")
    if adapter.config.r != lora.lora_rank:
        raise ConfigError(
            key,
            f"{lora.lora_rank}, and the adapter to go on from ({lora.lora_adapter_path}) has the rank "
            f"{adapter.config.r}. Set lora_rank={adapter.config.r}.",
        )
    for name, default in (("lora_alpha", LORA_ALPHA), ("target_modules", ALL_LINEAR), ("exclude_modules", None)):
        given = getattr(lora, name)
        if given != default:
            raise ConfigError(
                f"{lora.SECTION}.{name}",
                f"{given} has no effect with lora_adapter_path: that adapter's are kept. Leave it out.",
            )
    apply_adapter(model, adapter, trains=True, check=False)


def check_balance(config: Any, model: ModelSettings, refine: RefineSettings) -> None:
    """Check that a load-balance loss can be had.

    Raises:
        ConfigError: the model has no experts, or documents are not trained on in one pass.
    """
    key = "model.balance_coef"
    if not getattr(config, "num_experts", 0):
        raise ConfigError(
            key, f"{model.balance_coef} has no effect: {with_article(config.model_type)} without experts. Leave it out."
        )
    if model.activation_checkpointing == "segment":
        raise ConfigError(
            key,
            f"{model.balance_coef} needs documents in one piece. Set model.activation_checkpointing=layer, or none.",
        )
    if refine.phase == "posttrain" and refine.inner == "none" and refine.outer == "grpo":
        raise ConfigError(
            key, f"{model.balance_coef} has no effect with refine.inner=none and refine.outer=grpo: leave it out."
        )
    if refine.nsp.rollout == "prefix":
        raise ConfigError(key, f"{model.balance_coef} is not computed with refine.nsp.rollout=prefix. Set fork.")


def check_reading(model_type: str, adapter: ModelAdapter, nsp: NSPSettings) -> None:
    """Check that reading in segments is a choice.

    Raises:
        ConfigError: the adapter cannot read documents in another way, or positions are chosen by what only reading them
            whole shows.
    """
    from refine_verl.models.adapters import TracingAdapter
    from refine_verl.nsp import looks_at_writes

    if not isinstance(adapter, TracingAdapter):
        raise ConfigError(
            "model.reading",
            f"segments has no effect: {with_article(model_type)} is read in segments anyway. Leave it out.",
        )
    if looks_at_writes(nsp):
        raise ConfigError(
            "model.reading",
            f"segments does not show what refine.nsp.selection={nsp.selection} looks at. Set model.reading=whole, or "
            "refine.nsp.selection=entropy.",
        )


def _say_if_all_is_warm_up(valid: ValidConfig) -> None:
    steps, warmup = valid.config.trainer.total_training_steps, valid.refine.warmup_steps
    if steps is not None and valid.refine.uses_rollouts and steps <= warmup:
        logger.warning(
            "refine.warmup_steps=%d of trainer.total_training_steps=%d: all of it is warm-up, REFINE never runs",
            warmup,
            steps,
        )


def say_if_read_twice(valid: ValidConfig) -> None:
    """Warn that the fused step saves nothing where activations are computed again."""
    kind = valid.model.activation_checkpointing
    if valid.refine.on_policy and kind != "none":
        logger.warning(
            "refine.on_policy=true saves no pass with model.activation_checkpointing=%s: documents are read beforehand "
            "as well. With none, if memory allows, they are read once.",
            kind,
        )


def _say_where_weights_come_from(valid: ValidConfig, info: ModelInfo) -> None:
    if valid.model.random_weights:
        logger.info("model: %s from random weights (model.path is not set)", info.model_type)
    elif valid.model.config:
        logger.info("model: %s from %s; the preset's model.config is not used", info.model_type, valid.model.path)


def load_run_tokenizer(valid: ValidConfig, info: ModelInfo) -> PreTrainedTokenizerBase:
    """The tokenizer of the run; one of `bpe:SIZE` is trained on its texts first.

    Raises:
        DataError: none that can be loaded or trained, or one of more tokens than the model predicts.
    """
    from refine_verl.data.prepare import iterate_split_texts
    from refine_verl.data.tokenizers import open_model_tokenizer

    source = valid.model.tokenizer_source
    assert source is not None  # ModelSettings has refused it
    own = valid.model.tokenizer is None and not valid.model.random_weights
    split = "train" if valid.data.train_files else "validation"  # test-time training reads test prompts only
    return open_model_tokenizer(
        None if own else source,
        source,
        info.vocab_size,
        keys=("model.tokenizer", "model.path"),
        corpus_texts=iterate_split_texts(valid.data, split, BPE_TRAINING_CHARACTERS),
        cure="Set model.config.vocab_size to match." if valid.model.random_weights else "",
    )


def _find_documents(data: DataSettings | PromptSettings) -> None:
    """Refuse a wrong name in either split before the other one is tokenised."""
    from refine_verl.data.sources import split_sources

    for split in ("train", "validation"):
        if data.files(split):
            split_sources(data, split)


def _prepare_training(valid: ValidConfig, tokenizer: PreTrainedTokenizerBase) -> Prepared[DataStatistics]:
    from refine_verl.data.prepare import prepare

    assert isinstance(valid.data, DataSettings)
    nsp, batch = valid.refine.nsp, int(valid.config.data.train_batch_size)
    return prepare(
        valid.data,
        "train",
        tokenizer,
        minimum_length=nsp.shortest_document,
        reason=(
            f"refine.nsp.chunks={nsp.chunks} positions need refine.nsp.rollout_length={nsp.longest_rollout} tokens "
            "after each"
        ),
        minimum_sequences=batch,
        sequences_reason=f"data.train_batch_size={batch}",
    )


def _prepare_validation(data: DataSettings, tokenizer: PreTrainedTokenizerBase) -> Prepared[DataStatistics] | None:
    """Every document counts that has a token to predict, whatever rollouts need."""
    from refine_verl.data.prepare import prepare

    if not data.val_files:
        return None
    scored = dataclasses.replace(data, min_length=1)
    return prepare(scored, "validation", tokenizer, minimum_length=2, reason="a token is predicted from the one before")
