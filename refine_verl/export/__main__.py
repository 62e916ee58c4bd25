"""`python -m refine_verl.export adapter=DIR out=DIR [model=DIR]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from refine_verl.command.front import run_command, show
from refine_verl.command.keys import list_keys, read_keys
from refine_verl.export.settings import ExportSettings

USAGE = """\
python -m refine_verl.export adapter=DIR out=DIR [KEY=VALUE ...]      (or --KEY VALUE)

A LoRA adapter merged into its model, by PEFT: a model directory with tokenizer that every command takes, and vLLM.

  python -m refine_verl.export adapter=outputs/refine_verl/midtrain/adapter out=merged

Keys:
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(
        arguments, help=lambda _: USAGE + list_keys(ExportSettings), run=_run, typed_as={"model.path": "model"}
    )


def _run(arguments: list[str]) -> None:
    settings, _ = read_keys(arguments, ExportSettings)
    from refine_verl.export.merging import export  # torch and transformers take seconds to load

    out = export(settings)
    show(f"{out}: {settings.adapter} merged into its model, for AutoModelForCausalLM.from_pretrained")


if __name__ == "__main__":
    sys.exit(main())
