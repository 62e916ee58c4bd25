"""`python -m refine_verl.plan recipe=NAME [KEY=VALUE ...]`: the run that would start, without starting it.

Takes what `python -m refine_verl.main` takes, and
  throughput=N   document tokens per second of the whole run, for times
  measured=FILE  the same from the JSON of `python -m benchmarks.step_cost`, or from a run's metrics.jsonl
  memory=GIB     of one GPU, where the run's GPUs are not in this machine (with trainer.device=cuda)
  sample=N       tokenise N documents of each file and reckon the rest
  --json         one JSON object
  --all          every key of the configuration

Documents are tokenised into the cache that the run will use. Needs no GPU and starts no Ray. Exit status: 0, or 2 for a
configuration that would not start either.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from yaml import YAMLError

from refine_verl.command.commandline import read_command_line
from refine_verl.command.quiet import quieten_third_parties
from refine_verl.compose.composition import ConfigFile, base_schema, compose_config, find_configs, read_config_dir
from refine_verl.compose.messages import readable
from refine_verl.compose.validate import ValidConfig, validate
from refine_verl.config import ConfigError, DataError, DataSettings, ModelError
from refine_verl.plan.options import FLAGS, WORDS, PlanOptions, measured_throughput, read_options
from refine_verl.plan.origins import files_chosen, find_origins

if TYPE_CHECKING:
    from refine_verl.plan.estimate import Plan

BAD_INPUT = 2
WIDTH = 140
"""Of tables that go to a file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(__doc__ or "")
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    quieten_third_parties()
    try:
        return _plan(arguments)
    except (ConfigError, DataError, HydraException, OmegaConfBaseException, YAMLError) as error:
        ours = isinstance(error, (ConfigError, DataError))
        return _refuse(str(error) if ours else readable(error, base_schema(), own_words=WORDS, one_run="a plan"))


def _refuse(message: str) -> int:
    Console(stderr=True, soft_wrap=True).print(f"error: {message}", markup=False, highlight=False)
    return BAD_INPUT


def _plan(arguments: Sequence[str]) -> int:
    options, rest, measured = read_options(arguments)
    command = read_command_line(rest, suggest=(*FLAGS, "--help", "--config-dir"), help_option="--help")
    if command.multirun or command.shows:
        raise ConfigError("", "a plan is of one run: leave out -m, --cfg and --info.")
    directories = [command.config_dir] if command.config_dir else []
    composed = compose_config(command.overrides, directories)
    files = find_configs() + [file for item in directories for file in read_config_dir(Path(item))]
    valid = validate(composed, files)
    if measured:
        rollouts = valid.refine.uses_rollouts
        speed, source = measured_throughput(measured, valid.workers, rollouts=rollouts)
        options = dataclasses.replace(options, throughput=speed, throughput_from=source)
    # Only a sound configuration is worth the seconds that torch and transformers take to load.
    from refine_verl.plan.show import show

    try:
        plan = make_plan(valid, composed, files, command.overrides, options)
    except ModelError as error:
        return _refuse(str(error))
    if options.json:
        sys.stdout.write(json.dumps(plan.as_json(), indent=2, default=_plain) + "\n")
    else:
        console = Console()
        show(plan, console if console.is_terminal else Console(width=WIDTH), every_key=options.all)
    return 0


def _plain(value: object) -> object:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else str(value)


def make_plan(
    valid: ValidConfig,
    composed: DictConfig,
    files: Sequence[ConfigFile],
    overrides: Sequence[str],
    options: PlanOptions,
) -> Plan:
    """Prepare (or sample) the data and work everything out.

    Raises:
        ConfigError, DataError, ModelError: as a run would at its start.
    """
    from refine_verl.plan.estimate import Plan, disk_of, find_warnings, memory_here, shape_of, work_of
    from refine_verl.plan.memory import estimate_memory, reads_uncut
    from refine_verl.plan.reading import Reading, sample_split
    from refine_verl.preflight.run import _load_tokenizer, check_run, prepare_run

    if options.sample:
        if not isinstance(valid.data, DataSettings):
            raise ConfigError("sample", "is for documents; prompts are read whole (refine.phase).")
        info = check_run(valid)
        tokenizer = _load_tokenizer(valid, info)
        shortest = max(valid.data.min_length, valid.refine.nsp.shortest_document)
        train = sample_split(valid.data, "train", tokenizer, shortest, options.sample)
        validation = sample_split(valid.data, "validation", tokenizer, 2, options.sample)
    else:
        prepared = prepare_run(valid)
        info = prepared.model
        train = Reading.of_statistics(prepared.train.statistics)
        validation = None if prepared.validation is None else Reading.of_statistics(prepared.validation.statistics)
    assert train is not None  # validate has refused a run without documents
    split = "val" if valid.refine.phase == "ttt" else "train"  # test-time training reads nothing else
    train = train.at_most(int(valid.config.data[f"{split}_max_samples"]))
    shape = shape_of(valid, train.longest)
    memory = estimate_memory(info.config, shape)
    work = work_of(valid, train, shape, traced=reads_uncut(info.model_type, shape.cuda))
    plan = Plan(
        origins=find_origins(composed, valid.config, files_chosen(files, overrides), overrides),
        train=train,
        validation=validation,
        work=work,
        shape=shape,
        memory=memory,
        memory_available=options.memory
        or memory_here(valid.config.trainer.device, int(valid.config.trainer.n_gpus_per_node)),
        seconds_per_step=work.tokens_per_step / options.throughput if options.throughput else None,
        throughput=options.throughput,
        throughput_from=options.throughput_from,
        disk=disk_of(valid.config, memory.parameters, work.steps),
        warnings=[],
    )
    return dataclasses.replace(plan, warnings=list(find_warnings(plan, valid, info.config, options)))


if __name__ == "__main__":
    sys.exit(main())
