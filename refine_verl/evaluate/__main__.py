"""`python -m refine_verl.evaluate model=DIR tasks=... out=DIR` and `python -m refine_verl.evaluate compare RUN RUN`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from refine_verl.command.front import run_command, show
from refine_verl.command.keys import list_keys, read_keys
from refine_verl.command.show import show_table
from refine_verl.config import Settings
from refine_verl.evaluate.settings import GROUPS, EvaluateSettings

USAGE = f"""\
python -m refine_verl.evaluate model=DIR tasks=TASK,... out=DIR [KEY=VALUE ...]
python -m refine_verl.evaluate compare RUN RUN ...

Tasks: {", ".join(GROUPS)}, or single ones of their tasks (docs/evaluation.md).
Interrupted? Give the same command again: finished samples are not asked again.

"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(
        arguments,
        help=lambda _: USAGE + list_keys(EvaluateSettings),
        run=_run,
        keeps_work=True,
        typed_as={"model.path": "model", "model.tokenizer": "tokenizer"},
    )


def _run(given: list[str]) -> None:
    # torch is imported once the keys are read: a typo is answered at once
    if given and given[0] == "compare":
        _, runs = read_keys(given[1:], Settings, words=True)
        from refine_verl.evaluate.compare import compare

        tables, notes = compare(runs)
    else:
        settings, _ = read_keys(given, EvaluateSettings)
        settings.refuse_without_effect(given)
        from refine_verl.evaluate.run import evaluate

        tables, notes = evaluate(settings), [f"Results: {settings.out}/results.json, results.md, samples/"]
    for table in tables:
        show_table(table.title, table.header, table.rows, table.notes)
    for note in notes:
        show(note)


if __name__ == "__main__":
    sys.exit(main())
