"""lora-kernels inspect: what an adapter's files hold, and what is suspicious about them."""

import argparse
import dataclasses
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from lora_kernels.adapters import files, formats, hub, mapped
from lora_kernels.adapters.formats import peft
from lora_kernels.adapters.formats.adapter import Adapter, AdapterLayer, Hints
from lora_kernels.adapters.formats.contents import CONFIG, look
from lora_kernels.adapters.formats.gguf import contents_of
from lora_kernels.adapters.untold import ALPHA, Untold
from lora_kernels.checks import dtype_name
from lora_kernels.cli.convert import hints_of
from lora_kernels.cli.errors import UsageError
from lora_kernels.model.paths import split

__all__ = ["Inspection", "as_json", "as_text", "inspect", "main"]


def main(options: argparse.Namespace) -> int:
    """Prints what is found."""
    found = inspect(options)
    print(as_json(found) if options.json else as_text(found))
    return 0


@dataclass
class Row:
    """Layers of one kind; name: the end of their paths; scaling: None if no file tells it."""

    name: str
    count: int
    kind: str
    inputs: int
    outputs: int
    r: int
    scaling: float | None
    dtype: str
    dora: bool


@dataclass
class Inspection:
    """What was found. bytes: of the file of weights. tensors: their number."""

    path: str
    format: str
    bytes: int
    tensors: int
    dtypes: dict[str, int]
    base_model: str | None = None
    rows: list[Row] = field(default_factory=list)
    entries: list[str] = field(default_factory=list)
    suspicious: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def inspect(options: argparse.Namespace) -> Inspection:
    """Looks at the adapter that the command line names, and changes nothing.

    Raises: UsageError, in one line, for what is no adapter, or cannot be read as tensors.
    """
    try:
        path = hub.path_of(options.source, "SOURCE")
        hints = hints_of(options)
        name, file = formats.locate(path, options.source_format)
        tensors = _tensors(file)
    except (ValueError, OSError) as error:
        raise UsageError(f"inspect: {' '.join(str(error).split())}") from error
    found = Inspection(
        path=str(path),
        format=name,
        bytes=file.stat().st_size,
        tensors=len(tensors),
        dtypes=dict(Counter(dtype_name(tensor.dtype) for tensor in tensors.values())),
    )
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not mapped.is_finite(tensor):
            found.suspicious.append(f"{key}: holds NaN or infinite values")
        mapped.release()
    _read(found, name, file, hints)
    return found


def _tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file, unchecked. Raises: ValueError, OSError."""
    contents = look(file)
    if contents.kind == "directory":
        raise FileNotFoundError(
            f"{file}: holds no file of weights, such as PEFT's {peft.WEIGHTS} (beside {CONFIG})"
        )
    if contents.kind == "gguf":
        return contents_of(file)[1]
    if contents.kind == "safetensors":
        with files.unchecked():
            return files.read_safetensors(file)[0]
    state = files.read_pickle(file)
    for name in ("model_state_dict", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    values = state.items() if isinstance(state, dict) else ()
    return {str(key): value for key, value in values if isinstance(value, Tensor)}


def _read(found: Inspection, name: str, file: Path, hints: Hints) -> None:
    """Adds what the format's reader makes of the file, or why it makes nothing of it."""
    told = True
    with files.unchecked():
        try:
            adapter = formats.FORMATS[name].read(file, hints)
        except (ValueError, OSError) as error:
            missing = isinstance(error, Untold) and ALPHA in error.options
            found.suspicious.append(" ".join(str(error).split()))
            if not missing:
                return
            told = False
            try:
                adapter = formats.FORMATS[name].read(file, dataclasses.replace(hints, lora_alpha=1))
            except Untold:  # the first one has it all
                return
            except (ValueError, OSError) as another:
                found.suspicious.append(" ".join(str(another).split()))
                return
    found.base_model = adapter.base_model
    found.rows = _rows(adapter, told)
    found.entries = sorted(adapter.entries)
    found.notes = [str(note) for note in adapter.notes]
    found.suspicious += _suspicious(adapter, hints)


def _rows(adapter: Adapter, told: bool) -> list[Row]:
    groups: dict[tuple, list[AdapterLayer]] = defaultdict(list)
    for path, layer in adapter.layers.items():
        base, spec = layer.base, layer.spec
        kind = base.kind if spec.splits is None else "merged linear"
        sizes = (kind, base.inputs, base.outputs, layer.lora_B.shape[1])
        scaling, dora = spec.scaling if told else None, layer.magnitude is not None
        row = (split(path)[1], *sizes, scaling, dtype_name(layer.lora_A.dtype), dora)
        groups[row].append(layer)
    return [Row(key[0], len(layers), *key[1:]) for key, layers in groups.items()]


def _suspicious(adapter: Adapter, hints: Hints) -> list[str]:
    zero = [
        path
        for path, layer in adapter.layers.items()
        if not (layer.lora_A if layer.base.kind == "embedding" else layer.lora_B).any()
    ]
    mapped.release()
    lines = []
    if zero:
        every = " (all)" if len(zero) == len(adapter.layers) else ""
        many = f"{len(zero)} of {len(adapter.layers)} layers{every}"
        lines.append(f"no update, as before training, in {many}: {zero[0]}")
    odd = [path for path, layer in adapter.layers.items() if layer.spec.scaling <= 0]
    if odd:
        lines.append(f"scaling is not positive in {len(odd)} layers: {odd[0]}")
    dtypes = {dtype_name(layer.lora_A.dtype) for layer in adapter.layers.values()}
    if len(dtypes) > 1:
        lines.append(f"factors have several dtypes: {', '.join(sorted(dtypes))}")
    strange = [path for path in adapter.layers if not _is_plain(path)]
    if strange:
        lines.append(f"{len(strange)} names that no plain model has: {strange[0]}")
    if hints.base.paths is not None:
        absent = [path for path in adapter.layers if path not in set(hints.base.paths)]
        if absent:
            lines.append(f"{len(absent)} layers are not in {hints.base.place}: {absent[0]}")
    blocks = defaultdict(set)
    for path in adapter.layers:
        numbers = [part for part in path.split(".") if part.isdigit()]
        if len(numbers) == 1:
            blocks[path.replace(f".{numbers[0]}.", ".N.")].add(int(numbers[0]))
    seen = set().union(*blocks.values()) if blocks else set()
    for path, held in blocks.items():
        gaps = set(range(min(seen), max(seen) + 1)) - held
        if gaps and len(gaps) < len(seen):
            lines.append(f"{path}: not in block {', '.join(map(str, sorted(gaps)[:8]))}")
    return lines


def _is_plain(path: str) -> bool:
    """Whether a model without wrappers can have a module at path."""
    odd = {"base_layer", "module", "_orig_mod", "lora_A", "lora_B", "default"}
    parts = path.split(".")
    flat = len(parts) == 1 and path.count("_") > 3
    return not (odd & set(parts)) and not flat and all(parts)


def as_json(found: Inspection) -> str:
    """One JSON object."""
    return json.dumps(dataclasses.asdict(found), indent=2)


def as_text(found: Inspection) -> str:
    """A table, for people."""
    dtypes = ", ".join(f"{count} {name}" for name, count in found.dtypes.items())
    size = f"{found.bytes / 1e6:.3g} MB, {found.tensors} tensors ({dtypes})"
    lines = [f"{found.path}: {found.format}, {size}"]
    if found.base_model:
        lines.append(f"base model: {found.base_model}")
    header = ("layers", "x", "kind", "in", "out", "r", "scaling", "dtype")
    table: list[tuple[str, ...]] = [header] if found.rows else []
    for row in found.rows:
        scaling = "not told" if row.scaling is None else f"{row.scaling:.6g}"
        kind = f"{row.kind}, DoRA" if row.dora else row.kind
        sizes = (row.inputs, row.outputs, row.r)
        table.append((row.name, str(row.count), kind, *map(str, sizes), scaling, row.dtype))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        lines.append("  " + "  ".join(map(str.ljust, cells, widths)).rstrip())
    if found.entries:
        lines.append(f"also: {', '.join(found.entries[:8])}" + ", ..." * (len(found.entries) > 8))
    lines += [f"note: {note}" for note in found.notes]
    lines += [f"suspicious: {line}" for line in found.suspicious]
    return "\n".join(lines)
