"""`python -m refine_verl.plan recipe=NAME [KEY=VALUE ...]`: the run that would start, without starting it.

Exit codes are those of all commands: 2 for a configuration that would not start either.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from refine_verl.command.commandline import CommandLine, read_command_line, readable_errors
from refine_verl.command.front import run_command, show
from refine_verl.command.keys import keys_of, list_keys, make_settings, take_keys
from refine_verl.compose.validate import ValidConfig
from refine_verl.config import ConfigError, DataSettings
from refine_verl.plan.options import PlanSettings
from refine_verl.plan.origins import find_origins

if TYPE_CHECKING:
    from refine_verl.models.loading import ModelInfo
    from refine_verl.plan.estimate import Plan
    from refine_verl.plan.reading import Reading

WIDTH = 140
"""Of tables that go to a file."""

USAGE = """\
python -m refine_verl.plan recipe=NAME [KEY=VALUE ...]

The run that would start, without starting it: what it will read, do and need. Documents are tokenised into the cache
that the run will use. Needs no GPU and starts no Ray. Exit code 2 for a configuration that would not start either.

Takes what `python -m refine_verl.main` takes, --config-dir included, and
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(argv, help=lambda _: USAGE + list_keys(PlanSettings), run=_run)


def _run(arguments: list[str]) -> None:
    own = [*keys_of(PlanSettings)]
    given, rest = take_keys(arguments, PlanSettings)
    settings = make_settings(PlanSettings, given)
    with readable_errors(own_words=own, one_run="a plan"):
        command = read_command_line(rest, known=[*(f"--{key}" for key in own), "--help", "--config-dir"])
        if command.multirun or command.shows:
            raise ConfigError("", "a plan is of one run: leave out -m, --cfg and --info.")
        valid, composed = command.compose(command.overrides)
        plan = make_plan(valid, composed, command, settings)
    if settings.json:
        show(json.dumps(plan.as_json(), indent=2, default=_plain))
        return
    from refine_verl.plan.show import show_plan

    console = Console()
    show_plan(plan, console if console.is_terminal else Console(width=WIDTH), every_key=settings.all)


def _plain(value: object) -> object:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else str(value)


def make_plan(valid: ValidConfig, composed: DictConfig, command: CommandLine, settings: PlanSettings) -> Plan:
    """Prepare (or sample) the data and work everything out.

    Args:
        valid, composed: the run, and what it was composed to before it was checked.
        command: what was typed.
        settings: of the plan.

    Raises:
        ConfigError, DataError, ModelError: as a run would at its start.
    """
    speed, speed_from = settings.speed(valid.workers, rollouts=valid.refine.uses_rollouts)
    # Only a sound configuration is worth the seconds that torch and transformers take to load.
    from refine_verl.plan.estimate import Plan, disk_of, find_warnings, memory_here, shape_of, work_of
    from refine_verl.plan.memory import estimate_memory, reads_uncut
    from refine_verl.plan.servers import servers_of, with_servers

    info, train, validation = _read(valid, settings.sample)
    split = "val" if valid.refine.phase == "ttt" else "train"  # test-time training reads nothing else
    train = train.at_most(int(valid.config.data[f"{split}_max_samples"]))
    shape = shape_of(valid, train.longest)
    memory = estimate_memory(info.config, shape)
    work = work_of(valid, train, shape, traced=reads_uncut(info.config))
    trainer = valid.config.trainer
    available = memory_here(trainer.device, int(trainer.n_gpus_per_node))
    available = round(settings.memory * 2**30) if settings.memory else available
    servers = servers_of(valid, info.config, memory.base_parameters, available)
    plan = Plan(
        origins=find_origins(composed, valid.config, command.files(), command.overrides),
        train=train,
        validation=validation,
        work=work,
        shape=shape,
        memory=with_servers(memory, servers),
        memory_available=available,
        servers=servers,
        seconds_per_step=work.tokens_per_step / speed if speed else None,
        throughput=speed,
        throughput_from=speed_from,
        disk=disk_of(valid, memory, work.steps),
        warnings=[],
    )
    return dataclasses.replace(plan, warnings=list(find_warnings(plan, valid, info.config)))


def _read(valid: ValidConfig, sample: int | None) -> tuple[ModelInfo, Reading, Reading | None]:
    """The model, and the account of both splits: counted, or estimated from ``sample`` documents of each file."""
    from refine_verl.plan.reading import Reading, sample_split
    from refine_verl.preflight.run import check_run, load_run_tokenizer, prepare_run

    if not sample:
        prepared = prepare_run(valid)
        validation = None if prepared.validation is None else Reading.of_statistics(prepared.validation.statistics)
        return prepared.model, Reading.of_statistics(prepared.train.statistics), validation
    if not isinstance(valid.data, DataSettings):
        raise ConfigError("sample", "is for documents; prompts are read whole (refine.phase).")
    info = check_run(valid)
    tokenizer = load_run_tokenizer(valid, info)
    shortest = max(valid.data.min_length, valid.refine.nsp.shortest_document)
    train = sample_split(valid.data, "train", tokenizer, shortest, sample)
    assert train is not None  # validate has refused a run without documents
    return info, train, sample_split(valid.data, "validation", tokenizer, 2, sample)


if __name__ == "__main__":
    sys.exit(main())
