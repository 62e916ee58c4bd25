"""Our models in lm-evaluation-harness, as model `refine`.

The harness scans no entry points: a process that wants the model imports this module first. `refine-lm-eval` is the
harness's own command line in such a process.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from typing import Any

# The built-in models enter the registry only while it is empty; without this import they would be gone.
import lm_eval.models  # noqa: F401
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from refine_verl.config import ConfigError, did_you_mean, require_choice
from refine_verl.evaluate.model import EvaluatedModel, Likelihood, find_model, load_evaluated, ttt_settings
from refine_verl.evaluate.served import ServedModel
from refine_verl.evaluate.shared import batches
from refine_verl.models.answers import answer_draws
from refine_verl.models.loading import DTYPES

logger = logging.getLogger(__name__)

GENERATION = ("until", "max_gen_toks", "do_sample", "temperature")
WINDOW = 2048
"""Tokens in a window of a rolling log-likelihood where neither `max_length` nor the model says otherwise (as `hf`)."""


@register_model("refine")
class RefineLM(TemplateLM):
    """A fast-weight model for lm-evaluation-harness: `--model refine --model_args pretrained=DIR`.

    Args:
        pretrained: directory or hub id, or a model that was opened before.
        adapter: directory of a LoRA adapter of the model.
        tokenizer, dtype, device: see `model.find_model` and `model.load_evaluated`.
        batch_size: requests read together.
        max_length: cut contexts to so many tokens from the left. None reads them whole, whatever the model was
            trained on: it has no window. Rolling log-likelihoods then take windows of `max_position_embeddings`
            tokens, as the harness's `hf` does, so that perplexities compare.
        max_gen_toks: most tokens to write where the task does not say.
        add_bos_token: passed to the tokenizer as `add_special_tokens`; None leaves it to the tokenizer.
        ttt: `none`, `sft` or `refine`: adapt to each context before what follows is scored or written.
        adapt: settings of that, a mapping or a YAML file (docs/adapt.md).
        seed: of sampled answers.

    Raises:
        ConfigError, ModelError, DataError: arguments, model or tokenizer that cannot be used.
    """

    def __init__(
        self,
        pretrained: str | EvaluatedModel | ServedModel = "",
        *,
        adapter: str | None = None,
        tokenizer: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        ttt: str = "none",
        adapt: Any = None,
        seed: int = 0,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            known = [*inspect.signature(RefineLM).parameters][:-1]
            raise ConfigError(name, f"unknown model argument. Allowed: {', '.join(known)}.{did_you_mean(name, known)}")
        require_choice("dtype", dtype, ("auto", *DTYPES))
        self.batch_size = _count("batch_size", batch_size)
        self.window = None if max_length is None else _count("max_length", max_length)
        self.max_gen_toks = _count("max_gen_toks", max_gen_toks)
        self.add_bos_token, self.seed = add_bos_token, seed
        settings = ttt_settings(ttt, adapt)
        self.evaluated: EvaluatedModel | ServedModel
        if isinstance(pretrained, EvaluatedModel | ServedModel):
            self.evaluated = pretrained
        elif pretrained:
            found = find_model(str(pretrained), tokenizer, key="pretrained", adapter=adapter)
            self.evaluated = load_evaluated(found, dtype=dtype, device=_available(device), ttt=settings)
        else:
            raise ConfigError("pretrained", "is missing: --model_args pretrained=DIR names the model.")
        self.tokenizer = self.evaluated.tokenizer
        self._device = self.evaluated.device

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        return int(self.evaluated.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        begin = self.evaluated.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def max_length(self) -> int:
        """Tokens in a window of a rolling log-likelihood."""
        return int(self.window or getattr(self.evaluated.config, "max_position_embeddings", None) or WINDOW)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches."""
        return str(self.evaluated.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; a BOS that the text begins with already is not added again."""
        chosen = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            chosen = False
        special = {} if chosen is None else {"add_special_tokens": chosen}
        return list(self.tokenizer.encode(string, **special))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1]) - len(requests[index][2]))
        pairs = [self._fit(requests[row][1], requests[row][2]) for row in order]
        # vLLM has a cache of its own for what contexts begin with
        share = isinstance(self.evaluated, EvaluatedModel) and self.evaluated.shares
        found: dict[int, tuple[float, bool]] = {}
        asked = read = 0
        with tqdm(total=len(order), desc="log-likelihoods", disable=disable_tqdm) as progress:
            for batch in batches([context for context, _ in pairs], self.batch_size, share=share):
                chosen = [pairs[place] for place in batch.rows]
                for place, result in zip(batch.rows, self._likelihoods(chosen, batch.shared), strict=True):
                    row = order[place]
                    found[row] = (result.log_prob, result.correct == result.tokens)
                    if requests[row][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[row][0], found[row])
                lengths = [len(context) + len(following) for context, following in chosen]
                asked, read = asked + sum(lengths), read + sum(batch.read(lengths))
                _tell(progress, len(chosen), read, asked)
        return [found[index] for index in range(len(requests))]

    def _likelihoods(self, pairs: list[tuple[list[int], list[int]]], shared: int) -> list[Likelihood]:
        if isinstance(self.evaluated, EvaluatedModel):
            return self.evaluated.likelihoods(pairs, shared=shared)
        return self.evaluated.likelihoods(pairs)

    def _fit(self, context: list[int], following: list[int]) -> tuple[list[int], list[int]]:
        """Cut to `max_length` tokens that are read, as `hf` does."""
        if self.window is None:
            return context, following
        if len(following) > self.window:
            raise ConfigError(
                "max_length", f"{self.window} is too short to score {len(following)} tokens after a context. Raise it."
            )
        return context[-max(self.window + 1 - len(following), 1) :], following

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of `max_length` tokens.

        Raises:
            ConfigError: test-time training was asked for: a text scored as a whole has no prompt to adapt to.
        """
        if self.evaluated.ttt.method != "none":
            raise ConfigError(
                "ttt", "a task that scores whole texts has no prompt to adapt to: run it with ttt=none (wikitext, ...)."
            )
        windows: list[Any] = []
        owners = []
        for number, request in enumerate(requests):
            parts = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for part in parts:  # without a string the harness's cache is left alone: a window is no request
                windows.append((None, *make_disjoint_window(part)))
                owners.append(number)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (value, _) in zip(owners, scores, strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, each from the state after its prompt, up to the first stop text."""
        jobs = []
        for index, request in enumerate(requests):
            text, given = request.args
            kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
            for name in kwargs.keys() - GENERATION:
                raise ConfigError(
                    name,
                    f"this generation argument is not supported by model 'refine'. Allowed: {', '.join(GENERATION)}.",
                )
            limit, ids = int(kwargs["max_gen_toks"]), self.tok_encode(text)
            ids = ids if self.window is None else ids[-max(self.window - limit, 1) :]
            end = self.tokenizer.decode([self.eot_token_id])
            stops = [stop for stop in handle_stop_sequences(kwargs["until"], eos=end) if stop]
            temperature = float(kwargs.get("temperature", 0.0)) if kwargs.get("do_sample") else 0.0
            jobs.append((index, ids or [self.prefix_token_id], limit, tuple(stops), temperature))
        found: dict[int, str] = {}
        asked = read = 0
        jobs.sort(key=lambda job: (job[3], job[4], -len(job[1])))
        with tqdm(total=len(jobs), desc="answers", disable=disable_tqdm) as progress:
            for _, same in itertools.groupby(jobs, key=lambda job: job[3:]):
                alike, share = list(same), self.evaluated.shares
                for batch in batches([job[1] for job in alike], self.batch_size, share=share):
                    chosen = [alike[row] for row in batch.rows]
                    for (index, *_), answer in zip(chosen, self._answers(chosen, batch.shared), strict=True):
                        found[index] = answer
                        self.cache_hook.add_partial("generate_until", requests[index].args, answer)
                    lengths = [len(job[1]) for job in chosen]
                    asked, read = asked + sum(lengths), read + sum(batch.read(lengths))
                    _tell(progress, len(chosen), read, asked)
        return [found[index] for index in range(len(requests))]

    def _answers(self, batch: list[tuple[int, list[int], int, tuple[str, ...], float]], shared: int) -> list[str]:
        rows, prompts, limits, (stops, *_), (temperature, *_) = zip(*batch, strict=True)
        draws = answer_draws(self.seed, 0, list(rows), 1, max(limits)).squeeze(1) if temperature > 0 else None
        return self.evaluated.write(prompts, limits, stops=stops, temperature=temperature, draws=draws, shared=shared)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as a prompt."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)


def _tell(progress: Any, requests: int, read: int, asked: int) -> None:
    """More requests are done; how many tokens of theirs were read so far, where contexts were shared."""
    if read < asked:
        progress.set_postfix_str(f"{read:,} of {asked:,} prompt tokens read", refresh=False)
    progress.update(requests)


def _available(device: str | None) -> str:
    """The harness asks for `cuda:0` where its user asked for nothing."""
    if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
        if device is not None:
            logger.warning("no GPU here: %s becomes cpu", device)
        return "auto"
    return device


def _count(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise ConfigError(name, f"must be an integer of at least 1, got {value!r}.")
    return number
