"""A model that vLLM serves, asked for what `model.EvaluatedModel` is asked for: `engine=vllm` (docs/vllm.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

from refine_verl.adaptation import AdaptSettings
from refine_verl.config import ConfigError, DataError, ModelError
from refine_verl.evaluate.model import Answer, FoundModel, Likelihood, Rows, cut, has_stopped
from refine_verl.evaluate.results import fingerprint
from refine_verl.evaluate.shared import batches
from refine_verl.models.answers import end_tokens_of
from refine_verl.models.loading import DTYPES, load_model
from refine_verl.models.lora import Adapter, apply_adapter
from refine_verl.models.weights import stored_weights
from refine_verl.serving.adapters import why_adapter_not_served
from refine_verl.serving.engine import FAMILIES, Engine, EngineSettings, require_memory, runs_on_cpu, served_dtype


class ServedModel:
    """A model for vLLM with its tokenizer; the engine starts when it is first asked, and ends with the block.

    Its weights are what they are: there is no test-time training.

    Args:
        found: the model and its tokenizer.
        dtype: `auto` (what vLLM takes), `float32` or `bfloat16`.
        batch_size: sequences that are read and continued together.
        max_model_len: most tokens of a prompt with its answer; None: as `require_room` says.
        memory: see `refine_verl.serving.engine.EngineSettings`.
        keep_states: whether prompts that begin alike are read once.

    Raises:
        ModelError: vLLM cannot serve it or its adapter.
    """

    def __init__(
        self,
        found: FoundModel,
        *,
        dtype: str = "auto",
        batch_size: int = 8,
        max_model_len: int | None = None,
        memory: float | None = None,
        keep_states: bool = True,
    ) -> None:
        self.found, self.tokenizer = found, found.tokenizer
        self.ttt = AdaptSettings(method="none")
        self.dtype = served_dtype(found.path, found.info.model_type, dtype, key=found.key)
        require_memory(memory, key="gpu_memory_utilization")
        if found.adapter is not None:
            require_served_adapter(found.adapter, found.info.model_type)
        self.batch_size, self.memory, self.keep_states = batch_size, memory, keep_states
        self.max_model_len = max_model_len
        self._room = max_model_len or 0
        self._engine: Engine | None = None
        self.stop_tokens = end_tokens_of(_generating(found.path, found.info.config), self.tokenizer.eos_token_id)

    def __enter__(self) -> ServedModel:
        return self

    def __exit__(self, *_: object) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    @property
    def config(self) -> PretrainedConfig:
        """Of the model."""
        return self.found.info.config

    @property
    def device(self) -> torch.device:
        """Where vLLM runs."""
        return torch.device("cpu" if runs_on_cpu() else "cuda")

    @property
    def shares(self) -> bool:
        """Whether whoever asks should put prompts that begin alike together: vLLM finds them itself."""
        return False

    def fingerprint(self) -> str:
        """sha256 of a part of every weight, in the type that they are served in, those of an adapter included.

        Raises:
            ModelError: weights that are no numbers, or an adapter of another model.
        """
        path = self.found.path
        if self.found.adapter is not None:
            model = check_base(path, self.found.adapter, key=self.found.key, dtype=DTYPES[self.dtype])
            return fingerprint((name, parameter.detach()) for name, parameter in model.named_parameters())
        weights = stored_weights(path, self.config, key=self.found.key)
        if weights is None:  # a hub id that was not downloaded before
            weights = stored_weights(snapshot_download(path), self.config, key=self.found.key)
        if weights is None:
            raise ModelError(f"{self.found.key}={path}: no weights were downloaded.")
        return fingerprint((name, values.to(DTYPES[self.dtype])) for name, values in weights)

    def require_room(self, what: str, tokens: int) -> None:
        """Say what will be asked, before it is.

        Args:
            what: names the sample or the task, for the message.
            tokens: of a prompt with its answer.

        Raises:
            DataError: more than `max_model_len`, or than a running engine was started for.
        """
        if self._room and (self.max_model_len is not None or self._engine is not None) and tokens > self._room:
            raise DataError(
                f"{what} needs {tokens} tokens with its answer, and vLLM was given max_model_len={self._room}. Raise "
                f"it to {tokens} at least, or leave the sample out."
            )
        self._room = max(self._room, tokens)

    def likelihoods(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        """As `EvaluatedModel.likelihoods`."""
        rows = [[*context, *following] for context, following in pairs]
        for row in rows:
            self.require_room("a text that is scored", len(row) + 1)
        found = []
        for scored, (context, following) in zip(self._started().score(rows), pairs, strict=True):
            log_probs, greedy = scored.log_probs[len(context) - 1 :], scored.greedy[len(context) - 1 :]
            found.append(Likelihood(sum(log_probs), sum(greedy), len(following)))
        return found

    def answers(
        self, prompts: Sequence[np.ndarray], limits: Sequence[int], *, size: int, share: bool
    ) -> Iterator[list[Answer]]:
        """As `EvaluatedModel.answers`, each as soon as it is finished; ``size`` is the engine's."""
        groups = [batch for batch in batches(prompts, len(prompts), share=share) if batch.shared]
        contexts = [(batch.rows, prompts[batch.rows[0]][: batch.shared].tolist()) for batch in groups]
        for prompt, limit in zip(prompts, limits, strict=True):
            self.require_room("a prompt", len(prompt) + limit)
        written = self._started().write(
            [row.tolist() for row in prompts], limits, stop_tokens=self.stop_tokens, contexts=contexts
        )
        for answer in written:
            yield [Answer(answer.row, self.decode(answer.tokens), answer.read)]

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
        """As `EvaluatedModel.write`, greedy only.

        Raises:
            ConfigError: a temperature.
        """
        if temperature > 0:
            raise ConfigError(
                "temperature",
                "sampled answers are drawn by this package's own numbers, which vLLM does not take. Leave engine=vllm "
                "out, or use the harness's own model vllm (docs/evaluation.md).",
            )
        for prompt, limit in zip(prompts, limits, strict=True):
            self.require_room("a prompt", len(prompt) + limit)
        ends = (lambda _, tokens: has_stopped(self.decode, tokens, stops)) if stops else None
        written = self._started().write(prompts, limits, stop_tokens=self.stop_tokens, ends=ends)
        found = {answer.row: cut(self.decode(answer.tokens), stops) for answer in written}
        return [found[row] for row in range(len(prompts))]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _started(self) -> Engine:
        if self._engine is None:
            adapter = self.found.adapter
            settings = EngineSettings(
                model=self.found.path,
                dtype=self.dtype,
                tokens=self._room,
                sequences=self.batch_size,
                keep_states=self.keep_states,
                memory=self.memory,
                adapter=None if adapter is None else str(adapter.path),
                adapter_rank=0 if adapter is None else adapter.config.r,
            )
            self._engine = Engine(settings, self.found.info.model_type)
        return self._engine


def require_served_adapter(adapter: Adapter, model_type: str) -> None:
    """Refuse an adapter that vLLM does not serve, or would serve in parts.

    Args:
        adapter: of `open_adapter`.
        model_type: of the model that it is for.

    Raises:
        ModelError: says what of it, and what to do.
    """
    reason = why_adapter_not_served(adapter.config, adapter.tensors)
    if reason is None and model_type not in FAMILIES:
        reason = f"it is for a {model_type}, and those of {' and '.join(FAMILIES)} were compared with this package's"
    if reason is not None:
        raise ModelError(
            f"{adapter.key}={adapter.path}: vLLM cannot serve this adapter: {reason}. Merge it into its model "
            f"(python -m refine_verl.export adapter={adapter.path} out=MERGED) and evaluate that."
        )


def check_base(path: str, adapter: Adapter, *, key: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Refuse an adapter of another model, by putting it in.

    Args:
        path: directory or hub id of the model.
        adapter: of `open_adapter`.
        key: what named the model.
        dtype: of the weights.

    Returns:
        The model with it, on the CPU.

    Raises:
        ModelError: they do not belong together.
    """
    model: nn.Module = load_model(path, dtype=dtype, key=key)
    apply_adapter(model, adapter)
    return model


@dataclasses.dataclass(frozen=True)
class _Generating:
    """Has the `generation_config` of a model that was loaded."""

    generation_config: GenerationConfig


def _generating(path: str, config: PretrainedConfig) -> _Generating:
    try:
        return _Generating(GenerationConfig.from_pretrained(path))
    except OSError:
        return _Generating(GenerationConfig.from_model_config(config))
