"""The formats of adapter files, by name: a help text lists them without importing PyTorch.

Each is a module of formats/. The first one that recognises contents reads them.
"""

__all__ = ["FORMAT_NAMES"]

FORMAT_NAMES = (
    "gguf",
    "torchtune",
    "kohya",
    "litgpt",
    "adapterhub",
    "mlx",
    "peft",
    "diffusers",
    "loralib",
)
