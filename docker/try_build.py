"""Build the CPU image without a container engine: every step of a Dockerfile in a clean directory.

    python docker/try_build.py [--dockerfile docker/Dockerfile.cpu] [--keep DIR] [--torch REQUIREMENT]

COPY copies, ENV and ARG set, RUN runs; /opt and /home of the image lie in a temporary directory. What needs root
(packages of the system, users) is named and skipped. At the end the commands of CMD and HEALTHCHECK must exist. Says
what was run and what was not; exit status 1 as soon as a step fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDS_ROOT = ("apt-get", "useradd", "groupadd", "userdel")
MOVED = ("/opt", "/home")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@dataclasses.dataclass(frozen=True)
class Step:
    """One instruction, continuation lines joined."""

    name: str
    value: str


def read_steps(dockerfile: Path) -> list[Step]:
    """The instructions of a Dockerfile, comments left out."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n", " ", "\n".join(lines))
    steps = [line.strip().partition(" ") for line in text.splitlines() if line.strip()]
    return [Step(name.upper(), " ".join(value.split())) for name, _, value in steps]


class Builder:
    """Runs steps in ``place``, which stands for the image's root."""

    def __init__(self, place: Path, arguments: dict[str, str]) -> None:
        self.place, self.arguments = place, arguments
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(place / "home"), "LANG": "C.UTF-8"}
        for name in (
            "PIP_CONFIG_FILE",
            "PIP_INDEX_URL",
            "PIP_FIND_LINKS",
            "SSL_CERT_FILE",
            "HTTPS_PROXY",
            "HTTP_PROXY",
        ):
            if name in os.environ:
                self.environment[name] = os.environ[name]
        self.ran = 0
        self.skipped: list[str] = []

    def moved(self, text: str) -> str:
        """``text`` with the image's directories inside ``place``."""
        return re.sub(rf"(?<![\w.])({'|'.join(MOVED)})(?=/)", rf"{self.place}\1", text)

    def run(self, step: Step) -> None:
        """One instruction."""
        getattr(self, f"_{step.name.lower()}", self._nothing)(step.value)

    def _nothing(self, value: str) -> None:
        """FROM, LABEL, USER, SHELL: nothing to do here."""

    def _arg(self, value: str) -> None:
        name, _, default = value.partition("=")
        self.environment[name] = self.arguments.get(name, default)

    def _env(self, value: str) -> None:
        for word in shlex.split(value):
            name, _, content = word.partition("=")
            content = self.moved(content)
            self.environment[name] = re.sub(r"\$(\w+)", lambda found: self.environment.get(found[1], ""), content)

    def _workdir(self, value: str) -> None:
        Path(self.moved(value)).mkdir(parents=True, exist_ok=True)

    def _copy(self, value: str) -> None:
        *sources, target = value.split()
        if sources[0].startswith("--from="):
            assert all(Path(self.moved(source)).exists() for source in sources[1:]), value
            return
        place = Path(self.moved(target))
        for source in sources:
            into = place / source if target.endswith("/") else place
            into.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
                shutil.copytree(ROOT / source, into, symlinks=True, ignore=ignored)
            else:
                shutil.copy2(ROOT / source, into)

    def _run(self, value: str) -> None:
        if any(re.search(rf"\b{word}\b", value) for word in NEEDS_ROOT):
            self.skipped.append(value)
            say(f"skipped (root): {value}")
            return
        say(f"RUN {value}")
        started = time.monotonic()
        subprocess.run(
            ["/bin/sh", "-euc", self.moved(value)], env=self.environment, cwd=self.place, check=True, stdout=sys.stderr
        )
        self.ran += 1
        say(f"    {time.monotonic() - started:.0f} s")

    def _cmd(self, value: str) -> None:
        self.check_command(json.loads(value))

    def _healthcheck(self, value: str) -> None:
        self.check_command(json.loads(value.partition("CMD")[2]))

    def check_command(self, words: list[str]) -> None:
        """The program exists in the image; `sh -c` is looked into."""
        program = words[2].split()[0] if words[:2] == ["sh", "-c"] else words[0]
        if shutil.which(program, path=self.environment["PATH"]) is None:
            raise FileNotFoundError(f"{program} of {words} is not in the image")
        say(f"found {program}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dockerfile", type=Path, default=ROOT / "docker/Dockerfile.cpu")
    parser.add_argument("--keep", type=Path, help="an empty directory to build in, kept afterwards")
    parser.add_argument("--torch", help="build argument TORCH, such as a local wheel")
    given = parser.parse_args()
    place = given.keep or Path(tempfile.mkdtemp(prefix="refine_verl_image_"))
    place.mkdir(parents=True, exist_ok=True)
    builder = Builder(place.resolve(), {"TORCH": given.torch} if given.torch else {})
    try:
        for step in read_steps(given.dockerfile):
            builder.run(step)
    except (subprocess.CalledProcessError, FileNotFoundError, AssertionError) as error:
        sys.stderr.write(f"failed: {error}\n")
        return 1
    finally:
        if not given.keep:
            shutil.rmtree(place, ignore_errors=True)
    say(f"{builder.ran} steps ran, {len(builder.skipped)} need root and were skipped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
