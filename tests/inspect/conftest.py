"""A tiny DeltaNet over bytes, saved as users have models, and texts to look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reference.toy import tiny_config

from refine_verl.command.keys import read_keys
from refine_verl.data.tokenizers import load_tokenizer
from refine_verl.inspect.command import inspect_text
from refine_verl.inspect.settings import InspectSettings
from refine_verl.inspect.view import View
from refine_verl.models import load_model

TEXT = "The cat sat on the mat.\n\tIt said: “naïve 中文 😀”,   then\r\nleft </script> & <b>bold</b> things behind.\n"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    model = load_model(None, config=tiny_config("delta_net", vocab_size=257), seed=1)
    with torch.no_grad():  # larger weights than at initialisation: entropies differ from token to token
        generator = torch.Generator().manual_seed(2)
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(directory))
    load_tokenizer("bytes", out_dir=directory)
    return directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture(scope="session")
def look(model_dir: Path, text_file: Path) -> Callable[..., View]:
    """`look("refine.nsp.chunks=3", ...)` -> what the command would show."""

    def inspect(*arguments: str) -> View:
        return inspect_text(read_keys([f"model={model_dir}", f"text={text_file}", *arguments], InspectSettings)[0])

    return inspect
