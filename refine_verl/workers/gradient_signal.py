"""How much of the policy gradient is signal, measured on the first mini-batch of a step (`refine.gradient_snr_every`).

The mini-batch's documents fall into two halves, every other one of each rank, and the policy term alone goes back once
through each. Their documents, positions and rollouts are drawn independently, so that g_A and g_B have the same
expectation and independent noise: g_A . g_B is |E g|^2 on average, and |g_A - g_B|^2 / 4 the variance of their mean g,
the mini-batch's policy gradient. With two draws instead of many it is what `examples.recall.noise.signal_to_noise`
measures, twice, since the mean of two draws has half the variance of one.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name

from refine_verl.config import LossSettings
from refine_verl.workers.engine import RefineEngine
from refine_verl.workers.loss import RefineLoss
from refine_verl.workers.objective import Objective

POLICY_ALONE = LossSettings(rl_coef=1.0, sft_coef=0.0)
NEXT_TOKEN_ALONE = LossSettings(rl_coef=0.0, sft_coef=1.0)


def signal_of_halves(product: float, gap: float) -> float:
    """Signal to noise |E g|^2 / tr Cov g of the mean g of two independent halves; 0 where both are 0.

    Args:
        product: g_A . g_B.
        gap: |g_A - g_B|^2.

    Returns:
        An estimate with an unbiased numerator: where there is next to no signal it scatters around 0, and may be
        below it. Not finite where a gradient is not.
    """
    if gap > 0:
        return 4.0 * product / gap
    return 0.0 if product == 0 else math.inf


def measure_gradients(engine: RefineEngine, loss: RefineLoss, data: TensorDict, cosine: bool) -> dict[str, float]:
    """Metrics of this moment's policy gradient; weights, optimiser, schedule and random state stay as they are.

    Call on all ranks, outside of ``train_mode``. Needs memory for two more copies of this rank's gradients, and one
    forward and backward pass of the mini-batch; with ``cosine`` another copy, and another pass without its rollouts.

    Args:
        engine: its gradients are dropped, as after every update.
        loss: that of the run; its coefficients are not used.
        data: this rank's share of one mini-batch, all that its `Objective` asks for, ``loss_mask`` and
            ``micro_batch_size_per_gpu``; two rows or more.
        cosine: the angle to the next-token gradient of the same documents, too.

    Returns:
        ``nsp/gradient_snr`` (see `signal_of_halves`), of the whole mini-batch, and with ``cosine``
        ``nsp/gradient_cosine_ntp``. Left out where it is not finite.
    """
    even = len(data) // 2 * 2
    devices = [] if get_device_name() == "cpu" else [get_device_id()]
    with engine.train_mode(), torch.random.fork_rng(devices):
        first, second = (_gradient(engine, loss, POLICY_ALONE, data[start:even:2]) for start in (0, 1))
        one, other, product = _everywhere(engine, (first, first), (second, second), (first, second))
        # an odd share leaves a document out: of the whole there is as much less noise
        whole = len(data) / even
        measured = {"nsp/gradient_snr": whole * signal_of_halves(product, one + other - 2 * product)}
        if cosine:
            documents = data[:even]
            tu.assign_non_tensor(documents, objective=Objective.DOCUMENTS)
            plain = _gradient(engine, loss, NEXT_TOKEN_ALONE, documents)
            along, also, length = _everywhere(engine, (first, plain), (second, plain), (plain, plain))
            norms = (one + other + 2 * product) * length
            measured["nsp/gradient_cosine_ntp"] = (along + also) / math.sqrt(norms) if norms > 0 else 0.0
    return {name: value for name, value in measured.items() if math.isfinite(value)}


def _gradient(engine: RefineEngine, loss: RefineLoss, alone: LossSettings, rows: TensorDict) -> list[Tensor]:
    """This rank's shards of the gradient of one part of the loss, over the same rows of all ranks."""
    micro = int(tu.get(rows, "micro_batch_size_per_gpu"))
    tu.assign_non_tensor(rows, micro_batch_size_per_gpu=math.gcd(len(rows), micro))
    engine.optimizer_zero_grad()
    engine.forward_backward_batch(rows, dataclasses.replace(loss, settings=alone))
    shards = []
    for parameter in engine.module.parameters():
        if not parameter.requires_grad:
            continue
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradient = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        shards.append(gradient.detach().clone())
    return shards


def _everywhere(engine: RefineEngine, *pairs: tuple[list[Tensor], list[Tensor]]) -> list[float]:
    """The inner product of each pair of gradients, over the shards of all ranks."""
    products = [
        torch.stack([torch.sum(one * other, dtype=torch.float64) for one, other in zip(*pair, strict=True)]).sum()
        for pair in pairs
    ]
    sums = torch.stack(products)
    torch.distributed.all_reduce(sums, group=engine.get_data_parallel_group())
    found: list[float] = sums.tolist()
    return found
