"""What adapting changes in a model, and the way back: weights, buffers, gradients, flags and classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from refine_verl.kernels import cpu_kernels, ensure_kernels
from refine_verl.models import FastWeightActor, make_actor
from refine_verl.models.passes import Passes

LOW_PRECISION = (torch.bfloat16, torch.float16)

_ACTOR_ATTRIBUTES = tuple(Passes.__annotations__)
_MISSING = object()


@dataclass(frozen=True)
class _Saved:
    """One parameter as it was: its tensor, a copy of what that held (None: never written to), gradient and flag."""

    parameter: nn.Parameter
    tensor: Tensor
    copy: Tensor | None
    device: torch.device
    grad: Tensor | None
    requires_grad: bool

    def restore(self) -> None:
        self.parameter.grad = None  # its dtype may not fit the tensor that is about to come
        self.parameter.data = self.tensor.to(self.device)
        if self.copy is not None:
            self.tensor.copy_(self.copy)
        self.parameter.requires_grad_(self.requires_grad)
        self.parameter.grad = self.grad


class SavedModel:
    """A model's weights, buffers, gradients and flags at one moment, to be put back bit by bit.

    Trainable parameters are copied once. Parameters and buffers in bf16 or fp16 become float32: a step of 1e-6 would
    vanish in their rounding. The original low-precision tensors are then the copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters: list[_Saved] = []
        self._buffers: list[tuple[nn.Module, str, Tensor | None]] = []
        self._training = [(module, module.training) for module in model.modules()]
        self._forward = model.__dict__.get("forward", _MISSING)
        self._adapters = model.__dict__.get("peft_config", _MISSING)
        self._layers = [(module, dict(module._modules)) for module in model.modules()]
        self.widened = False

    def save(self, backup: str, *, fixed: bool = False) -> None:
        """Copy what will change to ``backup``, ``cpu`` or ``device``, and widen low precision.

        After an error, `restore` undoes what was done.

        Args:
            backup: where to.
            fixed: no parameter that is there now will be written to, so that none is copied or widened.
        """
        for parameter in self._model.parameters():
            data, low = parameter.data, parameter.dtype in LOW_PRECISION
            if fixed:
                flag, grad = parameter.requires_grad, parameter.grad
                self._parameters.append(_Saved(parameter, data, None, data.device, grad, flag))
                parameter.grad = None
                continue
            place = data.device if backup == "device" else torch.device("cpu")
            # a low-precision tensor is its own copy, as training writes to another one; it may have to wait elsewhere
            tensor = data.to(place) if low else data
            copy = data.to(place, copy=True) if parameter.requires_grad and not low else None
            saved = _Saved(parameter, tensor, copy, data.device, parameter.grad, parameter.requires_grad)
            self._parameters.append(saved)
            parameter.grad = None
            if low:
                parameter.data, self.widened = data.float(), True
        self._save_buffers(fixed)
        if self.widened and next(self._model.parameters()).device.type == "cuda":
            # fla's kernels want low-precision activations, which these weights no longer give them by themselves
            in_autocast = torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False)
            self._model.__dict__["forward"] = in_autocast(self._model.forward)

    def _save_buffers(self, fixed: bool) -> None:
        working: dict[int, Tensor] = {}
        for module in self._model.modules():
            for name, buffer in module._buffers.items():
                self._buffers.append((module, name, buffer))
                if buffer is None:
                    continue
                if id(buffer) not in working:
                    widens = buffer.dtype in LOW_PRECISION and not fixed
                    working[id(buffer)] = buffer.float() if widens else buffer.clone()
                module._buffers[name] = working[id(buffer)]

    def restore(self) -> None:
        """Put everything back. A keyboard interrupt meanwhile is raised once all is done."""
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                self._restore()
                break
            except KeyboardInterrupt as raised:
                interrupt = raised
        if interrupt is not None:
            raise interrupt

    @torch.no_grad()
    def _restore(self) -> None:
        for module, children in self._layers:
            for name, child in children.items():
                module._modules[name] = child  # without the adapters around it
        for saved in self._parameters:
            saved.restore()
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer
        for module, training in self._training:
            module.training = training
        _put(self._model, "forward", self._forward)
        _put(self._model, "peft_config", self._adapters)
        torch.clear_autocast_cache()  # an autocast block of the caller may have cached the adapted weights


def _put(model: nn.Module, name: str, value: Any) -> None:
    if value is _MISSING:
        model.__dict__.pop(name, None)
    else:
        model.__dict__[name] = value


class TemporaryActor:
    """Makes a model a `FastWeightActor` while our own passes run, and leaves no trace of that afterwards."""

    def __init__(self, model: nn.Module, *, activation_checkpointing: str, widened: bool = False) -> None:
        """Args:
        model: a model that passed `check_model`, or a `FastWeightActor` (it keeps its adapter and precision).
        activation_checkpointing: see `make_actor`; none for a `FastWeightActor` leaves it what it has.
        widened: its weights were low precision until a moment ago.
        """
        self.model = model
        self.device = next(model.parameters()).device
        self._head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        self._own = self._identity()
        autocast = torch.bfloat16 if self.device.type == "cuda" else None
        adapter, reading = None, "whole"
        if isinstance(model, FastWeightActor):
            reading = model.reading
            adapter, autocast = model.adapter, model.autocast_dtype or (autocast if widened else None)
            if activation_checkpointing == "none":
                activation_checkpointing = model.activation_checkpointing
        try:
            make_actor(
                model,
                adapter=adapter,
                autocast_dtype=autocast,
                activation_checkpointing=activation_checkpointing,
                reading=reading,
            )
            self._actor = self._identity()
        finally:
            self._become(self._own)

    def _identity(self) -> tuple[type, type, dict[str, Any]]:
        """Class of the model, class of its head, and what an actor has beyond a model."""
        attributes = {name: self.model.__dict__.get(name, _MISSING) for name in _ACTOR_ATTRIBUTES}
        return type(self.model), type(self._head), attributes

    def _become(self, identity: tuple[type, type, dict[str, Any]]) -> None:
        self.model.__class__, self._head.__class__, attributes = identity
        for name, value in attributes.items():
            _put(self.model, name, value)

    @contextmanager
    def active(self, seed: int) -> Iterator[FastWeightActor]:
        """The actor, for a ``with`` block in which no global state of torch is touched.

        A user's autocast, ``no_grad`` and random state neither enter nor change; afterwards class, attributes and
        training flags are as before.
        """
        training = [(module, module.training) for module in self.model.modules()]
        ensure_kernels()
        with (
            cpu_kernels() if self.device.type == "cpu" else nullcontext(),
            _own_random_state(self.device, seed),
            torch.enable_grad(),
            torch.autocast(self.device.type, enabled=False),
        ):
            try:
                self._become(self._actor)
                assert isinstance(self.model, FastWeightActor)
                yield self.model
            finally:
                self._become(self._own)
                for module, flag in training:
                    module.training = flag


@contextmanager
def _own_random_state(device: torch.device, seed: int) -> Iterator[None]:
    """Nothing of ours draws from torch's generators; a model's own layers might."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def set_training(model: nn.Module, training: bool) -> None:
    """Training mode as fla's kernels understand it (some have a backward pass in that mode only), without dropout."""
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.training = False
