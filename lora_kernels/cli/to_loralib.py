"""PEFT's directory -> a file with the keys of loralib's lora_state_dict."""

import os
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_kernels import adapt, checkpoint, peft_format
from lora_kernels.peft_format import Factors, Record

__all__ = ["to_loralib"]


def to_loralib(source: Path, destination: Path) -> list[str]:
    """Writes the adapter; lines that say which layers loralib needs for it.

    Raises: ValueError, OSError for what cannot be read, expressed or written.
    """
    if destination.is_dir():
        raise ValueError(f"{destination}: is a directory, must be the file to write")
    adapter = checkpoint.read_adapter(source)
    config, state, factors, kinds = adapter.config, {}, defaultdict(dict), defaultdict(list)
    for key, value in adapter.tensors.items():
        path, name = _place(key, adapter.weights_path)
        if name in ("lora_A", "lora_B"):
            factors[path]["embedding" if "lora_embedding_" in key else "linear", name] = value
        elif path.rpartition(".")[2] not in checkpoint.PEFT_COPIES or config.bias != "all":
            state[f"{path}.{name}"] = value
    for path, found in factors.items():
        try:
            own, layer = _own(path, found, config, adapter.records.get(path))
        except ValueError as error:
            raise ValueError(f"{adapter.weights_path}: {path}: {error}") from None
        state |= {f"{path}.lora_A": own.a, f"{path}.lora_B": own.b}
        kinds[layer].append(path)
    if not factors:
        raise ValueError(f"{adapter.weights_path}: no factors of LoRA in it")
    state = {key: value.contiguous() for key, value in state.items()}
    _write(state, destination)
    lines = [f"{destination}: LoRA on {len(factors)} modules; the layers it fits:"]
    return lines + [f"  {layer}: {', '.join(paths)}" for layer, paths in kinds.items()]


def _place(key: str, file: Path) -> tuple[str, str]:
    """The path of the module that a key of PEFT belongs to, and the name of the tensor in it."""
    if not key.startswith(checkpoint.PREFIX):
        raise ValueError(f"{file}: {key}: must start with {checkpoint.PREFIX}")
    own = key.removeprefix(checkpoint.PREFIX)
    for name in ("lora_A", "lora_B"):
        for ending in (f".{name}.weight", name.replace("lora_", ".lora_embedding_")):
            if own.endswith(ending):
                return own.removesuffix(ending), name
    path, _, name = own.rpartition(".")
    return path.removesuffix(".base_layer"), name


def _own(path: str, found: dict[tuple, Tensor], config, record: Record | None):
    """A layer's factors, and the call of loralib that makes the layer."""
    ((kind, _), *_) = found
    if set(found) != {(kind, "lora_A"), (kind, "lora_B")}:
        raise ValueError(f"must have lora_A and lora_B, has {sorted(name for _, name in found)}")
    a, b = found[kind, "lora_A"], found[kind, "lora_B"]
    if a.dim() > 2:
        raise ValueError(
            "a convolution; loralib's factors of one depend on kernel and channels of the model: "
            "load the adapter with lora_kernels.load_adapter and save lora_state_dict(model)"
        )
    plan = adapt.plan_layer(
        path, config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern,
        config.use_rslora,
    )  # fmt: skip
    if not (a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1] == plan.r):
        raise ValueError(
            f"lora_A {list(a.shape)} and lora_B {list(b.shape)} are no factors of rank {plan.r}"
        )
    if kind == "embedding":
        module = nn.Embedding(a.shape[1], b.shape[0], device="meta")
    else:
        module = nn.Linear(a.shape[1], b.shape[0], bias=False, device="meta")
    own = peft_format.from_peft(module, a, b, record)
    return own, _call(kind, own, plan.scaling * own.r, record)


def _call(kind: str, factors: Factors, alpha: float, record: Record | None) -> str:
    name = {"embedding": "Embedding", "linear": "Linear"}[kind]
    arguments = f"r={factors.r}, lora_alpha={alpha:.15g}"
    if record is not None:
        name = "MergedLinear"
        arguments += f", enable_lora={list(record.enable_lora)}"
        if len(set(record.out_splits)) > 1:  # not in loralib
            arguments += f", out_splits={list(record.out_splits)}"
    return f"{name}({arguments})"


def _write(state: dict[str, Tensor], destination: Path) -> None:
    """The file is complete before it replaces an older one."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        torch.save(state, scratch / destination.name)
        os.replace(scratch / destination.name, destination)
    finally:
        shutil.rmtree(scratch)
