"""The command line: `python -m refine_verl.prepare COMMAND --help` explains each command."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from refine_verl.command.front import run_command
from refine_verl.command.keys import list_keys, read_command
from refine_verl.config import Settings
from refine_verl.prepare.settings import DocumentSettings, LongBenchSettings, RulerSettings

COMMANDS: dict[str, type[Settings]] = {
    "ruler_qa": RulerSettings,
    "longbench": LongBenchSettings,
    "documents": DocumentSettings,
}
TYPED_AS = {"data.text_key": "text_key", "model.tokenizer": "tokenizer", "data.train_files": "input"}
USAGE = """\
python -m refine_verl.prepare COMMAND KEY=VALUE ...      (or --KEY VALUE)

Make data ready for refine_verl.

  ruler_qa    question answering at a given length
  longbench   LongBench's English tasks as prompts
  documents   long documents out of a corpus

python -m refine_verl.prepare COMMAND --help lists the keys of a command."""
EXAMPLES = {
    "ruler_qa": """examples:
  python -m refine_verl.prepare ruler_qa --source squad --input dev-v2.0.json \\
      --tokenizer fla-hub/delta_net-1.3B-100B --length 4096 --out data/ruler/squadqa_4096
  python -m refine_verl.prepare ruler_qa --source hotpotqa --input hotpotqa/hotpot_qa:distractor:validation \\
      --tokenizer models/mine --length 16384 --train 1600 --test 200 --seed 0 --out data/ruler/hotpotqa_16384

Writes ruler_squadqa_4096_1600_train.parquet and ..._200_test.parquet. The two share no question and no paragraph
that holds an answer, and no test paragraph that holds an answer is a distractor in training. The same seed, source
and tokenizer give the same bytes. Interrupted? Give the same command again.""",
    "longbench": """examples:
  python -m refine_verl.prepare longbench --input LongBench/data --tokenizer models/mine \\
      --length 16384 --out data/longbench
  python -m refine_verl.prepare longbench --input Xnhyacinth/LongBench --tasks qasper trec --out data/longbench

Writes one TASK.parquet per task. Finished tasks are not made again: give the same command to resume.""",
    "documents": """examples:
  python -m refine_verl.prepare documents --input 'corpus/*.jsonl.zst' --tokenizer models/mine --min-tokens 16384 \\
      --limit 12800 --out data/ntp
  python -m refine_verl.prepare documents --input DKYoon/SlimPajama-6B:train --tokenizer models/mine \\
      --min-tokens 16384 --sample 0.5 --out data/ntp

Writes documents-00000.parquet and so on (text, tokens, source, row). Interrupted? Give the same command again: it
resumes after the last finished file.""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(arguments, help=_help, run=_run, keeps_work=True, typed_as=TYPED_AS)


def _help(arguments: list[str]) -> str:
    name = next((word for word in arguments if word in COMMANDS), None)
    if name is None:
        return USAGE
    keys = list_keys(COMMANDS[name])
    return f"python -m refine_verl.prepare {name} KEY=VALUE ...      (or --KEY VALUE)\n\n{keys}\n\n{EXAMPLES[name]}"


def _run(arguments: list[str]) -> None:
    name, settings = read_command(arguments, COMMANDS)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    importlib.import_module(f"refine_verl.prepare.{name}").run(settings)  # transformers takes seconds to load


if __name__ == "__main__":
    sys.exit(main())
