"""The command line: `python -m refine_verl.remember COMMAND --help` explains each command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from refine_verl.command.front import run_command
from refine_verl.command.keys import list_keys, read_command
from refine_verl.config import Settings
from refine_verl.remember.settings import AskSettings, ListSettings, ReadSettings

COMMANDS: dict[str, type[Settings]] = {"read": ReadSettings, "ask": AskSettings, "list": ListSettings}
TYPED_AS = {
    "data.train_files": "files",
    "data.text_key": "text_key",
    "model.path": "model",
    "model.tokenizer": "tokenizer",
}
USAGE = """\
python -m refine_verl.remember COMMAND KEY=VALUE ...      (or --KEY VALUE)

Documents as states of a fast-weight model: each is read once, and asked as often as you like.

  read    read files; interrupted, or with more files, the same command resumes
  ask     answer questions about them without reading them again
  list    what has been read

  python -m refine_verl.remember read model=DIR files=reports out=states
  python -m refine_verl.remember ask model=DIR memory=states question='Who wrote this?'

python -m refine_verl.remember COMMAND --help lists the keys of a command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(arguments, help=_help, run=_run, keeps_work=True, typed_as=TYPED_AS)


def _help(arguments: list[str]) -> str:
    name = next((word for word in arguments if word in COMMANDS), None)
    if name is None:
        return USAGE
    return f"python -m refine_verl.remember {name} KEY=VALUE ...      (or --KEY VALUE)\n\n{list_keys(COMMANDS[name])}"


def _run(arguments: list[str]) -> None:
    name, settings = read_command(arguments, COMMANDS)
    from refine_verl.remember import command  # torch and transformers take seconds to load

    command.RUN[name](settings)


if __name__ == "__main__":
    sys.exit(main())
