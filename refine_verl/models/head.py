"""The LM head, evaluated in chunks: logits of all tokens of a document never exist at the same time.

Those of a rollout's k tokens do, where their log-probabilities are trained; there are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from refine_verl.models.packing import IGNORED
from refine_verl.nsp.entropy import accumulation_dtype, chunked_entropy, entropy_from_logits
from refine_verl.nsp.objective import gather_log_probs
from refine_verl.nsp.sampling import without


def chunk_elements(device_type: str) -> int:
    """Logits held at once.

    On a CPU 16 MiB in float32: more leave the cache and are mapped anew by every malloc. Elsewhere 512 MiB: 16,384
    tokens and 32,000 words are four chunks, where a CPU's 125 would be launches of small kernels.
    """
    return 1 << 22 if device_type == "cpu" else 1 << 27


class FusedHead(nn.Linear):
    """An ``nn.Linear`` LM head whose forward pass can do more than return logits.

    Everything that needs the weight happens inside ``forward``, because FSDP2 gathers the shards of a module
    only while its forward pass runs. Put in place by swapping the class of a model's own head, so parameter
    names stay as they are.
    """

    def forward(self, input: Tensor, task: str = "logits", **kwargs: Any) -> Any:
        """Args:
        input: [L, d] hidden states after the final norm (any leading dimensions for ``logits``).
        task: ``logits``; ``entropy`` -> [L] entropy of each prediction, no gradient (Eq. 5);
            ``cross_entropy`` (targets [L]) -> scalar sum over targets that are not IGNORED (Eq. 2); with
            ``with_entropy`` also the [L] entropies, from the same logits;
            ``score`` (targets [L]) -> per token negative log-likelihood [L] and whether the argmax is right
            [L], no gradient; ``log_probs`` (targets [L], temperature, forbidden, chunked) -> [L]
            log-probabilities among all tokens but the ``forbidden``; ``chunked`` computes logits again in the
            backward pass instead of keeping them.
        """
        if task == "logits":
            return super().forward(input)
        return getattr(self, f"_{task}")(input, **kwargs)

    def _rows(self) -> int:
        return max(1, chunk_elements(self.weight.device.type) // self.out_features)

    def _entropy(self, hidden: Tensor) -> Tensor:
        return chunked_entropy(hidden, super().forward, self._rows())

    def _cross_entropy(
        self, hidden: Tensor, targets: Tensor, with_entropy: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
        entropy = hidden.new_empty(len(hidden), dtype=accumulation_dtype(hidden)) if with_entropy else None
        loss = _LinearCrossEntropy.apply(
            hidden, self.weight, self.bias, targets, self._rows(), dtype or hidden.dtype, entropy
        )
        return cast(Tensor, loss) if entropy is None else (cast(Tensor, loss), entropy)

    @torch.no_grad()
    def _score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses, correct = [], []
        for rows, wanted in zip(hidden.split(self._rows()), targets.split(self._rows()), strict=True):
            logits = super().forward(rows)
            logits = logits.to(accumulation_dtype(logits))
            losses.append(F.cross_entropy(logits, wanted, reduction="none", ignore_index=IGNORED))
            correct.append(logits.argmax(dim=-1) == wanted)
        return torch.cat(losses), torch.cat(correct)

    def _log_probs(
        self,
        hidden: Tensor,
        targets: Tensor,
        temperature: float = 1.0,
        forbidden: Sequence[int] = (),
        chunked: bool = False,
    ) -> Tensor:
        if chunked and len(hidden) > self._rows():
            chunks = zip(hidden.split(self._rows()), targets.split(self._rows()), strict=True)
            options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            parts = [checkpoint(self._log_probs, *chunk, temperature, forbidden, **options) for chunk in chunks]
            return torch.cat(parts)
        # a copy: FSDP2 hooks the outputs of its modules and must not be handed a view
        return gather_log_probs(without(super().forward(hidden), forbidden), targets, temperature).clone()


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of ``hidden @ weight.T``, chunk by chunk.

    The gradient of a chunk only needs its own logits, so it is taken while they are at hand: nothing of size
    [L, V] is kept and no logits are computed twice. Gradients of the weight are summed in float32 (float64 in
    a float64 model) whatever the dtype of the matmuls is. ``entropy`` [L], if given, is filled on the way.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: int,
        dtype: torch.dtype,
        entropy: Tensor | None,
    ) -> Tensor:
        sums = accumulation_dtype(hidden)
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=sums) if want_weight else None
        grad_bias = torch.zeros_like(bias, dtype=sums) if want_bias and bias is not None else None
        loss = torch.zeros((), dtype=sums, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            offset = None if bias is None else bias.to(dtype)
            for start in range(0, hidden.shape[0], rows):
                part, wanted = hidden[start : start + rows].to(dtype), targets[start : start + rows]
                logits = F.linear(part, matrix, offset).to(sums)
                loss += F.cross_entropy(logits, wanted, reduction="sum", ignore_index=IGNORED)
                if entropy is not None:
                    entropy[start : start + rows] = entropy_from_logits(logits)
                if not (want_hidden or want_weight or want_bias):
                    continue
                grad = _logit_gradient(logits, wanted).to(dtype)
                # ignored rows have none: cheaper to say here than in the logits, or than to ask whether there are any
                counted = (wanted != IGNORED)[:, None]
                if grad_hidden is not None:
                    grad_hidden[start : start + rows] = (grad @ matrix) * counted
                if grad_weight is not None:
                    grad_weight += grad.t() @ (part * counted)
                if grad_bias is not None:
                    grad_bias += (grad * counted).sum(dim=0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else grad_hidden * grad_output.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_output).to(weight_dtype),
            None if grad_bias is None else (grad_bias * grad_output).to(bias_dtype),
            None,
            None,
            None,
            None,
        )


def _logit_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """d(sum of cross-entropies)/d(logits) = softmax - onehot; of ignored rows anything."""
    grad = torch.softmax(logits, dim=-1)
    grad[torch.arange(len(targets), device=targets.device), targets.clamp(min=0)] -= 1
    return grad
