"""`python -m refine_verl.evaluate model=DIR tasks=... out=DIR` and `python -m refine_verl.evaluate compare RUN RUN`."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as RichTable

from refine_verl.command.quiet import quieten_third_parties
from refine_verl.config import ConfigError, DataError
from refine_verl.evaluate.settings import GROUPS, EvaluateSettings, read_arguments

BAD_INPUT, INTERRUPTED = 2, 130


def usage() -> str:
    """What `--help` says: every key with its default and meaning."""
    keys = []
    for field in dataclasses.fields(EvaluateSettings):
        default = field.default
        if callable(field.default_factory):
            default = ",".join(map(str, field.default_factory()))
        shown = "null" if default is None else default
        choices = f" ({', '.join(field.metadata['choices'])})" if field.metadata.get("choices") else ""
        keys.append(f"  {field.name}={shown}".ljust(28) + f" {field.metadata['help']}{choices}")
    return "\n".join(
        [
            "python -m refine_verl.evaluate model=DIR tasks=TASK,... out=DIR [KEY=VALUE ...]",
            "python -m refine_verl.evaluate compare RUN RUN ...",
            "",
            f"Tasks: {', '.join(GROUPS)}, or single ones of their tasks (docs/evaluation.md).",
            "Interrupted? Give the same command again: finished samples are not asked again.",
            "",
            *keys,
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 on success, 2 where arguments, data or model are refused, 130 where interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print_text(usage())
        return 0 if given else BAD_INPUT
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    quieten_third_parties()
    # Prompts are as long as they are: the tokenizer's warning about its model's context means nothing here.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    try:
        _run(given)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; give the same command again to go on\n")
        return INTERRUPTED
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return BAD_INPUT
    except ValueError as error:  # ConfigError and its siblings; others are ours to repair
        if not isinstance(error, _refusals()):
            raise
        sys.stderr.write(f"error: {str(error).removeprefix('evaluate.').lstrip(': ')}\n")
        return BAD_INPUT
    return 0


def print_text(text: str) -> None:
    """The command's deliberate output."""
    Console(width=None if sys.stdout.isatty() else 200).print(text, markup=False, highlight=False, soft_wrap=True)


def _run(given: list[str]) -> None:
    if given[0] == "compare":
        from refine_verl.evaluate.compare import compare

        tables = compare(given[1:])
        notes = tables.notes
        shown = tables.tables
    else:
        settings = read_arguments(given)  # before torch is imported: a typo is answered at once
        from refine_verl.evaluate.run import evaluate

        shown = evaluate(settings)
        notes = [f"Results: {settings.out}/results.json, results.md, samples/"]
    console = Console(width=None if sys.stdout.isatty() else 200)
    for table in shown:
        drawn = RichTable(title=table.title, title_justify="left")
        for number, column in enumerate(table.header):
            drawn.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn, markup=False, highlight=False)
        for note in table.notes:
            print_text(note)
    for note in notes:
        print_text(note)


def _refusals() -> tuple[type[Exception], ...]:
    if "torch" not in sys.modules:
        return (ConfigError,)
    from refine_verl.adaptation import PromptError
    from refine_verl.models import ModelError
    from refine_verl.scoring import MetricError

    return (ConfigError, DataError, MetricError, ModelError, PromptError)


if __name__ == "__main__":
    sys.exit(main())
