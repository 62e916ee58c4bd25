"""What a run adds to the process of vLLM that holds the model: loaded by vLLM, by its name."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from refine_verl.serving.distribution import answer_to_vllm

answer_to_vllm()  # or verl's package for vLLM would not be found to be installed

from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver  # noqa: E402
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension  # noqa: E402

Pieces = queue.Queue[list[tuple[str, Tensor]] | None]


class AnswerWorkerExtension(vLLMColocateWorkerExtension):
    """verl's, which receives weights; on CPUs by vLLM's own reloading, because there weights are packed once loaded."""

    def monkey_patch_model(self, vocab_size: int, banned_token_ids: list[int] | None = None) -> None:
        """Nothing: the trainer's probabilities are over all of the model's vocabulary, whatever the tokenizer has."""

    def update_weights_from_ipc(
        self, peft_config: Any = None, base_sync_done: bool = False, use_shm: bool = False
    ) -> None:
        """See verl's. Weights come in pieces; on CPUs a layer's are copied until the layer is complete."""
        if self.device.type != "cpu":
            super().update_weights_from_ipc(peft_config=peft_config, base_sync_done=base_sync_done, use_shm=use_shm)
            return
        receiver = BucketedWeightReceiver(zmq_handle=self._get_zmq_handle(), device=self.device, use_shm=use_shm)
        with _received(receiver) as weights:
            self.model_runner.reload_weights(weights_iterator=weights)


class _received:  # noqa: N801, a context manager
    """The tensors that arrive, one after the other; a thread receives, because verl's receiver hands over by calls."""

    def __init__(self, receiver: BucketedWeightReceiver) -> None:
        self.receiver = receiver
        self.pieces: Pieces = queue.Queue(maxsize=1)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._receive, daemon=True)

    def _receive(self) -> None:
        try:
            # copied: the buffer is filled again as soon as this piece was taken
            self.receiver.receive_weights(lambda weights, _: self.pieces.put([(n, t.clone()) for n, t in weights]))
        except BaseException as error:
            self.error = error
        finally:
            self.pieces.put(None)

    def __enter__(self) -> Iterator[tuple[str, Tensor]]:
        self.thread.start()
        return self._tensors()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        while (piece := self.pieces.get()) is not None:
            yield from piece
        if self.error is not None:
            raise self.error

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:  # the sender is not left waiting for somebody to take the rest
            threading.Thread(target=lambda: list(iter(self.pieces.get, None)), daemon=True).start()
        else:
            self.thread.join()
