"""From a training worker to the vLLM server beside it: all weights, in bounded pieces. Loads vLLM when it is used."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
import torch
import zmq
from torch import Tensor

from refine_verl.config import RunFailed
from refine_verl.serving.distribution import answer_to_vllm

PATIENCE_SECONDS = 600.0
"""So long a server may take for one piece."""
_LOOK_SECONDS = 5.0
"""How often a server that does not answer is asked whether it is alive."""


class ServerGone(RunFailed):
    """The server does not take weights: it has ended, or refused them."""


class PatientSocket:
    """A socket of the sender that does not wait for a peer that is gone.

    Args:
        socket: of zmq.
        why_gone: says why nobody will answer, or None.
        patience: seconds for one message.
    """

    def __init__(self, socket: Any, why_gone: Callable[[], str | None], patience: float = PATIENCE_SECONDS) -> None:
        self.socket, self.why_gone, self.patience = socket, why_gone, patience
        for name in (zmq.SNDTIMEO, zmq.RCVTIMEO):
            socket.setsockopt(name, 500)
        socket.setsockopt(zmq.LINGER, 0)

    def send_pyobj(self, message: object) -> None:
        """Send, as soon as somebody is there to receive."""
        self._until_done(lambda: self.socket.send_pyobj(message))

    def recv(self) -> Any:
        """What the peer answers."""
        return self._until_done(self.socket.recv)

    def close(self) -> None:
        """Close the socket; what was not sent is dropped."""
        self.socket.close()

    def _until_done(self, attempt: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + self.patience
        while True:
            try:
                return attempt()
            except zmq.Again:
                reason = self.why_gone()
                if reason is None and time.monotonic() > deadline:
                    reason = f"it took no weights for {self.patience:.0f} s"
                if reason is not None:
                    raise ServerGone(reason) from None


class WeightLink:
    """The sender of one rank, on verl's adapter.

    Args:
        rollout: verl's rollout section, with what the servers were started with.
        model: verl's model configuration.
        servers: the first server of each replica.
    """

    def __init__(self, rollout: Any, model: Any, servers: list[Any]) -> None:
        answer_to_vllm()
        from verl.workers.rollout.vllm_rollout import ServerAdapter

        self.adapter = ServerAdapter(config=rollout, model_config=model, device_mesh=None)
        self.adapter.server_handle = servers[self.adapter.replica_rank]
        self.rollout = self.adapter.config

    @property
    def server(self) -> Any:
        """The server if this rank is the one that talks to it, else None."""
        return self.adapter.server_handle if self.adapter._has_server else None

    @torch.no_grad()
    def send(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Send all weights and tell the server their version. On all ranks: each weight is put together from theirs.

        Args:
            weights: names and full tensors; read to the end whatever happens.
            version: of these weights.

        Raises:
            ServerGone: the server has ended or refused them.
        """
        from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

        received = None
        if self.server is not None:
            received = self.server.collective_rpc.remote(
                "update_weights_from_ipc", kwargs={"use_shm": self.adapter.use_shm}
            )
        why_gone = Watch(received, self.server).why_gone

        class Sender(BucketedWeightSender):
            socket: Any

            def _init_socket(self) -> None:
                super()._init_socket()
                self.socket = PatientSocket(self.socket, why_gone)

        bucket = self.rollout.checkpoint_engine.update_weights_bucket_megabytes
        sender = Sender(self.adapter.zmq_handle, bucket, use_shm=self.adapter.use_shm)
        try:
            asyncio.run(sender.async_send_weights(weights))
            if self.server is not None:
                ray.get(received)
                ray.get(self.server.clear_kv_cache.remote())  # prefixes that the old weights have read
                ray.get(self.server.set_global_steps.remote(version))
        except ray.exceptions.RayError as error:
            raise ServerGone(first_line(error)) from error
        finally:
            for _ in weights:  # the other ranks are still putting theirs together, with this one's shards
                pass

    def wake(self, tags: list[str]) -> None:
        """Give a server that sleeps its memory back: ``weights``, then ``kv_cache``."""
        asyncio.run(self.adapter.resume(tags=tags))


class Watch:
    """Whether a server that was asked to receive weights still will.

    Args:
        received: the answer that is to come; None: another rank asks.
        server: to be asked whether it is alive.
    """

    def __init__(self, received: Any, server: Any) -> None:
        self.received, self.server = received, server
        self.looked = time.monotonic()

    def why_gone(self) -> str | None:
        """Why not, or None."""
        if self.received is None:
            return None
        done, _ = ray.wait([self.received], timeout=0)
        try:
            if done:
                ray.get(self.received)
                return "it stopped receiving before all weights were sent"
            if time.monotonic() - self.looked > _LOOK_SECONDS:
                self.looked = time.monotonic()
                if not ray.get(self.server.alive.remote(), timeout=_LOOK_SECONDS):
                    return "its engine has ended"
        except ray.exceptions.GetTimeoutError:
            return None
        except ray.exceptions.RayError as error:
            return first_line(error)
        return None


def first_line(error: BaseException) -> str:
    """The last line of a remote error that says something, without the traceback around it."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0][:300] if lines else 'no message'}"
