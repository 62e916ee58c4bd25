"""Bad input: exit code 2, one message that names key, value and cure, and nothing written."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from reference.toy import tiny_config

from refine_verl.command.keys import read_keys
from refine_verl.config import ConfigError, RolloutLength
from refine_verl.data.tokenizers import load_tokenizer
from refine_verl.inspect.__main__ import main
from refine_verl.inspect.settings import ROLLOUTS, InspectSettings
from refine_verl.inspect.view import View
from refine_verl.models import load_model


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and "Traceback" not in captured.err
    return " ".join(captured.err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text=t"], "model: is missing: give model=... .directory or hub id"),
        (["model=m"], "text: is missing: give text=... .a UTF-8 text file, or - for standard input"),
        (
            ["model=m", "text=t", "refine.nsp.chunk=4"],
            "nsp.chunk: unknown key. .* Did you mean 'refine.nsp.chunks'?",
        ),
        (["model=m", "text=t", "chunks=4"], "chunks: unknown key. .* Did you mean 'refine.nsp.chunks'?"),
        (["model=m", "text=t", "modell=x"], "modell: unknown key. .* Did you mean 'model'?"),
        (["model=m", "text=t", "out"], "'out' is not of the form key=value. Did you mean 'out'?"),
        (["model=m", "text=t", "text=u"], "text: is given twice"),
        (["model=m", "text=t", "refine.nsp.chunks=0"], "refine.nsp.chunks: must be at least 1, got 0"),
        (["model=m", "text=t", "refine.nsp.chunks=many"], "refine.nsp.chunks: must be an integer, got 'many'"),
        (["model=m", "text=t", "refine.nsp.selection=entrpy"], "Did you mean 'entropy'?"),
        (
            ["model=m", "text=t", "refine.nsp.question_tokens=9"],
            "refine.nsp.question_tokens: has no effect with refine.nsp.selection=entropy: .* set selection=query",
        ),
        (["model=m", "text=t", "refine.nsp.reward=cosin"], "refine.nsp.reward: unknown reward 'cosin'"),
        (["model=m", "text=t", "refine.nsp.grad_scope=branch"], "refine.nsp.grad_scope: has no effect here"),
        (["model=m", "text=t", "refine.nsp.temperature=[1"], "refine.nsp.temperature: must be a number, got '\\[1'"),
        (
            ["model=m", "text=t", "refine.nsp.group=position", "refine.nsp.rollouts_per_position=1"],
            "nothing to compare",
        ),
        (["model=m", "text=t", "seed=-1"], "seed: must be at least 0"),
        (["model=m", "text=t", "max_length=1"], "max_length: must be at least 2"),
        (["model=m", "text=t", "tokenizer=bpe:300"], "tokenizer: bpe:300 would be trained"),
    ],
)
def test_keys(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    import re

    assert re.search(message.replace("?", r"\?"), refused(capsys, *arguments))


def test_settings_as_typed() -> None:
    settings, _ = read_keys(
        ["model=a=b", "text=-", "refine.nsp.temperature=1e-1", "out=null", "tokenizer=1e3"], InspectSettings
    )
    assert (settings.model, settings.text, settings.out, settings.tokenizer) == ("a=b", "-", None, "1e3")
    assert (settings.nsp.rollouts_per_position, settings.nsp.temperature) == (ROLLOUTS, 0.1)
    with pytest.raises(ConfigError, match="unknown key"):
        read_keys(["model=m", "text=t", "nsp=1"], InspectSettings)
    for text in ("{min:2,max:6,by:sentence}", "{min: 2, max: 6, by: sentence}"):
        settings, _ = read_keys(["model=m", "text=t", f"refine.nsp.rollout_length={text}"], InspectSettings)
        assert settings.nsp.rollout_length == RolloutLength(min=2, max=6, by="sentence")
    with pytest.raises(ConfigError, match="rollout_length.min: 7 is more than"):
        read_keys(["model=m", "text=t", "refine.nsp.rollout_length={min:7,max:6}"], InspectSettings)


def test_rollouts_that_end_with_a_sentence(look: Callable[..., View]) -> None:
    positions = look("refine.nsp.chunks=4", "refine.nsp.rollout_length={min:2,max:9,by:sentence}").inspection.positions
    lengths = {len(position.target) for position in positions}
    assert lengths and all(2 <= length <= 9 for length in lengths) and len(lengths) > 1
    assert all(len(rollout.tokens) == len(rollout.advantages) == len(position.target)
               for position in positions for rollout in position.rollouts)  # fmt: skip


def test_text(capsys: pytest.CaptureFixture[str], tmp_path: Path, model_dir: Path) -> None:
    model = f"model={model_dir}"
    assert "missing.txt: no such file" in refused(capsys, model, f"text={tmp_path / 'missing.txt'}")
    assert "is a directory. Give one text file" in refused(capsys, model, f"text={tmp_path}")
    file = tmp_path / "t.txt"
    file.write_bytes(b"")
    assert f"text: {file} is empty." in refused(capsys, model, f"text={file}")
    file.write_bytes(b"one\ntwo \xff three")
    assert "is no UTF-8 text: byte 0xFF at offset 8 (line 2)" in refused(capsys, model, f"text={file}")
    file.write_text("x" * 12)
    assert "has 12 tokens; refine.nsp.chunks=8" in refused(capsys, model, f"text={file}")
    assert "need at least 13" in refused(capsys, model, f"text={file}")
    file.write_text("x" * 100)
    assert "has 12 tokens (max_length=12 cuts it)" in refused(capsys, model, f"text={file}", "max_length=12")
    query = ("max_length=50", "refine.nsp.selection=query")
    assert "max_length: 50 leaves out the end of t.txt (100 tokens)" in refused(capsys, model, f"text={file}", *query)


def test_writes_that_are_not_known(capsys: pytest.CaptureFixture[str], tmp_path: Path, text_file: Path) -> None:
    lact = {"num_attn_heads": 2, "num_lact_heads": 2, "lact_chunk_size": 8, "window_size": 8, "vocab_size": 257}
    load_model(None, config=tiny_config("lact_swiglu", **lact)).save_pretrained(str(tmp_path))
    load_tokenizer("bytes", out_dir=tmp_path)
    capsys.readouterr()  # a progress bar
    said = refused(capsys, f"model={tmp_path}", f"text={text_file}", "refine.nsp.selection=surprise")
    assert "refine.nsp.selection: surprise looks at how strongly each token rewrites the fast weights" in said


def test_model_and_tokenizer(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model_dir: Path, text_file: Path
) -> None:
    text = f"text={text_file}"
    assert f"model={tmp_path / 'no'}: no such directory" in refused(capsys, f"model={tmp_path / 'no'}", text)
    assert "no config.json" in refused(capsys, f"model={tmp_path}", text)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((model_dir / "config.json").read_text())
    assert "no weights" in refused(capsys, f"model={bare}", text)
    os.symlink(model_dir / "model.safetensors", bare / "model.safetensors")
    message = refused(capsys, f"model={bare}", text)
    assert "no tokenizer can be loaded" in message and "tokenizer=bytes" in message
    load_tokenizer("bpe:300", ["some text to train on " * 50], tmp_path / "large")
    larger = refused(capsys, f"model={model_dir}", text, f"tokenizer={tmp_path / 'large'}")
    assert "tokens, but the model predicts only 257" in larger
    assert "cannot be imported" in refused(capsys, f"model={model_dir}", text, "external_lib=not_there_at_all")
    assert "'not_there_at_all'" in refused(capsys, f"model={model_dir}", text, "refine.nsp.reward=not_there_at_all.f")


def test_out(capsys: pytest.CaptureFixture[str], tmp_path: Path, model_dir: Path, text_file: Path) -> None:
    given = (f"model={model_dir}", f"text={text_file}")
    assert f"out: {tmp_path} is a directory" in refused(capsys, *given, f"out={tmp_path}")
    assert "is the text itself" in refused(capsys, *given, f"out={text_file}")
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in refused(capsys, *given, f"out={tmp_path / 'file' / 'page.html'}")
    page = tmp_path / "deep" / "page.html"
    refused(capsys, f"model={model_dir}", f"text={tmp_path / 'missing'}", f"out={page}")
    assert not page.parent.exists()


def test_command_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model_dir: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = tmp_path / "deep" / "page.html"
    keys = ("refine.nsp.chunks=2", "refine.nsp.rollouts_per_position=2")
    assert main([f"model={model_dir}", f"text={text_file}", f"out={page}", *keys]) == 0
    out = capsys.readouterr().out
    size = len(page.read_bytes())
    assert f"{page} ({size / 1e6:.2f} MB)" in out and "position 2 after token" in out
    assert list(page.parent.iterdir()) == [page]
    stdin = io.TextIOWrapper(io.BytesIO(text_file.read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main([f"model={model_dir}", "text=-", *keys]) == 0
    again = capsys.readouterr().out
    assert again.startswith("standard input · ") and ".html" not in again
    body = out.split("\n", 1)[1].rsplit("\n\n", 1)[0]
    assert body in again  # the same text from a pipe gives the same numbers


def test_max_length_is_said(capsys: pytest.CaptureFixture[str], model_dir: Path, text_file: Path) -> None:
    assert main([f"model={model_dir}", f"text={text_file}", "max_length=60", "refine.nsp.chunks=2"]) == 0
    assert "60 tokens, " in capsys.readouterr().out


def test_help_needs_no_torch() -> None:
    script = (
        "import sys; from refine_verl.inspect.__main__ import main; code = main(['--help']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "refine.nsp.rollouts_per_position=4" in done.stdout and "grad_scope" not in done.stdout


def test_neither_ray_nor_verl_is_loaded(model_dir: Path, text_file: Path) -> None:
    script = (
        "import sys; from refine_verl.inspect.__main__ import main; "
        f"code = main(['model={model_dir}', 'text={text_file}', 'refine.nsp.chunks=2']); "
        "assert not {'ray', 'verl'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
