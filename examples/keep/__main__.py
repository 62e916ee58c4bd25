"""What is kept of a document: read again, a state, an adapter by SFT or REFINE, or a state and an adapter.

python -m examples.keep --fast                                    # the miniature in two minutes
python -m examples.keep                                           # five seeds: its part of docs/results.md
python -m examples.keep model=DIR data=FILE out=DIR               # a model of yours on RULER's or LongBench's files
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.keep.settings import FileSettings, MiniatureSettings
from refine_verl.command.front import run_command, show
from refine_verl.command.keys import list_keys, read_keys

TYPED_AS = {
    "data.val_files": "data",
    "data.task": "task",
    "model.path": "model",
    "model.tokenizer": "tokenizer",
}
OF_FILES = ("model", "data")
"""Keys that ask for the command on files."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(arguments, help=_help, run=_run, keeps_work=True, typed_as=TYPED_AS)


def _help(_: list[str]) -> str:
    return (
        f"{__doc__}\nInterrupted? Give the same command again: what is finished is not done again.\n\n"
        f"The miniature:\n{list_keys(MiniatureSettings)}\n\nWith model= and data=:\n{list_keys(FileSettings)}"
    )


def _run(given: list[str]) -> None:
    if any(word.removeprefix("--").partition("=")[0] in OF_FILES for word in given):
        settings, _ = read_keys(given, FileSettings)
        from examples.keep.files import run

        show(run(settings))
    else:
        miniature(read_keys(given, MiniatureSettings)[0])


def miniature(settings: MiniatureSettings) -> None:
    """Run the plan, then make the page with its figures."""
    import torch

    from examples.keep.plan import PLANS, collect

    torch.set_num_threads(settings.threads)
    logging.getLogger("refine_verl").setLevel(logging.ERROR)  # random weights are meant here
    out = Path(settings.out or ("outputs/keep_fast" if settings.fast else "outputs/keep")).expanduser()
    collect(PLANS["fast" if settings.fast else "full"], out)
    show(str(publish(out, whole=not settings.fast)))


def publish(out: Path, whole: bool) -> Path:
    """Make the page: of a whole full run the project's, else one in ``out``."""
    from examples.miniature.results import ROOT, assemble, project_sources

    if not whole:
        return assemble({"keep": out / "results.json"}, out)
    project_sources()["keep"].write_bytes((out / "results.json").read_bytes())
    return assemble(project_sources(), ROOT / "docs")


if __name__ == "__main__":
    sys.exit(main())
