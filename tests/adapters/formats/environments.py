"""A virtual environment for each tool whose adapters are read and written, kept in a cache folder.

It sees the packages of the environment that runs the tests. LORA_KERNELS_FORMATS names the folder.
"""

import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

__all__ = ["PINNED", "python", "run"]

REQUESTS = [
    "requests==2.34.2", "urllib3==2.8.0", "charset-normalizer==3.5.3", "idna==3.20",
    "certifi==2026.10.19.post1",
]  # fmt: skip
PINNED = {
    "mlx": ["mlx==0.32.4", "mlx-cpu==0.32.4", "mlx-lm==0.32.2"],
    "torchtune": [
        "torchtune==0.6.1", "torchao==0.16.0", "omegaconf==2.4.0", "antlr4-python3-runtime==4.9.3",
        "sentencepiece==0.2.3", "tiktoken==0.14.0", "blobfile==3.3.0", "kagglehub==1.0.3",
    ],
    "litgpt": [
        "litgpt==0.5.13", "lightning==2.6.6", "lightning-utilities==0.15.3", "torchmetrics==1.9.0",
        "jsonargparse==4.53.0",
    ],
    "lycoris": ["lycoris-lora==4.1.3", "toml==0.10.2", "einops==0.8.2"],
    "diffusers": ["diffusers==0.42.1", "importlib-metadata==10.2.0", "zipp==4.1.2", *REQUESTS],
    "adapters": [
        "adapters==1.3.0", "transformers==4.57.6", "tokenizers==0.22.1", "huggingface-hub==0.36.0",
        *REQUESTS,
    ],
}  # fmt: skip
_HERE = Path(__file__).parent


def python(tool: str) -> Path:
    """The interpreter of a tool's environment, which is made if it is not there; or skips."""
    cache = Path.home() / ".cache" / "lora_kernels" / "formats"
    folder = Path(os.environ.get("LORA_KERNELS_FORMATS", cache)) / tool
    stamp, text = folder / "installed", "\n".join(PINNED[tool])
    interpreter = folder / "bin" / "python"
    if stamp.is_file() and stamp.read_text() == text:
        return interpreter
    venv.create(folder, with_pip=True, clear=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    Path(packages, "running.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [interpreter, "-m", "pip", "install", "--quiet", "--no-deps", *PINNED[tool]]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    if done.returncode:  # no network or no wheel for this Python: nothing of ours to test
        pytest.skip(f"{tool} cannot be installed: {done.stderr.strip()[-300:]}")
    stamp.write_text(text)
    return interpreter


def run(tool: str, script: str, *arguments) -> str:
    """Runs a script of tools/ in a tool's environment; what it prints."""
    command = [python(tool), _HERE / "tools" / script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def _environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_CONSTRAINT")}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1"}
