"""`python -m refine_verl.inspect model=DIR text=FILE [out=page.html] [key=value ...]`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from rich.console import Console

from refine_verl.command.quiet import quieten_third_parties
from refine_verl.config import ConfigError, DataError, NSPSettings, list_settings
from refine_verl.inspect.settings import NSP_PREFIX, InspectSettings, read_arguments

BAD_INPUT, INTERRUPTED = 2, 130
PIPE_WIDTH = 160  # a pipe has no width of its own

USAGE = """\
python -m refine_verl.inspect model=DIR text=FILE [out=page.html] [KEY=VALUE ...]

Where REFINE would look in a text and what it would say: entropy of every token, chunk borders, chosen positions, and at
each of them the true continuation and rollouts with rewards and advantages. On the CPU or one GPU, without Ray.

  python -m refine_verl.inspect model=outputs/refine_verl/quickstart/model text=story.txt out=story.html
  cat story.txt | python -m refine_verl.inspect model=DIR text=- refine.nsp.chunks=4 refine.nsp.reward=hybrid

"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 shown, 2 keys, text or model that cannot be used (nothing is written then), 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(given):
        Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(_help(), markup=False, highlight=False)
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # a text is as long as it is: the tokenizer's warning about its model's context means nothing here
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    try:
        settings = read_arguments(given)
        _run(settings)
    except (ConfigError, OSError) as error:
        return _refuse(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except ValueError as error:
        from refine_verl.models import ModelError

        if not isinstance(error, (DataError, ModelError)):
            raise
        return _refuse(error)
    return 0


def _run(settings: InspectSettings) -> None:
    quieten_third_parties()
    # imported here: --help and a mistyped key should not wait for torch
    from refine_verl.inspect.command import run

    run(settings, Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False))


def _refuse(error: Exception) -> int:
    Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
    return BAD_INPUT


def _help() -> str:

    lines = [USAGE.rstrip(), "", "keys:"]
    for info in list_settings(InspectSettings, NSPSettings):
        key = info.key.removeprefix("inspect.")
        if key == f"{NSP_PREFIX}grad_scope":
            continue
        default = (
            InspectSettings(model="-", text="-").nsp.rollouts_per_position
            if key.endswith("per_position")
            else info.default
        )
        shown = "" if default == "" else f" [{'null' if default is None else default}]"
        lines.append(f"  {key:<34} {info.help}{shown}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
