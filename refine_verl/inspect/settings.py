"""The command's keys, checked like a recipe's before torch is loaded or a file is read."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from refine_verl.config import (
    ConfigError,
    NSPSettings,
    RefineSettings,
    Settings,
    is_made_of_documents,
    option,
)

STDIN = "-"
ROLLOUTS = 4
"""n where it is not given: a recipe's 1 shows little of what a model might say; the paper's Table F.1 shows 4."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectSettings(Settings):
    """What to look at and how; `nsp` has the names and meanings it has in a recipe."""

    SECTION: ClassVar[str] = "inspect"

    model: str = option(
        dataclasses.MISSING, "directory or hub id of a Hugging Face checkpoint with weights", empty=False
    )
    text: str = option(dataclasses.MISSING, "a UTF-8 text file, or - for standard input")
    out: str | None = option(None, "the HTML page to write; without it only the terminal shows the result")
    adapter: str | None = option(None, "directory of a LoRA adapter of the model, as PEFT writes one", empty=False)
    tokenizer: str | None = option(None, "directory or hub id, or bytes; null: the model's own", empty=False)
    external_lib: str | None = option(None, "package to import first: one that registers a model and its adapter")
    max_length: int = option(16384, "tokens that are read; what follows is left out", at_least=2)
    seed: int = option(0, "of positions and rollouts", at_least=0)
    norm_adv_by_std_in_grpo: bool = option(True, "divide advantages by their group's standard deviation", paper="true")
    nsp: NSPSettings = dataclasses.field(default_factory=lambda: NSPSettings(rollouts_per_position=ROLLOUTS))

    def _check_rules(self) -> None:
        if self.seed >= 2**63:
            raise ConfigError("seed", f"must be below 2**63, got {self.seed}.")
        if self.tokenizer is not None and is_made_of_documents(self.tokenizer):
            raise ConfigError(
                "tokenizer",
                f"{self.tokenizer} would be trained on a run's own documents. Give the directory of the model it was "
                "saved with, a hub id, or bytes.",
            )
        if self.nsp.grad_scope != "full":
            raise ConfigError("refine.nsp.grad_scope", "has no effect here, where nothing is trained: leave it out.")
        RefineSettings(nsp=self.nsp)  # the rules of groups and of a single rollout
