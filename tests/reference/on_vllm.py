"""vLLM beside this package: small models, engines in this process, log-probabilities of both.

An engine in this process saves the ten seconds and more that each process of vLLM takes to import.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

VOCABULARY = 500
COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "vocab_size": VOCABULARY,
    "intermediate_size": 256,
    # large enough that tokens are predicted with some confidence, and that a wrong layer is seen
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MODELS: dict[str, dict[str, Any]] = {
    "gated": {"model_type": "gated_deltanet", "num_heads": 2, "head_dim": 64, "expand_v": 1},
    "gated_grouped": {
        **{"model_type": "gated_deltanet", "num_heads": 2, "num_v_heads": 4, "head_dim": 64, "expand_v": 1},
        **{"use_gate": False},
    },
    "gated_sigmoid": {
        **{"model_type": "gated_deltanet", "num_heads": 1, "head_dim": 128, "expand_v": 1},
        **{"output_gate_activation": "sigmoid"},
    },
    "delta": {"model_type": "delta_net", "num_heads": 2},
    "delta_gate_tied": {"model_type": "delta_net", "num_heads": 2, "use_gate": True, "tie_word_embeddings": True},
}
PROMPT_LENGTHS = (5, 37, 130, 200)
ANSWER_TOKENS = 24


@dataclass(frozen=True)
class Answer:
    """A prompt, vLLM's greedy answer, log-probabilities [T - 1] of all tokens but the first, and cached tokens."""

    tokens: list[int]
    prompt_length: int
    log_probs: Tensor
    cached: int


Serve = Callable[..., list[list[Answer]]]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def write_model(directory: Path, *, seed: int = 3, **config: Any) -> Path:
    """A random model in float32, as `save_pretrained` writes it."""
    from transformers import AutoConfig

    from refine_verl.models.loading import load_model

    values = COMMON | config
    model = load_model(None, config=AutoConfig.for_model(values.pop("model_type"), **values), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # initialised as a constant, which would hide that it is lost
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
    model.save_pretrained(directory)
    return directory


class engine:
    """An engine in this process, gone at the end of the block."""

    def __init__(self, directory: Path, **arguments: Any) -> None:
        defaults = {"max_model_len": 512, "max_num_seqs": 8, "gpu_memory_utilization": 0.1, "enforce_eager": True}
        executor = {"distributed_executor_backend": "uni", "skip_tokenizer_init": True}
        self.arguments = {"model": str(directory), **defaults, **executor, **arguments}

    def __enter__(self) -> Any:
        from vllm import LLM

        self.llm = LLM(**self.arguments)
        return self.llm

    def __exit__(self, *_: object) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()


def write_lora(directory: Path, base: Path, *, seed: int) -> Path:
    """A random adapter for every linear layer of a model that can have one, with effects as large as the weights'."""
    from refine_verl.config import LoraSettings
    from refine_verl.models.loading import load_model
    from refine_verl.models.lora import adapter_parameters, add_adapters, base_fingerprint, write_adapter

    model = load_model(base)
    fingerprint = base_fingerprint(model)
    add_adapters(model, LoraSettings(lora_rank=4, lora_alpha=12), seed=seed, base=str(base))
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model).values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return write_adapter(directory, model, fingerprint)


def adapted(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with its adapter, unmerged."""
    from refine_verl.models.loading import load_model
    from refine_verl.models.lora import apply_adapter, open_adapter

    model: nn.Module = load_model(base, dtype=dtype)
    apply_adapter(model, open_adapter(adapter))
    return model


def generate(
    llm: Any, batch: list[list[int]], log_probs_of_prompts: bool = True, lora_request: Any = None
) -> list[Answer]:
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        logprobs=0,
        # asked for these, vLLM reads the whole prompt and leaves what is cached
        prompt_logprobs=0 if log_probs_of_prompts else None,
        detokenize=False,
        ignore_eos=True,
    )
    asked = [{"prompt_token_ids": prompt} for prompt in batch]
    outputs = llm.generate(asked, parameters, use_tqdm=False, lora_request=lora_request)
    found = []
    for prompt, output in zip(batch, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        read = list(zip(output.prompt_logprobs[1:], prompt[1:], strict=True)) if log_probs_of_prompts else []
        written = zip(output.outputs[0].logprobs, tokens, strict=True)
        values = [choices[token].logprob for choices, token in [*read, *written]]
        found.append(Answer(prompt + tokens, len(prompt), torch.tensor(values), output.num_cached_tokens or 0))
    return found


def teacher_forced(model: nn.Module, tokens: list[int]) -> Tensor:
    """This package's log-probabilities [T - 1] of all tokens but the first, in float32."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def gap(answers: list[Answer], model: nn.Module, part: str = "all") -> float:
    """Mean |difference| of log-probabilities between vLLM and a model, over ``all`` tokens, or ``written`` ones."""
    differences = []
    for answer in answers:
        ours = teacher_forced(model, answer.tokens)[-len(answer.log_probs) :]
        difference = (answer.log_probs - ours).abs()
        differences.append(difference[-ANSWER_TOKENS:] if part == "written" else difference)
    return float(torch.cat(differences).mean())
