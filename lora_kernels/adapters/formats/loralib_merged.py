"""A whole state dict that loralib saved in eval mode: its weights have the update in them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lora_kernels.adapters import files
from lora_kernels.adapters.agreement import check_layers_agree
from lora_kernels.adapters.formats.adapter import AdapterLayer, Hints
from lora_kernels.adapters.formats.loralib import (
    factor_paths,
    read_layers,
    read_state,
    taken_for,
)
from lora_kernels.adapters.formats.loralib_told import alphas_of
from lora_kernels.model.paths import join

__all__ = ["unmerge"]


def unmerge(source: Path, destination: Path, hints: Hints) -> list[str]:
    """Writes the state dict in source with base weights; returns lines that say what was done.

    Every weight beside lora_A and lora_B becomes itself minus scaling·lora_B·lora_A in its own
    layout, computed in float32 at least and rounded once to its dtype. All else stays as it is.
    The file does not tell merged weights from others: hints and mode have to be right.
    Raises: ValueError, naming file and key, for a file without such weights, for what cannot be
    understood without further hints, and if destination is a directory; OSError.
    """
    for file, what in ((source, "read"), (destination, "write")):
        if file.is_dir():
            raise ValueError(f"{file}: is a directory, must be the file to {what}")
    for option, is_given in (
        ("--lora-dropout", hints.lora_dropout is not None),
        ("--modules-to-save", len(hints.modules_to_save) > 0),
    ):
        if is_given:
            raise ValueError(f"{option}: --merged takes no such option: leave it out")
    state, known, *_, notes, is_own = read_state(source, hints)
    with files.naming(source):
        if is_own:
            raise ValueError(
                "lora_kernels has saved it: its weights have no update in them, load it as it is"
            )
        paths = factor_paths(state)
        keys = {path: _weight_key(path, state) for path in paths}
        alphas = alphas_of(paths, known, hints.lora_alpha)
        convolutions = [path for path in paths if state[keys[path]].dim() > 2]
        linears = [path for path in paths if path not in convolutions]
        layers = read_layers(linears, state, alphas, known, hints)
        check_layers_agree(layers, hints)
        updates = {path: _update(layer, state[keys[path]]) for path, layer in layers.items()}
        for path in convolutions:
            updates[path] = _of_convolution(path, state, keys[path], alphas[path])
        for path, update in updates.items():
            weight = state[keys[path]]
            state[keys[path]] = (weight - update).to(weight.dtype)
    with files.replacing(destination.parent, [destination.name]) as scratch:
        torch.save(state, scratch / destination.name)
    given = sorted({f"{alpha:.15g}" for alpha in alphas.values()})
    lines = [
        f"{destination}: {len(updates)} weights without the update that was in them, with "
        f"lora_alpha {', '.join(given)}"
    ]
    if convolutions:
        lines.append(f"{source}: taken for convolutions: {', '.join(convolutions)}")
    return [*lines, *taken_for(source, layers), *_square(source, layers), *notes]


def _weight_key(path: str, state: Mapping[str, Tensor]) -> str:
    """The key of the base weight of the layer at path."""
    for name in ("weight", "conv.weight"):
        key = join(path, name)
        if key in state:
            if state[key].dim() < 2 or not state[key].is_floating_point():
                raise ValueError(f"{key}: must be a floating-point weight")
            return key
    raise ValueError(
        f"{join(path, 'weight')}: missing: --merged is for a whole state dict, whose weights have "
        f"the update in them; a file of lora_state_dict has none to take it out of"
    )


def _update(layer: AdapterLayer, weight: Tensor) -> Tensor:
    """scaling·lora_B·lora_A of the enabled groups, in weight's layout."""
    acc = torch.promote_types(weight.dtype, torch.float32)
    a, b, spec = layer.lora_A.to(acc), layer.lora_B.to(acc), layer.spec
    update = torch.zeros((layer.base.outputs, layer.base.inputs), dtype=acc)
    if spec.splits is None:
        update = b @ a
    else:
        for columns, rows, ranks in spec.splits.groups(spec.r):
            update[columns] = b[rows] @ a[ranks]
    transposed = layer.base.kind == "embedding" or layer.base.fan_in_fan_out
    if update.shape != weight.shape and update.T.shape == weight.shape:
        transposed = True  # the shapes tell
    update = update.T if transposed else update
    if update.shape != weight.shape:
        raise ValueError(
            f"{layer.path}: weight {list(weight.shape)} does not fit lora_A {list(a.shape)} and "
            f"lora_B {list(b.shape)}"
        )
    return update * spec.scaling


def _of_convolution(path: str, state: Mapping[str, Tensor], key: str, alpha: float) -> Tensor:
    """scaling·lora_B·lora_A of a loralib convolution, in its weight's shape."""
    weight = state[key]
    a, b = (state.get(join(path, name)) for name in ("lora_A", "lora_B"))
    kernel = weight.shape[2]
    if (
        a is None
        or b is None
        or not a.dim() == b.dim() == 2
        or a.shape[0] != b.shape[1]
        or a.shape[0] % kernel
        or b.shape[0] * a.shape[1] != weight.numel()
    ):
        raise ValueError(f"{path}: lora_A and lora_B do not fit weight {list(weight.shape)}")
    acc = torch.promote_types(weight.dtype, torch.float32)
    scaling = alpha / (a.shape[0] // kernel)
    return (b.to(acc) @ a.to(acc) * scaling).view(weight.shape)


def _square(source: Path, layers: Mapping[str, AdapterLayer]) -> list[str]:
    """A line about weights whose layout no shape tells."""
    paths = [
        path
        for path, layer in layers.items()
        if layer.base.inputs == layer.base.outputs
        and not layer.base.fan_in_fan_out
        and layer.base.kind == "linear"
    ]
    if not paths:
        return []
    return [
        f"{source}: square weights, taken as [out, in]: {', '.join(paths)}; give --fan-in-fan-out "
        f"or --embedding NAME if they are not"
    ]
