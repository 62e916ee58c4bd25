"""A fast-weight model that is evaluated: log-likelihoods, and answers written from the state after the prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from refine_verl.adaptation import AdaptSettings, PromptError, adapt
from refine_verl.adaptation.checks import check_settings
from refine_verl.adaptation.settings import METHODS, read_settings
from refine_verl.config import ConfigError, require_choice
from refine_verl.data.tokenizers import open_model_tokenizer
from refine_verl.evaluate.results import fingerprint
from refine_verl.evaluate.shared import batches
from refine_verl.models import (
    Documents,
    FastWeightActor,
    FastWeightState,
    ModelError,
    ModelInfo,
    load_model,
    make_actor,
    open_model,
)
from refine_verl.models.adapters import adapter_for, check_selection
from refine_verl.models.answers import end_tokens_of
from refine_verl.models.loading import device_of, dtype_of
from refine_verl.models.lora import Adapter, apply_adapter, open_adapter

Rows = Sequence[Sequence[int]]
_SEGMENT = 2048  # tokens of a shared context in one pass


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Of the tokens after a context: sum of log p, how many are the most likely one, and how many there are."""

    log_prob: float
    correct: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """The text that follows the prompt ``row`` of those that were given, of which ``read`` tokens were read."""

    row: int
    text: str
    read: int


class EvaluatedModel:
    """A model on its device with its tokenizer, read once and asked many times.

    With ``ttt`` it is adapted to each prompt before what follows it is scored or written; `method="none"` does not.
    """

    def __init__(
        self, actor: FastWeightActor, tokenizer: PreTrainedTokenizerBase, ttt: AdaptSettings | None = None
    ) -> None:
        self.actor, self.tokenizer = actor, tokenizer
        self.ttt = ttt or AdaptSettings(method="none")
        self.device = next(actor.parameters()).device
        self.stop_tokens = end_tokens_of(actor, tokenizer.eos_token_id)
        self._kept: tuple[tuple[int, ...], FastWeightState] | None = None

    @property
    def config(self) -> PretrainedConfig:
        """Of the model."""
        return self.actor.config

    @property
    def dtype(self) -> str:
        """Of the weights, `float32` say."""
        return str(next(self.actor.parameters()).dtype).removeprefix("torch.")

    @property
    def shares(self) -> bool:
        """Whether prompts that begin alike can be read once; adapted weights are those of one prompt alone."""
        return self.ttt.method == "none"

    def fingerprint(self) -> str:
        """sha256 of a part of every parameter."""
        return fingerprint((name, parameter.detach()) for name, parameter in self.actor.named_parameters())

    def likelihoods(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, shared: int = 0) -> list[Likelihood]:
        """Score what follows a context, all pairs in one pass (one by one with test-time training).

        Args:
            pairs: ids of a context and of what follows it, at least one each.
            shared: how many first tokens are the same in all contexts; see `write`.
        """
        if self.ttt.method == "none":
            beginning = self._after(tuple(pairs[0][0][:shared])) if shared else None
            return self._score([(context[shared:], following) for context, following in pairs], beginning)
        found: dict[int, Likelihood] = {}
        contexts: dict[tuple[int, ...], list[int]] = {}
        for index, (context, _) in enumerate(pairs):
            contexts.setdefault(tuple(context), []).append(index)
        for context, indices in contexts.items():
            with self.adapted(context):
                found.update(zip(indices, self._score([pairs[index] for index in indices]), strict=True))
        return [found[index] for index in range(len(pairs))]

    def answers(
        self, prompts: Sequence[np.ndarray], limits: Sequence[int], *, size: int, share: bool
    ) -> Iterator[list[Answer]]:
        """Answers to all prompts, those that are finished together at a time.

        Args:
            prompts: their ids, int [T] each.
            limits: most tokens to write for each.
            size: prompts that are read and continued together.
            share: whether those that begin alike are read once.
        """
        for batch in batches(prompts, size, share=share):
            rows = [prompts[row].tolist() for row in batch.rows]
            texts = self.write(rows, [limits[row] for row in batch.rows], shared=batch.shared)
            read = batch.read([len(row) for row in rows])
            yield [Answer(*found) for found in zip(batch.rows, texts, read, strict=True)]

    def write(
        self,
        prompts: Rows,
        limits: Sequence[int],
        *,
        stops: Sequence[str] = (),
        temperature: float = 0.0,
        draws: Tensor | None = None,
        shared: int = 0,
    ) -> list[str]:
        """Continue prompts of unequal length; each is read once, then its state is carried on.

        Args:
            prompts: their ids.
            limits: most tokens to write for each.
            stops: texts that end an answer; they and what follows are cut off.
            temperature: 0 takes the most likely token.
            draws: uniforms [N, max(limits)], needed unless the temperature is 0.
            shared: how many first tokens are the same in all prompts, fewer than any has. They are read once, also
                where the next call's prompts begin with them. 0 with test-time training.
        """
        if self.ttt.method == "none":
            beginning = self._after(tuple(prompts[0][:shared])) if shared else None
            written = self._write([row[shared:] for row in prompts], limits, stops, temperature, draws, beginning)
        else:
            written = []
            for row, prompt in enumerate(prompts):
                own = None if draws is None else draws[row : row + 1]
                with self.adapted(prompt):
                    written += self._write([prompt], [limits[row]], stops, temperature, own)
        return [cut(self.decode(ids), stops) for ids in written]

    @contextmanager
    def adapted(self, prompt: Sequence[int]) -> Iterator[None]:
        """The model adapted to one prompt for the time of the block; afterwards its weights are what they were.

        Raises:
            PromptError: the prompt is too short.
        """
        if len(prompt) < self.ttt.shortest_prompt:
            raise PromptError(
                f"test-time training needs prompts of at least {self.ttt.shortest_prompt} tokens (chunks + "
                f"rollout_length), and one has {len(prompt)}. Lower nsp.chunks or nsp.rollout_length of its settings, "
                "or use ttt=sft or ttt=none."
            )
        with adapt(self.actor, [list(prompt)], self.ttt):
            yield

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], beginning: FastWeightState | None = None
    ) -> list[Likelihood]:
        rows = [[*context, *following] for context, following in pairs]
        documents = self._documents(rows, beginning, tuple(len(context) for context, _ in pairs))
        loss, correct = FastWeightActor.forward(self.actor, mode="score", documents=documents)
        _require_numbers(loss)
        return [
            Likelihood(-total, right, len(following))
            for total, right, (_, following) in zip(loss.tolist(), correct.tolist(), pairs, strict=True)
        ]

    def _write(
        self,
        prompts: Rows,
        limits: Sequence[int],
        stops: Sequence[str],
        temperature: float,
        draws: Tensor | None,
        beginning: FastWeightState | None = None,
    ) -> list[list[int]]:
        answers = FastWeightActor.forward(
            self.actor,
            mode="generate",
            prompts=self._documents(prompts, beginning),
            limits=limits,
            length=max(limits),
            temperature=temperature,
            draws=None if draws is None else draws[:, None, : max(limits)],
            ends=_Ends(self, len(prompts), stops),
        )
        _require_numbers(answers.log_probs)
        rows = zip(answers.tokens[:, 0].tolist(), answers.lengths[:, 0].tolist(), strict=True)
        return [tokens[:length] for tokens, length in rows]

    def _after(self, context: tuple[int, ...]) -> FastWeightState:
        """The state after a context, one row; that of the last one is kept."""
        if self._kept is None or self._kept[0] != context:
            self._kept = None  # room for the next one
            ids = [torch.tensor(context, dtype=torch.int64)]
            (state,) = FastWeightActor.forward(self.actor, mode="read_on", rows=ids, states=None, segment=_SEGMENT)
            self._kept = context, state
        return self._kept[1]

    def _documents(
        self, rows: Rows, beginning: FastWeightState | None, learn_from: tuple[int, ...] | None = None
    ) -> Documents:
        tokens = pad_sequence([torch.tensor(list(row), dtype=torch.int64) for row in rows], batch_first=True)
        before = None if beginning is None else beginning.fork(len(rows))
        return Documents(tokens.to(self.device), tuple(len(row) for row in rows), learn_from, before)


class _Ends:
    """Which answers a token ends: a stop token, or the last one of a text that stops them."""

    def __init__(self, model: EvaluatedModel, rows: int, stops: Sequence[str]) -> None:
        self.model, self.stops = model, stops
        self.written: list[list[int]] = [[] for _ in range(rows)]
        self.ended = [False] * rows

    def __call__(self, tokens: Tensor) -> Tensor:
        for row, token in enumerate(tokens.tolist()):
            self.written[row].append(token)
            self.ended[row] = (
                self.ended[row]
                or token in self.model.stop_tokens
                or has_stopped(self.model.decode, self.written[row], self.stops)
            )
        return torch.tensor(self.ended, device=tokens.device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoundModel:
    """A model that can be read, and its tokenizer.

    Attributes:
        key, path: what named it, and how.
        info: what is known before its weights are read.
        tokenizer: fits its vocabulary.
        adapter: that is put into it.
    """

    key: str
    path: str
    info: ModelInfo
    tokenizer: PreTrainedTokenizerBase
    adapter: Adapter | None = None


def find_model(
    path: str, tokenizer: str | None = None, *, key: str = "model", adapter: str | None = None
) -> FoundModel:
    """Check a model and its tokenizer before anything else is done.

    Args:
        path: directory or hub id of a fast-weight model with weights.
        tokenizer: directory or hub id, or `bytes`; None takes the model's.
        key: what names the model, for messages.
        adapter: directory of a LoRA adapter of the model.

    Raises:
        ModelError, DataError: what cannot be used.
    """
    info = open_model(path, key=key)
    words = open_model_tokenizer(tokenizer, path, info.vocab_size, keys=("tokenizer", key))
    found = None if adapter is None else open_adapter(adapter)
    return FoundModel(key=key, path=path, info=info, tokenizer=words, adapter=found)


def load_evaluated(
    found: FoundModel, *, dtype: str = "auto", device: str = "auto", ttt: AdaptSettings | None = None
) -> EvaluatedModel:
    """Read a model.

    Args:
        found: what is to be read.
        dtype: `auto` (bfloat16 on a GPU, else float32), `float32` or `bfloat16`. Matrix products on a GPU run in bf16.
        device: `auto`, `cpu` or `cuda[:N]`.
        ttt: see `EvaluatedModel`.

    Raises:
        ModelError, ConfigError: what cannot be used.
    """
    if ttt is not None and ttt.reinforces:
        check_selection(ttt.nsp, adapter_for(found.info.config))
    if ttt is not None and ttt.lora_rank and found.adapter is not None:
        raise ConfigError(
            "adapt.lora_rank",
            f"{ttt.lora_rank} would train an adapter beside the one of adapter={found.adapter.path}. Merge that one "
            "first (python -m refine_verl.export), or leave lora_rank out.",
        )
    place = device_of(device)
    model = load_model(found.path, dtype=dtype_of(dtype, place), key=found.key)
    if found.adapter is not None:
        apply_adapter(model, found.adapter)
    model = model.to(place).eval()
    # fla's chunked kernels take no float32 on a GPU, which is what adapted weights are.
    actor = make_actor(model, autocast_dtype=torch.bfloat16 if place.type == "cuda" else None)
    return EvaluatedModel(actor, found.tokenizer, ttt)


def ttt_settings(method: str, settings: Any = None) -> AdaptSettings:
    """Settings of test-time training from a method and what is set otherwise.

    Args:
        method: `none`, `sft` or `refine`.
        settings: a mapping with keys of `AdaptSettings`, or the name of a YAML file with one; None: the paper's.

    Raises:
        ConfigError: an unknown key or value, a file that cannot be read, or settings without a method.
    """
    require_choice("ttt", method, METHODS)
    if isinstance(settings, str):
        try:
            settings = OmegaConf.to_container(OmegaConf.load(Path(settings).expanduser()), resolve=True)
        except Exception as error:  # the file system's, YAML's and OmegaConf's have no common type
            raise ConfigError("adapt", f"{settings} cannot be read: {error}") from error
    if method == "none" and settings:
        raise ConfigError("adapt", "has no effect with ttt=none. Set ttt=refine or ttt=sft, or leave it out.")
    if isinstance(settings, dict) and "method" in settings:
        raise ConfigError("adapt.method", "is what ttt says; leave it out.")
    read = read_settings({**(settings or {}), "method": method})
    check_settings(read)
    return read


def _require_numbers(values: Tensor) -> None:
    """Refuse a model whose predictions are no numbers: they would be scored as wrong ones.

    Raises:
        ModelError: they are not.
    """
    if not bool(values.isfinite().all()):
        raise ModelError(
            "model: its predictions are NaN or infinite, so there is nothing to score. Its weights are ruined, or too "
            "large for this dtype (dtype=float32); evaluate an earlier checkpoint."
        )


def has_stopped(decode: Callable[[Sequence[int]], str], tokens: Sequence[int], stops: Sequence[str]) -> bool:
    """Whether one of these texts has just been written.

    Args:
        decode: tokens to text.
        tokens: of the answer so far.
        stops: texts that end it.
    """
    if not stops:
        return False
    # A byte is the least a token can add to a text: so many tokens back, and a stop that has just ended shows.
    tail = decode(tokens[-max(len(stop.encode()) for stop in stops) - 2 :])
    return any(stop in tail for stop in stops)


def cut(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of what stops it."""
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text
