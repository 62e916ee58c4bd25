"""``with refine_verl.adapt(model, input_ids, config) as adapted``: train on prompts, answer, forget."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refine_verl.adaptation.checks import check_model, check_settings
from refine_verl.adaptation.guard import SavedModel, TemporaryActor, set_training
from refine_verl.adaptation.prompts import PromptError, Prompts, vocabulary_of
from refine_verl.adaptation.settings import AdaptSettings, read_settings
from refine_verl.adaptation.training import Loop
from refine_verl.config import ConfigError
from refine_verl.models import Documents, FastWeightActor, FastWeightState
from refine_verl.models.adapters import NO_LAYERS, ModelAdapter, RecomputingAdapter, adapter_for, check_selection
from refine_verl.models.answers import Answers, answer_draws, end_tokens_of
from refine_verl.models.keeping import look_alike
from refine_verl.models.lora import add_adapters, base_fingerprint, target_names, write_adapter
from refine_verl.nsp import looks_at_writes


def adapt(
    model: nn.Module,
    input_ids: Any,
    config: AdaptSettings | Mapping[str, Any] | None = None,
    *,
    states: FastWeightState | Sequence[FastWeightState] | None = None,
) -> AbstractContextManager[Adapted]:
    """Test-time training: adapt a model to prompts for the time of a ``with`` block (paper, Sec. 3.3).

    Each of ``steps`` passes over the prompts chooses positions, writes rollouts from forked states, rewards them and
    makes one step of AdamW per mini-batch. When the block ends, in whatever way, parameters, buffers, gradients,
    flags and class of the model are exactly what they were; torch's random state is not touched at all.

    Args:
        model: a fast-weight causal language model of transformers in any floating dtype, on the CPU or one GPU, or
            a `FastWeightActor`. bf16 and fp16 weights are float32 inside the block. Frozen parameters stay frozen.
            With ``lora_rank`` no weight changes: LoRA adapters around the model's layers are trained.
        input_ids: the prompts: int [T] or [B, T] without padding, or a list of rows of unequal length; on any device.
        config: `AdaptSettings`, or a mapping with its keys; None takes the paper's settings.
        states: what the model had read before the prompts, one for all or one for each, as `Memory.states` of
            `refine_verl.remember` has them, on any device; constants, so that what is learned is how to read on from
            them. None: the
            prompts are the beginning. `Memory.adapt` checks besides that they are this model's.

    Raises:
        ConfigError: unknown key or a value that cannot be used, or layers to adapt that the model does not have.
        PromptError: no prompts, a prompt too short, a token id out of range, another number of states, or states that
            no model of these sizes has.
        ModelError: a model that cannot be adapted here. All three before anything is touched.
    """
    settings = read_settings(config)
    check_model(model, trains=settings.method != "none", adapters=settings.lora_rank > 0)
    check_settings(settings, model.config)
    if settings.lora_rank:
        target_names(model, settings.lora, AdaptSettings.SECTION)
    if settings.reinforces:
        check_selection(settings.nsp, _adapter(model))
    layers = settings.activation_checkpointing == "layer" and settings.method != "none"
    if layers and not isinstance(_adapter(model), RecomputingAdapter):
        raise ConfigError(f"{AdaptSettings.SECTION}.activation_checkpointing", NO_LAYERS)
    prompts = Prompts.read(
        input_ids, vocabulary=vocabulary_of(model), shortest=settings.shortest_prompt, needs=_needs(settings)
    )
    if states is not None:
        _check_strategy(settings)
        prompts = _placed(model, prompts.behind(states))
    return _session(model, prompts, settings)


def _check_strategy(settings: AdaptSettings) -> None:
    if settings.reinforces and looks_at_writes(settings.nsp):
        raise ConfigError(
            f"{AdaptSettings.SECTION}.nsp.selection",
            f"{settings.nsp.selection} looks at what tokens write, which is known where prompts are read from their "
            "first token on only, and these are read from states on. Choose another strategy.",
        )


def _placed(model: Any, prompts: Prompts) -> Prompts:
    """With their states on the model's device.

    Raises:
        PromptError: they cannot be this model's.
    """
    assert prompts.states is not None
    with TemporaryActor(model, activation_checkpointing="none").active(0) as actor:
        set_training(actor, False)
        own = FastWeightActor.forward(actor, mode="first_state")
    device = next(model.parameters()).device
    states = {id(state): state.to(device) for state in prompts.states}
    if not all(look_alike(state, own) for state in states.values()):
        raise PromptError(
            "states: they are of another model: another family, other sizes or another dtype than this one has. Give "
            "states that this model has made."
        )
    return prompts.behind([states[id(state)] for state in prompts.states])


def _widened(state: FastWeightState) -> FastWeightState:
    return state.map(lambda tensor: tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor)


@contextmanager
def _session(model: nn.Module, prompts: Prompts, settings: AdaptSettings) -> Iterator[Adapted]:
    saved = SavedModel(model)
    adapted: Adapted | None = None
    try:
        if settings.method != "none":
            saved.save(settings.backup, fixed=settings.lora_rank > 0)
        if settings.lora_rank:
            name = getattr(model, "name_or_path", None) or None
            add_adapters(model, settings.lora, seed=settings.seed, section=AdaptSettings.SECTION, base=name)
        if saved.widened and prompts.states is not None:
            prompts = prompts.behind([_widened(state) for state in prompts.states])
        actor = TemporaryActor(model, activation_checkpointing=settings.activation_checkpointing, widened=saved.widened)
        adapted = Adapted(actor, prompts, settings)
        adapted._train()
        yield adapted
    finally:
        saved.restore()
        if adapted is not None:
            adapted._closed = True


class Adapted:
    """A model inside the ``with`` block of `adapt`.

    Attributes:
        model: the model itself, with adapted weights; an ordinary Hugging Face model, ``generate`` included.
        settings: what it was adapted with.
        history: metrics of every optimiser step: ``step``, ``actor/loss``, ``actor/ntp_loss``, ``actor/pg_loss``,
            ``actor/grad_norm``, ``nsp/reward/mean`` and others, by their names in a run's ``metrics.jsonl``.
    """

    def __init__(self, actor: TemporaryActor, prompts: Prompts, settings: AdaptSettings) -> None:
        self.model: Any = actor.model
        self.settings = settings
        self.history: list[dict[str, float]] = []
        self._actor = actor
        self._prompts = prompts
        self._closed = False

    def _train(self) -> None:
        if self.settings.method == "none":
            return
        with self._actor.active(self.settings.seed) as actor:
            documents = self._prompts.documents(range(len(self._prompts)), self._actor.device)
            self.history = Loop(actor, self.settings).run(documents, self._prompts.ids)
        torch.clear_autocast_cache()  # an autocast block of the caller may have cached the original weights

    def save(self, directory: str | Path) -> Path:
        """Keep what was learned: a directory that ``PeftModel.from_pretrained`` loads onto the same model.

        Args:
            directory: new or empty, or an adapter that is to be replaced. All of it is written, or nothing.

        Returns:
            The directory.

        Raises:
            ConfigError: all weights were trained (``lora_rank=0``), or the directory holds other things.
            RuntimeError: the block has ended, and the adapters with it.
            OSError: it cannot be written.
        """
        if self._closed:
            raise RuntimeError(
                "adapted.save: the with block has ended, and the adapters with it. Save inside the block."
            )
        if not self.settings.lora_rank:
            raise ConfigError(
                "adapt.lora_rank",
                "is 0: all weights were trained, and there is no adapter to save. Set lora_rank, or keep the whole "
                "model with adapted.model.save_pretrained.",
            )
        about = {"settings": dataclasses.asdict(self.settings), "prompts": len(self._prompts)}
        return write_adapter(directory, self.model, base_fingerprint(self.model), about=about)

    def generate(
        self,
        input_ids: Any = None,
        *,
        max_new_tokens: int | Sequence[int],
        temperature: float = 0.0,
        stop_tokens: Sequence[int] | None = None,
        seed: int | None = None,
        batch_size: int = 8,
    ) -> list[Tensor]:
        """Answer prompts with the adapted weights; each prompt is read once, then its state is carried on.

        Args:
            input_ids: as in `adapt`, from their first token on; None answers the prompts the model was adapted to,
                from the states on that were given with them.
            max_new_tokens: for all rows, or one number per row.
            temperature: 0 takes the most likely token.
            stop_tokens: ids that end a row; None takes the model's ``generation_config.eos_token_id``.
            seed: of sampled tokens; None takes that of the settings. A row's draws depend on seed and prompt only.
            batch_size: prompts read and continued together.

        Returns:
            For each row the ids written, int64 [L] on the model's device, the stop token included.

        Raises:
            PromptError: prompts or limits that cannot be used.
            RuntimeError: the block has ended, and the adapted weights with it.
        """
        if self._closed:
            raise RuntimeError(
                "adapted.generate: the with block has ended and the model has its original weights back. Generate "
                "inside the block."
            )
        prompts = self._prompts
        if input_ids is not None:
            prompts = Prompts.read(
                input_ids, vocabulary=vocabulary_of(self.model), shortest=1, needs="there is nothing to continue."
            )
        limits = _limits(max_new_tokens, len(prompts))
        given = end_tokens_of(self.model) if stop_tokens is None else stop_tokens
        stops = [int(token) for token in given]
        key = self.settings.seed if seed is None else seed
        if temperature < 0:
            raise PromptError(f"temperature must be 0 (greedy) or greater, got {temperature}.")
        if batch_size < 1:
            raise PromptError(f"batch_size must be at least 1, got {batch_size}.")
        written: list[Tensor] = []
        with self._actor.active(key) as actor:
            set_training(actor, False)
            for start in range(0, len(prompts), batch_size):
                rows = range(start, min(start + batch_size, len(prompts)))
                part = prompts.documents(rows, self._actor.device)
                mine = [limits[row] for row in rows]
                ids = [prompts.ids[row] for row in rows]
                draws = answer_draws(key, 0, ids, 1, max(mine)) if temperature > 0 else None
                written += _written(actor, part, mine, temperature=temperature, draws=draws, stop_tokens=stops)
        return written


def _written(actor: FastWeightActor, prompts: Documents, limits: list[int], **how: Any) -> Iterator[Tensor]:
    """The ids of each answer, int64 [L]."""
    answers: Answers = FastWeightActor.forward(
        actor, mode="generate", prompts=prompts, limits=limits, length=max(limits), **how
    )
    for row, length in zip(answers.tokens[:, 0], answers.lengths[:, 0].tolist(), strict=True):
        yield row[:length].clone()


def _adapter(model: Any) -> ModelAdapter:
    """An actor keeps its own."""
    return model.adapter if isinstance(model, FastWeightActor) else adapter_for(model.config)


def _needs(settings: AdaptSettings) -> str:
    if not settings.reinforces:
        return "nothing to predict. Give longer prompts."
    nsp = settings.nsp
    return (
        f"one position in each of nsp.chunks={nsp.chunks} chunks and nsp.rollout_length={nsp.longest_rollout} tokens "
        "after the last one. Give longer prompts, lower nsp.chunks or nsp.rollout_length, or set method='sft'."
    )


def _limits(max_new_tokens: Any, rows: int) -> list[int]:
    try:
        each = max_new_tokens if hasattr(max_new_tokens, "__len__") else [max_new_tokens] * rows
        limits = [operator.index(limit) for limit in each]
    except TypeError as error:
        raise PromptError(f"max_new_tokens: must be an integer or one per prompt, got {max_new_tokens!r}.") from error
    if len(limits) != rows:
        raise PromptError(f"max_new_tokens: {len(limits)} numbers for {rows} prompts. Give one, or one per prompt.")
    for row, limit in enumerate(limits):
        if limit < 1:
            raise PromptError(f"max_new_tokens: must be at least 1, got {limit} for row {row}.")
    return limits
