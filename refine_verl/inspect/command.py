"""What the command does, from its settings to the page and the terminal."""

from __future__ import annotations

from rich.console import Console
from transformers.utils import logging as transformers_logging

from refine_verl.inspect.analysis import analyse
from refine_verl.inspect.glyphs import token_bytes
from refine_verl.inspect.page import render
from refine_verl.inspect.settings import InspectSettings
from refine_verl.inspect.source import check_out, load_actor, read_inputs
from refine_verl.inspect.terminal import show
from refine_verl.inspect.view import View
from refine_verl.models.answers import end_tokens_of
from refine_verl.models.lora import open_adapter
from refine_verl.nsp import sentence_ends
from refine_verl.report.page import write_page


def inspect_text(settings: InspectSettings) -> View:
    """Load, analyse, and make ready to be shown.

    Raises:
        ConfigError, DataError, ModelError: what cannot be used; nothing is computed then.
    """
    info, text = read_inputs(settings)
    adapter = None if settings.adapter is None else open_adapter(settings.adapter)
    ends = sentence_ends(text.tokenizer, settings.nsp)
    actor = load_actor(settings.model, info, adapter)
    actor.end_tokens, actor.sentence_ends = end_tokens_of(actor, text.tokenizer.eos_token_id), ends
    return View(
        name=text.name,
        model_type=info.model_type,
        inspection=analyse(actor, text.tokens, settings.nsp, settings.seed, settings.norm_adv_by_std_in_grpo),
        settings=settings,
        left_out=text.left_out,
        to_bytes=token_bytes(text.tokenizer),
        special=frozenset(text.tokenizer.all_special_ids),
    )


def run(settings: InspectSettings, console: Console) -> None:
    """Show the inspection, and write the page where one is asked for.

    Raises:
        ConfigError, DataError, ModelError: see `inspect_text`.
        OSError: the page cannot be written.
    """
    out = check_out(settings.out, settings.text) if settings.out is not None else None
    transformers_logging.disable_progress_bar()  # of weights that are read in a moment
    view = inspect_text(settings)
    show(view, console)
    if out is not None:
        size = write_page(out, render(view)).stat().st_size
        console.print(f"\n{out} ({size / 1e6:.2f} MB)", markup=False, highlight=False, soft_wrap=True)
