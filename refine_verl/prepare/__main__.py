"""The command line: `python -m refine_verl.prepare COMMAND --help` explains each command."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from refine_verl.config import DataError
from refine_verl.prepare.questions import SOURCES

_RULER_EXAMPLES = """examples:
  python -m refine_verl.prepare ruler_qa --source squad --input dev-v2.0.json \\
      --tokenizer fla-hub/delta_net-1.3B-100B --length 4096 --out data/ruler/squadqa_4096
  python -m refine_verl.prepare ruler_qa --source hotpotqa --input hotpotqa/hotpot_qa:distractor:validation \\
      --tokenizer models/mine --length 16384 --train 1600 --test 200 --seed 0 --out data/ruler/hotpotqa_16384

Writes ruler_squadqa_4096_1600_train.parquet and ..._200_test.parquet. The two share no question and no paragraph
that holds an answer, and no test paragraph that holds an answer is a distractor in training. The same seed, source
and tokenizer give the same bytes. Interrupted? Give the same command again."""
_LONGBENCH_EXAMPLES = """examples:
  python -m refine_verl.prepare longbench --input LongBench/data --tokenizer models/mine \\
      --length 16384 --out data/longbench
  python -m refine_verl.prepare longbench --input Xnhyacinth/LongBench --tasks qasper trec --out data/longbench

Writes one TASK.parquet per task. Finished tasks are not made again: give the same command to go on."""
_DOCUMENTS_EXAMPLES = """examples:
  python -m refine_verl.prepare documents --input 'corpus/*.jsonl.zst' --tokenizer models/mine --min-tokens 16384 \\
      --limit 12800 --out data/ntp
  python -m refine_verl.prepare documents --input DKYoon/SlimPajama-6B:train --tokenizer models/mine \\
      --min-tokens 16384 --sample 0.5 --out data/ntp

Writes documents-00000.parquet and so on (text, tokens, source, row). Interrupted? Give the same command again: it goes
on behind the last finished file."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m refine_verl.prepare", description="Make data ready for refine_verl."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="ruler_qa|longbench|documents")
    _add_ruler(_command(commands, "ruler_qa", "question answering at a given length", _RULER_EXAMPLES))
    _add_longbench(_command(commands, "longbench", "LongBench's English tasks as prompts", _LONGBENCH_EXAMPLES))
    _add_documents(_command(commands, "documents", "long documents out of a corpus", _DOCUMENTS_EXAMPLES))
    return parser


def _command(commands: argparse._SubParsersAction, name: str, about: str, examples: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=about, description=about, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _add_ruler(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--source", required=True, choices=SOURCES, help="whose questions")
    add("--input", required=True, help="official json file, parquet or jsonl files, or hub dataset id (:config:split)")
    add("--tokenizer", required=True, help="directory or hub id; the length is counted with it")
    add("--length", required=True, type=int, help="most tokens of prompt and answer, 4096 say")
    add("--train", type=int, default=1600, help="questions for training (default: %(default)s)")
    add("--test", type=int, default=200, help="questions for testing (default: %(default)s)")
    add("--answer-tokens", type=int, default=32, help="room to leave for the answer (default: %(default)s)")
    add("--seed", type=int, default=0, help="of every random choice (default: %(default)s)")
    add("--out", required=True, help="directory to fill")


def _add_longbench(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", required=True, help="directory with TASK.jsonl files, or hub id of a dataset with tasks as configs")
    add("--out", required=True, help="directory to fill")
    add("--tasks", nargs="+", metavar="TASK", help="(default: the paper's twelve)")
    add("--tokenizer", help="directory or hub id to count lengths with")
    add("--length", type=int, help="leave out samples whose prompt and answer have more tokens")


def _add_documents(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", required=True, nargs="+", help="files, directories, globs, hub dataset ids, or python_stdlib")
    add("--out", required=True, help="directory to fill")
    add("--tokenizer", required=True, help="directory or hub id to count tokens with")
    add("--min-tokens", required=True, type=int, help="fewest tokens of a document")
    add("--max-tokens", type=int, help="leave out longer documents")
    add("--text-key", default="text", help="column with the text (default: %(default)s)")
    add("--limit", type=int, help="stop after this many documents")
    add("--limit-tokens", type=int, help="stop after this many tokens")
    add("--sample", type=float, default=1.0, help="share of the documents to look at (default: %(default)s)")
    add("--seed", type=int, default=0, help="of --sample (default: %(default)s)")
    add("--shard-size", type=int, default=1000, help="documents per file, about (default: %(default)s)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 on success, 2 where arguments or data are refused, 130 where interrupted.
    """
    options = vars(build_parser().parse_args(arguments))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # Documents are as long as they are: the tokenizer's warning about its model's context means nothing here.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    run = _runner(options.pop("command"))
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    try:
        run({key: value for key, value in values.items() if value is not None})
    except DataError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; give the same command again to go on\n")
        return 130
    return 0


def _runner(command: str) -> Callable[[dict[str, Any]], None]:
    # Imported here: the commands need transformers, whose import takes seconds that --help should not.
    if command == "ruler_qa":
        from refine_verl.prepare import ruler_qa

        return lambda options: ruler_qa.run(ruler_qa.RulerSettings(**options))
    if command == "longbench":
        from refine_verl.prepare import longbench

        return lambda options: longbench.run(longbench.LongBenchSettings(**options))
    from refine_verl.prepare import documents

    return lambda options: documents.run(documents.DocumentSettings(**options))


if __name__ == "__main__":
    sys.exit(main())
