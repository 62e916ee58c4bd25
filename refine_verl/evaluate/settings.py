"""Keys of `python -m refine_verl.evaluate`, and which tasks there are. Loads no torch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any, ClassVar

from refine_verl.config import CONVENTIONS, INNER, ConfigError, Settings, option, require_choice
from refine_verl.config.sections import ENGINES

_GIVEN = dataclasses.MISSING

NIAH = {
    "niah_single_1": "S-NIAH",
    "niah_multikey_1": "MK-NIAH",
    "niah_multiquery": "MQ-NIAH",
    "niah_multivalue": "MV-NIAH",
}
RULER_QA = {"ruler_squadqa": "SQuADQA", "ruler_hotpotqa": "HotpotQA"}
LONGBENCH = {
    "narrativeqa": "NQ",
    "qasper": "QR",
    "multifieldqa_en": "MF",
    "hotpotqa": "HP",
    "2wikimqa": "2W",
    "qmsum": "QM",
    "multi_news": "MN",
    "samsum": "SS",
    "trec": "TC",
    "triviaqa": "TQ",
    "lcc": "LC",
    "repobench-p": "RP",
}
LABELS = {**NIAH, **RULER_QA, **LONGBENCH}
"""What the paper's tables call tasks, in the order of their columns."""
SHORT_COLUMNS = (
    ("wikitext", "word_perplexity", "Wiki ppl"),
    ("lambada_openai", "perplexity", "LMB ppl"),
    ("fda", "contains", "FDA recall"),
    ("swde", "contains", "SWDE recall"),
    ("lambada_openai", "acc", "LMB acc"),
    ("piqa", "acc", "PIQA acc"),
    ("hellaswag", "acc_norm", "Hella acc_n"),
    ("winogrande", "acc", "Wino acc"),
    ("arc_easy", "acc", "ARC-e acc"),
    ("arc_challenge", "acc_norm", "ARC-c acc_n"),
)
"""Task, metric and name of each column of Table E.1."""
GROUPS: dict[str, tuple[str, ...]] = {
    "ruler_niah": tuple(NIAH),
    "ruler_qa": tuple(RULER_QA),
    "longbench": tuple(LONGBENCH),
    "short_context": tuple(dict.fromkeys(task for task, *_ in SHORT_COLUMNS)),
    "ntp": ("ntp",),
}
"""What `tasks=` takes: groups, or single ones of their tasks."""
OTHERS: dict[str, tuple[str, ...]] = {
    "ruler_niah": ("niah_single_2", "niah_single_3", "niah_multikey_2", "niah_multikey_3"),
    "longbench": ("musique", "gov_report"),
}
"""Tasks that belong to a group but are not in the paper's tables; by name only."""
ADAPTS = ("ruler_niah", "ruler_qa", "longbench")
"""Groups whose samples have a prompt to adapt to."""
OF_VLLM = ("max_model_len", "gpu_memory_utilization")
"""Keys that mean something to vLLM only."""
USED_BY: dict[str, tuple[str, ...]] = {
    "convention": ("ruler_qa", "longbench"),
    "lengths": ("ruler_qa", "ruler_niah", "longbench", "ntp"),
    "seed": ("ruler_niah",),
    "niah_samples": ("ruler_niah",),
    "share_contexts": ADAPTS,
}
"""Keys that mean something to some groups only."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Settings):
    """What to evaluate on what. Field names are the keys of the command line.

    Raises:
        ConfigError: a value that cannot be used, or two that do not go together.
    """

    SECTION: ClassVar[str] = "evaluate"

    model: str = option(_GIVEN, "directory or hub id of the model", empty=False)
    tasks: tuple[str, ...] = option(_GIVEN, "groups of tasks, or single tasks of them")
    out: str = option(_GIVEN, "directory for results; the same command resumes where it was")
    data_dir: str = option("", "directory with the data (docs/evaluation.md says which files)")
    lengths: tuple[int, ...] = option(
        (4096, 8192, 16384), "context lengths of RULER and ntp, in tokens; the last limits LongBench"
    )
    ttt: str = option("none", "adapt to each prompt before it is answered", choices=INNER)
    adapt: dict | str | None = option(None, "settings of test-time training or a YAML file of them; null: the paper's")
    convention: str = option("paper", "how answers of RULER QA and LongBench are scored", choices=CONVENTIONS)
    engine: str = option("own", "what runs the model: this package, or vLLM (docs/vllm.md)", choices=ENGINES)
    max_model_len: int | None = option(
        None, "of vLLM: most tokens of a prompt with its answer; null: as many as the samples need", at_least=2
    )
    gpu_memory_utilization: float | None = option(
        None,
        "of vLLM: share of the device's memory for weights and states; null: its default, on a CPU a quarter of "
        "what is free",
        above=0,
    )
    limit: int | None = option(None, "samples per task and length, the first ones; null: all", at_least=1)
    batch_size: int = option(
        8, "samples read and continued together; with test-time training one at a time", at_least=1
    )
    share_contexts: bool = option(
        True, "read a context that several prompts of a task begin with once; false: with every prompt"
    )
    adapter: str | None = option(None, "directory of a LoRA adapter of the model, as PEFT writes one", empty=False)
    tokenizer: str | None = option(None, "directory or hub id, or bytes; null: the model's", empty=False)
    seed: int = option(0, "of the needles that are made", at_least=0)
    niah_samples: int = option(500, "needles that are made per task and length", at_least=1)
    dtype: str = option("auto", "of the weights", choices=("auto", "float32", "bfloat16"))
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    def _check_rules(self) -> None:
        if not self.lengths or any(isinstance(n, bool) or not isinstance(n, int) or n < 2 for n in self.lengths):
            shown = ",".join(map(str, self.lengths))
            raise ConfigError(
                f"{self.SECTION}.lengths", f"must be a list of integers of at least 2, got {shown or 'none'}."
            )
        if len(set(self.lengths)) < len(self.lengths):
            raise ConfigError(f"{self.SECTION}.lengths", f"has a length twice: {self.lengths}.")
        object.__setattr__(self, "lengths", tuple(sorted(self.lengths)))
        known = dict.fromkeys(itertools.chain(GROUPS, *GROUPS.values(), *OTHERS.values()))
        for name in self.tasks:
            require_choice(f"{self.SECTION}.tasks", name, known, kind="task")
        if self.gpu_memory_utilization is not None and self.gpu_memory_utilization > 1:
            raise ConfigError(
                f"{self.SECTION}.gpu_memory_utilization",
                f"is a share of the memory and must be at most 1, got {self.gpu_memory_utilization}.",
            )
        if self.engine == "vllm":
            self._check_vllm()
        without = [group for group in self.by_group() if group not in ADAPTS]
        if self.ttt != "none" and without:
            raise ConfigError(
                f"{self.SECTION}.ttt",
                f"={self.ttt} needs a prompt to adapt to, and the samples of {', '.join(without)} have none (what is "
                f"scored is the text itself, or too short). Run {', '.join(without)} with ttt=none.",
            )

    def _check_vllm(self) -> None:
        if self.ttt != "none":
            raise ConfigError(
                f"{self.SECTION}.engine",
                f"=vllm serves weights as they are, and ttt={self.ttt} adapts them to each prompt. Leave one out.",
            )
        if self.device != "auto":
            raise ConfigError(
                f"{self.SECTION}.device",
                f"={self.device} has no effect with engine=vllm: vLLM runs on what it was built for, on the first GPU "
                "that CUDA_VISIBLE_DEVICES names. Leave it out.",
            )

    def by_group(self) -> dict[str, list[str]]:
        """The single tasks asked for by group, in the order of the paper's tables."""
        found = {}
        for group, tasks in GROUPS.items():
            members = [*tasks, *OTHERS.get(group, ())]
            chosen = [task for task in members if task in self.tasks or (group in self.tasks and task in tasks)]
            if chosen:
                found[group] = chosen
        return found

    def refuse_without_effect(self, arguments: Iterable[str]) -> None:
        """Refuse a key on the command line that means nothing to the tasks asked for.

        Raises:
            ConfigError: names the key and the tasks it is about.
        """
        for key in (word.removeprefix("--").partition("=")[0].replace("-", "_") for word in arguments):
            if key == "share_contexts" and self.ttt != "none":
                raise ConfigError(
                    key, f"has no effect with ttt={self.ttt}: weights are adapted to each prompt. Leave it out."
                )
            if key in OF_VLLM and self.engine != "vllm":
                raise ConfigError(key, f"has no effect with engine={self.engine}: it is about vLLM. Leave it out.")
            if not self.uses(key):
                raise ConfigError(
                    key, f"has no effect on these tasks: it is about {' and '.join(USED_BY[key])}. Leave it out."
                )

    def shares(self, group: str) -> bool:
        """Whether prompts of a group may share what is read; adapted weights are those of one prompt alone."""
        return self.share_contexts and group in ADAPTS and self.ttt == "none"

    def uses(self, key: str) -> bool:
        """Whether a key means something to one of the tasks asked for."""
        return key not in USED_BY or any(group in self.by_group() for group in USED_BY[key])

    def selection(self, group: str) -> dict[str, Any]:
        """What decides which samples of a group are asked, of all that its files hold."""
        own: dict[str, dict[str, Any]] = {
            "ruler_niah": {"niah_samples": self.niah_samples, "seed": self.seed},
            "longbench": {"max_tokens": self.lengths[-1]},
        }
        return {"limit": self.limit, **own.get(group, {})}
