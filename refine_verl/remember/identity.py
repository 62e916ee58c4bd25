"""Which model a state is of: a state means nothing to another one, nor to this one once it has been trained."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from refine_verl.config import DataError, ModelError
from refine_verl.config.refusals import with_article
from refine_verl.data.tokenize import tokenizer_fingerprint

_NOT_OF_THE_STATE = (
    "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "torch_dtype", "transformers_version",
    "use_cache",
)  # fmt: skip
"""What a configuration says that states do not depend on; the dtype has a field of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """What a state depends on.

    Attributes:
        model_type: the family.
        configuration: of the model, as in `config.json`, without what states do not depend on.
        dtype: of the parameters.
        weights: sha256 of all parameters and persistent buffers, with their names, shapes and dtypes.
        tokenizer: sha256 of what it does; None where there are token ids only.
    """

    model_type: str
    configuration: dict[str, Any]
    dtype: str
    weights: str
    tokenizer: str | None

    @staticmethod
    def of(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> Identity:
        """Of a model with these weights, and the tokenizer that made the documents' tokens."""
        values = json.loads(json.dumps(model.config.to_dict(), default=str))
        own = {key: value for key, value in values.items() if key not in _NOT_OF_THE_STATE and key[0] != "_"}
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        return Identity(
            model_type=model.config.model_type,
            configuration=own,
            dtype=dtype,
            weights=weights_hash(model),
            tokenizer=None if tokenizer is None else tokenizer_hash(tokenizer),
        )

    def refuse_other(self, now: Identity, where: object) -> None:
        """Refuse a model or a tokenizer that is not the one of the states.

        Args:
            now: of the model that is there; a tokenizer on one side only is no difference.
            where: the states, for messages.

        Raises:
            ModelError: another family, configuration, dtype, or other weights.
            DataError: another tokenizer.
        """
        if self.model_type != now.model_type:
            raise ModelError(
                f"{where}: these are states of {with_article(self.model_type)}, and the model is "
                f"{with_article(now.model_type)}."
            )
        if self.configuration != now.configuration:
            names = [*dict.fromkeys((*self.configuration, *now.configuration))]
            there, here = self.configuration, now.configuration
            found = [f"{n}: {there.get(n)} there, {here.get(n)} here" for n in names if there.get(n) != here.get(n)]
            raise ModelError(f"{where}: these are states of a model with another configuration ({'; '.join(found)}).")
        if self.dtype != now.dtype:
            raise ModelError(
                f"{where}: these are states of a model in {self.dtype}, and this one is in {now.dtype}. Load it in "
                f"{self.dtype}, or read the documents again."
            )
        if self.weights != now.weights:
            raise ModelError(
                f"{where}: these are states of a model with other weights: it has been trained since, is another "
                "checkpoint, or has another adapter than when it read them (adapter=DIR). Give the one that read the "
                "documents, or read them again."
            )
        if None not in (self.tokenizer, now.tokenizer) and self.tokenizer != now.tokenizer:
            raise DataError(
                f"{where}: the documents were tokenised by another tokenizer, so this one's questions would be other "
                "tokens. Give the one they were read with, or read them again."
            )


def weights_hash(model: nn.Module) -> str:
    """sha256 of all of a model's state dict; a tensor at a time on the host."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_weights(model).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of all that decides which tokens a text becomes."""
    words = json.dumps(tokenizer_fingerprint(tokenizer), sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()


class Watch:
    """Notices when the weights of a model are no longer those of its states.

    Weights are hashed again only where PyTorch says that they were written to or replaced: `refine_verl.adapt` does
    both and puts everything back.
    """

    def __init__(self, model: nn.Module, identity: Identity) -> None:
        self.model, self.identity = model, identity
        self._marks = self._look()

    def check(self) -> None:
        """Raises: ModelError, the weights have changed."""
        marks = self._look()
        if marks == self._marks:
            return
        if weights_hash(self.model) != self.identity.weights:
            raise ModelError(
                "refine_verl.remember: the model's weights have changed since it read the documents (training, or an "
                "open block of refine_verl.adapt), so their states mean nothing to it. Read them again, or restore "
                "the weights."
            )
        self._marks = marks

    def _look(self) -> list[tuple[str, int, int]]:
        return [(name, tensor.data_ptr(), tensor._version) for name, tensor in _weights(self.model).items()]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict(keep_vars=True))
