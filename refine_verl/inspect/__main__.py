"""`python -m refine_verl.inspect model=DIR text=FILE [out=page.html] [key=value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from refine_verl.command.front import run_command
from refine_verl.command.keys import list_keys, read_keys
from refine_verl.command.show import console
from refine_verl.inspect.settings import InspectSettings

USAGE = """\
python -m refine_verl.inspect model=DIR text=FILE [out=page.html] [KEY=VALUE ...]

Where REFINE would look in a text and what it would say: entropy of every token, chunk borders, chosen positions, and at
each of them the true continuation and rollouts with rewards and advantages. On the CPU or one GPU, without Ray.

  python -m refine_verl.inspect model=outputs/refine_verl/quickstart/model text=story.txt out=story.html
  cat story.txt | python -m refine_verl.inspect model=DIR text=- refine.nsp.chunks=4 refine.nsp.reward=hybrid

Keys:
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(
        arguments, help=_help, run=_run, typed_as={"model.path": "model", "model.tokenizer": "tokenizer"}
    )


def _help(_: list[str]) -> str:
    return USAGE + list_keys(InspectSettings, without=["refine.nsp.grad_scope"])  # nothing is trained here


def _run(arguments: list[str]) -> None:
    settings, _ = read_keys(arguments, InspectSettings)
    from refine_verl.inspect.command import run  # torch and transformers take seconds to load

    run(settings, console())


if __name__ == "__main__":
    sys.exit(main())
