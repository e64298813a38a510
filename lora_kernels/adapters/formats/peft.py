"""PEFT's directory: adapter_config.json and adapter_model.safetensors, read and written.

peft_config.py handles the first, peft_factors.py the factors of a layer, peft_experts.py those of
experts, peft_variants.py what variants add. A key consists of "base_model.model.", the path of the
module, "base_layer." for what a LoRA layer wraps, and a name.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lora_kernels.adapters import files, mapped
from lora_kernels.adapters.files import naming
from lora_kernels.adapters.formats import peft_experts
from lora_kernels.adapters.formats.adapter import (
    FACTORS,
    MAGNITUDE,
    Adapter,
    AdapterLayer,
    BaseModule,
    Convolution,
    Hints,
    Kind,
    Source,
    renamed,
)
from lora_kernels.adapters.formats.contents import Contents
from lora_kernels.adapters.formats.keys import stripped
from lora_kernels.adapters.formats.peft_config import AdapterConfig, make_config, parse_config
from lora_kernels.adapters.formats.peft_experts import ORIENTED, Stack, Stacks
from lora_kernels.adapters.formats.peft_factors import (
    METADATA,
    Record,
    from_peft,
    parse_records,
    to_peft,
)
from lora_kernels.adapters.formats.peft_moe import rewritten_by_name
from lora_kernels.adapters.formats.peft_saved import all_saved
from lora_kernels.model.paths import is_inside, join, split, without_wrappers

__all__ = ["WEIGHTS", "Encoded", "encode", "read", "recognises", "write"]

_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."
_ENDINGS: dict[Kind, tuple[str, str]] = {
    "linear": ("lora_A.weight", "lora_B.weight"),
    "convolution": ("lora_A.weight", "lora_B.weight"),
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
    "experts": ("lora_A.weight", "lora_B.weight"),
}
_MAGNITUDE = "lora_magnitude_vector"  # of the module; PEFT leaves its ".weight" out
# Names under which PEFT keeps a module that trains as a whole; bias="all" writes their biases too.
_COPIES = ("original_module", "modules_to_save")


def recognises(contents: Contents) -> bool:
    """Whether it is one of PEFT's files, or a directory without any adapter's."""
    return contents.kind == "directory" or contents.path.name in (WEIGHTS, _PICKLE)


# ---- keys ----


def _key(entry: str, kinds: Mapping[str, Kind]) -> str:
    """The key that PEFT gives an entry of an adapter with layers of these kinds."""
    path, name = split(entry)
    if path not in kinds:
        return _PREFIX + entry
    if name in FACTORS:
        homes = peft_experts.homes(p for p, kind in kinds.items() if kind == "experts")
        return f"{_PREFIX}{homes.get(path, path)}.{_ENDINGS[kinds[path]][FACTORS.index(name)]}"
    if name == MAGNITUDE:
        return f"{_PREFIX}{path}.{_MAGNITUDE}"
    return f"{_PREFIX}{path}.base_layer.{name}"


def _factor(key: str) -> tuple[str, str, Kind] | None:
    """Path, lora_A or lora_B, and kind of the layer that a key names; None for another key.

    A convolution has the keys of a linear.
    """
    kinds: tuple[Kind, ...] = ("linear", "embedding")
    for kind in kinds:
        for name, ending in zip(FACTORS, _ENDINGS[kind], strict=True):
            if key.endswith(f".{ending}"):
                return key.removesuffix(f".{ending}"), name, kind
    return None


# ---- reading ----


def read(directory: Path, hints: Hints | None = None, stacks: Stacks | None = None) -> Adapter:
    """The adapter that PEFT or write put into directory, or that of its weights; hints are unused.

    stacks: what target_parameters means in the model, which alone can say it.
    Raises: FileNotFoundError; ValueError, naming file and key, for all that is damaged or does not
    fit together, and for what PEFT offers beyond LoRA. A pickle is never read.
    """
    directory = directory.parent if directory.name in (WEIGHTS, _PICKLE) else directory
    config_path, weights_path = directory / _CONFIG, directory / WEIGHTS
    if not weights_path.is_file() and (directory / _PICKLE).exists():
        raise ValueError(
            f"{directory / _PICKLE}: a pickle can run code and is never read; have PEFT save the "
            f"adapter as {WEIGHTS}"
        )
    for file in (config_path, weights_path):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file")
    raw = files.read_json(config_path)
    with naming(config_path):
        config = parse_config(raw)
        if config.target_parameters and stacks is None:
            raise ValueError(
                "target_parameters: which factors are whose is not in the file: "
                "load_adapter(model, ...) reads it"
            )
        found = stacks(config.target_parameters) if config.target_parameters and stacks else {}
    tensors, metadata = files.read_safetensors(weights_path)
    with naming(f"{weights_path}: metadata {METADATA}"):
        records = parse_records(metadata.get(METADATA, "{}"))

    keys, kinds = _read_keys(tensors, config, weights_path, found)
    own = (keys, kinds, tensors, weights_path, stacks is not None)
    biases = config.variants.take_biases(*own)
    source = Source(config_path, weights_path, lambda entry: keys.get(entry, _key(entry, kinds)))
    for path in sorted(set(records) - set(kinds)):
        raise ValueError(
            f"{weights_path}: metadata {METADATA}: {path}: is not a LoRA layer of the file"
        )
    if not kinds:
        raise ValueError(f"{weights_path}: holds no factors of LoRA")
    factors = {join(path, name) for path in kinds for name in (*FACTORS, MAGNITUDE)}
    with naming(config_path):
        unmatched = config.numbers.unmatched(kinds)
    version = peft_experts.FIXED if ORIENTED in metadata else config.version
    notes = [] if unmatched is None else [f"{config_path}: {unmatched}"]
    older = {path: peft_experts.is_older(stack, version) for path, stack in found.items()}
    unclear = [p for p, stack in found.items() if stack.is_square and older[p] is None]
    if unclear:
        notes.append(
            f"{weights_path}: in and out are equal for {', '.join(unclear)}, and the file does not "
            f"say which version of PEFT wrote it. PEFT before 0.19.1 stored such factors with both "
            f"swapped. They are taken for those of 0.19.1 and later: if an older one wrote them, "
            f'put "peft_version": "0.17.0" into {config_path.name}'
        )
    adapter = Adapter(
        layers={
            path: _read_experts(path, tensors, config, found[path], older[path], source)
            if kind == "experts"
            else _read_layer(path, kind, tensors, config, records.get(path), source)
            for path, kind in kinds.items()
        },
        entries={entry: tensors[key] for entry, key in keys.items() if entry not in factors},
        bias=config.bias,
        modules_to_save=config.modules_to_save,
        target_modules=config.target_modules,
        target_parameters=config.target_parameters,
        restricted=config.restricted,
        base_model=config.base_model,
        keeps_ties=config.keeps_ties,
        trains_b=config.trains_b,
        source=source,
        notes=notes,
        lora_biases=biases,
    )
    strip, _ = stripped(keys)
    if all(strip(entry) == entry for entry in keys):
        return adapter
    with naming(weights_path):
        return renamed(adapter, strip)


def _read_keys(
    keys: Collection[str], config: AdapterConfig, file: Path, stacks: Iterable[str] = ()
) -> tuple[dict[str, str], dict[str, Kind]]:
    """The key of every entry, and the kinds of the layers by path, in the order of the file."""
    found: dict[str, str] = {}
    kinds: dict[str, Kind] = {}
    others = {}
    wrapped = {home: path for path, home in peft_experts.homes(stacks).items()}
    for key in keys:
        if not key.startswith(_PREFIX):
            raise ValueError(f"{file}: {key}: must start with {_PREFIX}")
        factor = _factor(key.removeprefix(_PREFIX))
        if factor is None:
            others[key.removeprefix(_PREFIX)] = key
            continue
        path, name, kind = factor
        if kind == "linear" and without_wrappers(path) in wrapped:
            path, kind = wrapped[without_wrappers(path)], "experts"
        if kinds.setdefault(path, kind) != kind:
            raise ValueError(f"{file}: {key}: {path} has factors of another kind as well")
        found[join(path, name)] = key
    for path in kinds:
        for name, other in (FACTORS, FACTORS[::-1]):
            if join(path, name) not in found:
                raise ValueError(
                    f"{file}: {_key(join(path, name), kinds)}: missing, though "
                    f"{found[join(path, other)]} is there"
                )
    for entry, key in others.items():
        if config.bias == "all" and _as_original(entry, config.modules_to_save) in others:
            continue
        if split(entry.removesuffix(".weight"))[1] == _MAGNITUDE:
            entry = join(split(entry.removesuffix(".weight"))[0], MAGNITUDE)
        holder, name = split(entry)
        path, last = split(holder)
        if holder in kinds and name == "weight":
            raise ValueError(f"{file}: {key}: unexpected, a LoRA layer has it in base_layer")
        entry = join(path, name) if last == "base_layer" and path in kinds else entry
        if entry in found:
            raise ValueError(f"{file}: {key}: unexpected beside {found[entry]}")
        found[entry] = key
    return found, kinds


def _as_original(entry: str, modules_to_save: list[str]) -> str | None:
    """The entry that one inside of _COPIES repeats; None if entry is not inside of them."""
    parts = entry.split(".")
    for i, part in enumerate(parts):
        module = ".".join(parts[:i])
        if part in _COPIES and any(module.endswith(name) for name in modules_to_save):
            return ".".join(parts[:i] + parts[i + 1 :])
    return None


def _read_layer(
    path: str, kind: Kind, tensors: Mapping[str, Tensor], config: AdapterConfig,
    record: Record | None, source: Source,
) -> AdapterLayer:  # fmt: skip
    with naming(source.config):
        spec = config.numbers.of(path)
    entries = [join(path, name) for name in FACTORS]
    a, b = (tensors[source.key(entry)] for entry in entries)
    with naming(source.config):
        b, record = config.variants.dense_b(path, b, spec.r, record)
    for entry, factor in zip(entries, (a, b), strict=True):
        if factor.dtype not in files.FLOATS:
            raise ValueError(f"{source.place(entry)}: dtype must be floating, got {factor.dtype}")
    if a.dim() != b.dim() or a.dim() < 2 or (kind == "embedding" and a.dim() > 2):
        raise ValueError(
            f"{source.place(entries[0])}: shape {list(a.shape)} does not go with "
            f"{source.key(entries[1])}: {list(b.shape)}"
        )
    for entry, factor in zip(entries, (a, b), strict=True):
        if factor.numel() == 0:
            raise ValueError(f"{source.place(entry)}: shape {list(factor.shape)} is empty")
    base = BaseModule(kind, a.shape[1], b.shape[0], kind == "linear" and config.fan_in_fan_out)
    if a.dim() > 2:
        groups = spec.r // b.shape[1] if spec.r % b.shape[1] == 0 else 1  # as lora_B has them
        conv = Convolution(tuple(a.shape[2:]), groups)
        base = BaseModule("convolution", a.shape[1], b.shape[0], conv=conv)
        reason = conv.not_two_convolutions()
        if reason is not None:
            raise ValueError(
                f"{source.place(entries[1])}: no change of the weight does the same as the "
                f"factors: {reason}"
            )
    expected = [spec.r, *a.shape[1:]], [b.shape[0], spec.r, *(1 for _ in b.shape[2:])]
    for entry, factor, shape in zip(entries, (a, b), expected, strict=True):
        if list(factor.shape) != shape:
            raise ValueError(
                f"{source.place(entry)}: shape must be {shape} for a {base.kind} of rank {spec.r} "
                f"(r={spec.r} by r and rank_pattern in {source.config.name}), "
                f"got {list(factor.shape)}"
            )
    magnitude = _read_magnitude(path, base, tensors, spec.use_dora, source)
    layer = AdapterLayer(path, base, spec, a, b, magnitude)
    with naming(source.place(entries[0])):
        return from_peft(layer, record, config.numbers.use_rslora)


def _read_magnitude(
    path: str, base: BaseModule, tensors: Mapping[str, Tensor], use_dora: bool, source: Source
) -> Tensor | None:
    place = source.place(join(path, MAGNITUDE))
    magnitude = tensors.get(source.key(join(path, MAGNITUDE)))
    if not use_dora:
        if magnitude is not None:
            raise ValueError(f"{place}: unexpected, {source.config.name} has no use_dora")
        return None
    if base.kind != "linear":
        raise ValueError(f"{source.config}: use_dora: only linears have it, {path} is {base.kind}")
    if magnitude is None:
        raise ValueError(
            f"{place}: missing, though {source.config.name} has use_dora: save the adapter again, "
            f"or set use_dora to false there for LoRA without a magnitude"
        )
    if magnitude.dtype not in files.FLOATS:
        raise ValueError(f"{place}: dtype must be floating, got {magnitude.dtype}")
    if list(magnitude.shape) != [base.outputs]:
        raise ValueError(f"{place}: shape must be {[base.outputs]}, got {list(magnitude.shape)}")
    return magnitude


def _read_experts(
    path: str, tensors: Mapping[str, Tensor], config: AdapterConfig, stack: Stack,
    older: bool | None, source: Source,
) -> AdapterLayer:  # fmt: skip
    with naming(source.config):
        spec = config.numbers.of(path)
    entries = [join(path, name) for name in FACTORS]
    a, b = (tensors[source.key(entry)] for entry in entries)
    for entry, factor in zip(entries, (a, b), strict=True):
        if factor.dtype not in files.FLOATS:
            raise ValueError(f"{source.place(entry)}: dtype must be floating, got {factor.dtype}")
    factors = peft_experts.from_peft(a, b, spec.r, stack, older)
    if factors is None:
        rows = stack.experts * spec.r
        raise ValueError(
            f"{source.place(entries[0])}: shape must be {[rows, stack.inputs]}, and "
            f"{source.key(entries[1])} {[stack.outputs, rows]}, for {path} of {stack.experts} "
            f"experts and rank {spec.r}, got {list(a.shape)} and {list(b.shape)}"
        )
    base = BaseModule("experts", stack.inputs, stack.outputs)
    _read_magnitude(path, base, tensors, spec.use_dora, source)
    return AdapterLayer(path, base, spec, *factors)


# ---- writing ----


class Encoded(NamedTuple):
    """The content of both files."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: dict

    def write(self, directory: Path) -> None:
        """Puts both files into directory; both are complete before either replaces an older one."""
        with files.replacing(directory, (WEIGHTS, _CONFIG)) as scratch:
            mapped.write_safetensors(scratch / WEIGHTS, self.tensors, self.metadata)
            text = json.dumps(self.config, indent=2, sort_keys=True)
            (scratch / _CONFIG).write_text(text + "\n")


def write(adapter: Adapter, directory: Path, hints: Hints | None = None) -> list[str]:
    """Writes the two files; returns lines about them. Raises: as encode, and OSError."""
    encode(adapter).write(directory)
    problem = rewritten_by_name(adapter.layers.keys() - set(adapter.stacks))
    lines = [
        f"{directory}: LoRA on {len(adapter.layers)} modules, bias={adapter.bias}, "
        f"modules_to_save={sorted(adapter.modules_to_save)}"
    ]
    return lines if problem is None else [*lines, f"warning: {problem}"]


def encode(adapter: Adapter) -> Encoded:
    """The files of an adapter, with its own tensors.

    Raises: ValueError for a value that is not finite, a LoRA layer inside a saved module, layers
    with use_dora beside others without, and a convolution that PEFT cannot express: groups > 1,
    dilation, padding_mode.
    """
    saved = all_saved(adapter)
    kinds = {path: layer.base.kind for path, layer in adapter.layers.items()}
    tensors, records, ranks = {}, {}, {}
    for path, layer in adapter.layers.items():
        if is_inside(path, saved):
            raise ValueError(f"{path}: a LoRA layer cannot lie inside modules_to_save={saved}")
        if layer.spec.use_dora != adapter.use_dora:
            raise ValueError(
                f"{path}: has no use_dora, and others do, which does not fit PEFT's format; save "
                f"lora_state_dict()"
            )
        conv, splits = layer.base.conv, layer.spec.splits
        reason = conv and conv.not_two_convolutions()
        if reason is not None:
            raise ValueError(
                f"{path}: this layer does not fit PEFT's format ({reason}); save lora_state_dict()"
            )
        is_stack = layer.base.kind == "experts"
        factors = peft_experts.to_peft(layer.lora_A, layer.lora_B) if is_stack else to_peft(layer)
        for name, factor in zip(FACTORS, factors, strict=True):
            tensors[_key(join(path, name), kinds)] = factor
        if layer.magnitude is not None:
            tensors[_key(join(path, MAGNITUDE), kinds)] = layer.magnitude
        ranks[path] = layer.spec.r if is_stack else factors[0].shape[0]
        if splits is not None or (conv is not None and not layer.is_two_convolutions):
            records[path] = vars(Record.of(layer.spec))
    for entry, value in adapter.entries.items():
        tensors[_key(entry, kinds)] = value
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not mapped.is_finite(tensor):
            raise ValueError(
                f"save_adapter: {key} is not finite: an adapter cannot hold NaN or infinite values"
            )
        mapped.release()
    metadata = {"format": "pt"}
    if records:
        metadata[METADATA] = json.dumps(records)
    if adapter.stacks:
        metadata[ORIENTED] = "lora_A is on the side of in"
    return Encoded(tensors, metadata, make_config(adapter, ranks, saved))
