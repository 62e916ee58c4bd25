"""A plan as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from refine_verl.plan.estimate import Plan
from refine_verl.plan.origins import DEFAULT, Origin
from refine_verl.plan.servers import Servers
from refine_verl.record.format import size_text, unit_of


def show_plan(plan: Plan, console: Console, *, every_key: bool = False) -> None:
    """Print ``plan``; ``every_key`` with verl's defaults, too."""
    origins = [
        _origin_row(origin)
        for origin in plan.origins
        if every_key or origin.source != DEFAULT or origin.key.startswith("refine.")  # set by somebody, or REFINE's own
    ]
    configuration = _table("Configuration", ("key", "from", "value"), origins)
    servers = [] if plan.servers is None else [_servers(plan.servers)]
    for table in (configuration, _reading(plan), _work(plan), _memory(plan), *servers, _disk(plan)):
        console.print(table)
    for warning in plan.warnings:
        console.print(f"[yellow]warning[/] {escape(warning)}", highlight=False)


def _origin_row(origin: Origin) -> tuple[str, str, str]:
    value = "null" if origin.value is None else str(origin.value)
    if origin.follows and origin.follows != value:
        value = f"{value}  ({origin.follows})"
    return origin.key, origin.source, value


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        numbers = index > 0 and title not in ("Configuration", "Work", "vLLM servers", "Disk")
        table.add_column(
            column, overflow="fold", no_wrap=index == 0 or column == "from", justify="right" if numbers else "left"
        )
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    return table


def _reading(plan: Plan) -> Table:
    rows = []
    for name, reading in (("train", plan.train), ("validation", plan.validation)):
        if reading is not None:
            counts = (reading.documents, reading.tokens, reading.sequences)
            documents, tokens, sequences = (f"{'about ' * reading.estimated}{count:,}" for count in counts)
            lengths = (f"{reading.mean_length:,.0f}", f"{reading.longest:,}")
            rows.append((name, documents, f"{reading.too_short:,}", tokens, sequences, *lengths))
    columns = ("data", "documents", "too short", "tokens", "sequences", "mean length", "longest")
    return _table("Reading", columns, rows)


def _work(plan: Plan) -> Table:
    work = plan.work
    forward = work.forward_tokens_per_token
    rows = [
        ("steps", f"{work.steps:,} ({work.epochs:.2f} epochs)"),
        ("document tokens per step", f"{work.tokens_per_step:,.0f}"),
        ("optimiser steps per step", work.optimiser_steps_per_step),
        ("passes per step and worker", ", ".join(f"{name} {count:,}" for name, count in work.passes.items())),
        ("forward tokens per document token", "not planned" if forward is None else f"at most {forward:.3f}"),
    ]
    if plan.seconds_per_step is None:
        rows.append(("time", "unknown: give throughput=TOKENS_PER_SECOND or measured=FILE"))
    else:
        hours = plan.seconds_per_step * work.steps / 3600
        rows.append(("time per step", f"{plan.seconds_per_step:.2f} s at {plan.throughput:,.0f} tokens/s"))
        rows.append(("time of the run", f"{hours:.2f} h ({plan.throughput_from})"))
    return _table("Work", ("what", "how much"), rows)


def _memory(plan: Plan) -> Table:
    memory = plan.memory
    phases = memory.phases
    unit, name = unit_of(memory.peak)

    def cell(size: int) -> str:
        return f"{size / unit:,.3f}" if unit > 1 else f"{size:,}"

    parts = list(dict.fromkeys(part for phase in phases.values() for part in phase))
    rows: list[tuple[Any, ...]] = [
        (part, *(cell(phase[part]) if part in phase else "" for phase in phases.values())) for part in parts
    ]
    rows.append(("sum", *(cell(sum(phase.values())) for phase in phases.values())))
    kind = "GPU" if plan.shape.cuda else "process"
    title = (
        f"Peak memory per {kind}, {name}: {memory.parameters:,} parameters{_trained(plan)} over "
        f"{plan.shape.workers} workers, "
        f"documents of {plan.shape.length:,} tokens, a state of {size_text(memory.state_bytes)}"
    )
    if memory.shared_bytes:
        title += f", of which {size_text(memory.shared_bytes)} are keys and values that forks share"
    return _table(title, ("part", *phases), rows)


def _servers(servers: Servers) -> Table:
    aside = "unknown: give memory=GIB" if servers.set_aside is None else size_text(servers.set_aside, 3)
    rows = [
        ("servers", f"{servers.count} on {servers.devices} device(s) each, which are their workers', too"),
        ("weights", f"{size_text(servers.weights, 3)} on each device, in bfloat16"),
        ("states", f"{size_text(servers.states, 3)}, {size_text(servers.state, 3)} of a sequence"),
        ("set aside while awake", f"{aside} ({servers.said_by})"),
        ("between uses", "asleep: all of it is free" if servers.sleeps else "as while awake: counted in every phase"),
        ("not counted", "pieces of weights that are sent, CUDA graphs, what sleeping servers keep"),
    ]
    return _table("vLLM servers", ("what", "how much"), rows)


def _trained(plan: Plan) -> str:
    memory = plan.memory
    aside = f", {size_text(memory.snapshot)} kept aside per worker to return to" if memory.snapshot else ""
    alone = f", of which {memory.trained:,} are trained ({memory.trained / memory.parameters:.2%})"
    return f"{alone if plan.shape.lora.lora_rank else ''}{aside}"


def _disk(plan: Plan) -> Table:
    disk = plan.disk
    final = "adapter" if plan.shape.lora.lora_rank else "model"
    rows = [
        ("checkpoints kept", f"{disk.checkpoints_kept} of {size_text(disk.checkpoint, 3)}"),
        (f"final {final}", size_text(disk.final_model, 3) if disk.final_model else "none (refine.ttt.reset)"),
        ("needed", size_text(disk.needed, 3)),
        ("free", f"{size_text(disk.free, 3)} at {disk.place}"),
    ]
    if disk.adapters_kept:
        aside = disk.adapters_free
        where = "" if aside is None else f" at {disk.adapters_place}, {size_text(aside, 3)} free"
        size = f"{disk.adapters_kept:,} of {size_text(disk.adapter, 3)}, {size_text(disk.adapters, 3)} in all"
        rows.insert(1, ("adapters kept", f"{size}{where}"))
    return _table("Disk", ("what", "how much"), rows)
