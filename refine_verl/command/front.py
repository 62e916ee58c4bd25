"""The front of every command: help, exit codes, and what is said of input that cannot be used.

Exit codes: 0 done, 1 failed, 2 the input cannot be used (nothing is written then), 130 stopped by Ctrl-C. Loads nothing
heavy, so that help and a mistyped key are answered at once; commands import what they need after their keys are read.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import signal
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from refine_verl.command.keys import unknown_option
from refine_verl.command.quiet import quieten_third_parties
from refine_verl.config import Refusal, RunFailed, require_choice

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

COMMANDS = {
    "main": "train: mid-training, post-training, test-time training, and sweeps over their settings",
    "plan": "what a run will read, do and need, without starting it",
    "evaluate": "benchmarks of a trained model, and comparisons of their results",
    "remember": "documents read once into states of a model, and asked without reading them again",
    "inspect": "where REFINE looks in a text and what it would write there, on a page or in the terminal",
    "export": "merge a LoRA adapter into a model directory that every command takes",
    "prepare": "make data sets ready: question answering at a length, LongBench, long documents",
    "report": "curves of a run, or of several runs on one page",
    "doctor": "whether this machine is ready to train, and if not, what to do",
}
"""Name and meaning of each; `python -m refine_verl.NAME` and `python -m refine_verl NAME` are the same."""


def run_command(
    argv: Sequence[str] | None,
    *,
    help: Callable[[list[str]], str],
    run: Callable[[list[str]], int | None],
    keeps_work: bool = False,
    typed_as: Mapping[str, str] | None = None,
) -> int:
    """Run a command; returns the exit code.

    Args:
        argv: arguments without the program's name; None: the process's.
        help: the text for `-h` or `--help` anywhere in the arguments.
        run: does the work. Returns the exit code, None for 0; a `Refusal` or an error of the operating system ends
            with 2, a `RunFailed` with 1, both with one line and without a traceback.
        keeps_work: the same command resumes after Ctrl-C.
        typed_as: keys of a training configuration that refusals name -> what this command calls them.
    """
    if getattr(signal.getsignal(signal.SIGINT), "__module__", None) == "refine_verl":  # `end_while_importing`
        signal.signal(signal.SIGINT, _interrupt)
    _interrupts.clear()
    given = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        if {"-h", "--help"} & set(given):
            show(help(given))
            code = 0
        else:
            quieten_third_parties()
            code = _run(run, given)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except RunFailed as error:
        return say_error(str(error), FAILED)
    except (Refusal, OSError) as error:
        return say_error(_as_typed(str(error), typed_as or {}), BAD_INPUT)
    except KeyboardInterrupt:
        return say("interrupted" + "; give the same command again to resume" * keeps_work, INTERRUPTED)
    finally:
        _end_with_a_code()


def _end_with_a_code() -> None:
    """See to it that the process ends with the exit code.

    After Ctrl-C in code that Python compiles from a text, such as the methods of a dataclass, caught or not, it ends
    itself with the signal instead, unless other such code has run since.
    """
    namedtuple("Any", ())


_interrupts: list[int] = []
"""Of the command that runs: the signals that were raised in it."""


def _interrupt(number: int, _: object) -> None:
    _interrupts.append(number)
    raise KeyboardInterrupt


@contextmanager
def interruptible(raised: Callable[[], object]) -> Iterator[None]:
    """Within, an error that a signal has led to is the KeyboardInterrupt it was.

    Some packages make an error of their own of an import of theirs that is interrupted.

    Args:
        raised: whether a signal has raised a KeyboardInterrupt.
    """
    try:
        yield
    except Exception as error:
        if raised():
            raise KeyboardInterrupt from error
        raise


def _run(run: Callable[[list[str]], int | None], given: list[str]) -> int:
    with interruptible(lambda: _interrupts):
        return run(given) or 0


def _as_typed(message: str, typed_as: Mapping[str, str]) -> str:
    for key, name in typed_as.items():
        message = re.sub(rf"(?<![\w.]){re.escape(key)}(?![\w.]*\w)", name, message)
    return message


def show(text: str) -> None:
    """The deliberate output of a command."""
    sys.stdout.write(f"{text}\n")


def say(text: str, code: int) -> int:
    """A line for the person at the terminal, on standard error. Returns ``code``."""
    sys.stdout.flush()
    sys.stderr.write(f"{text}\n")
    return code


def say_error(message: str, code: int) -> int:
    """What went wrong. Returns ``code``."""
    return say(f"error: {message}", code)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m refine_verl NAME ARGUMENTS`; without a name it lists the commands."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in COMMANDS:
        name = "main" if given[0] == "main" else f"{given[0]}.__main__"
        return int(importlib.import_module(f"refine_verl.{name}").main(given[1:]))
    return run_command(given, help=_listing, run=_without_command)


def _without_command(words: list[str]) -> None:
    if not words:
        show(_listing(words))
    elif words[0].startswith("-"):
        raise unknown_option(words[0], ["--help"])
    else:
        require_choice("", words[0], COMMANDS, kind="command")


def _listing(_: list[str]) -> str:
    lines = ["python -m refine_verl COMMAND ...", ""]
    lines += [f"  {name:<10}{meaning}" for name, meaning in COMMANDS.items()]
    return "\n".join(
        [*lines, "", "COMMAND --help says more. Options are KEY=VALUE; but for main, --KEY VALUE is the same."]
    )
