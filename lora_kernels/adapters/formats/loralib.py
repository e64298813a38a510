"""loralib's file: the dict of its lora_state_dict, as torch.save writes it.

It holds factors, biases and modules trained as a whole, under the keys of the model, and nothing
else. The user has to say lora_alpha, which groups of a MergedLinear are enabled, which layers are
embeddings, and which modules were trained as a whole. A file that write has made tells all of it,
see loralib_told.py.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from lora_kernels.adapters import files, mapped
from lora_kernels.adapters.agreement import agreed
from lora_kernels.adapters.formats.adapter import (
    FACTORS,
    MAGNITUDE,
    Adapter,
    AdapterLayer,
    BaseModule,
    Hints,
    Source,
)
from lora_kernels.adapters.formats.contents import Contents
from lora_kernels.adapters.formats.keys import plain_keys
from lora_kernels.adapters.formats.loralib_told import (
    NOTHING,
    Told,
    alpha_of,
    alphas_of,
    metadata_of,
    told,
    told_of_model,
)
from lora_kernels.adapters.untold import Untold
from lora_kernels.checks import check_dropout
from lora_kernels.layers.merged_state_dict import STATE_DICT_VERSION
from lora_kernels.model.paths import first_few, in_model_order, is_inside, is_named, join, split
from lora_kernels.model.targets import LayerSpec, name_targets
from lora_kernels.model.trainable import is_bias
from lora_kernels.spec import OutputSplits

__all__ = [
    "factor_paths", "read", "read_layers", "read_state", "recognises", "taken_for", "write",
]  # fmt: skip

_IF_CONVOLUTION = "if it is one, load the file into the model and call lora_kernels.save_adapter"
# The keys under which scripts, such as loralib's own example, keep a state dict in a larger dict.
_ENVELOPES = ("model_state_dict", "state_dict", "model")
# The key beside a state dict that tells Lightning's file, and what Lightning puts before its keys.
_LIGHTNING, _LIGHTNING_FRONT = "pytorch-lightning_version", "model."
_HEAD = "lm_head"
_MOST_HEADS = 8  # with more that are no factors a file is a whole state dict


def recognises(contents: Contents) -> bool:
    """Whether it may be a pickle, of any content: these have no mark of their own."""
    return contents.kind == "pickle"


# ---- reading ----


def read(file: Path, hints: Hints) -> Adapter:
    """The adapter in a file of loralib's keys; hints have to give lora_alpha.

    Raises: ValueError, naming file and key, for what cannot be read or understood without further
    hints; OSError.
    """
    state, known, saved_too, base_model, notes, _ = read_state(file, hints)
    with files.naming(file):
        check_dropout(hints.dropout, "--lora-dropout")
        paths = factor_paths(state)
        if "" in paths:
            raise ValueError(
                "lora_A, lora_B: a model that is a layer has no name: put it in a module"
            )
        modules = in_model_order([*paths, *(split(key)[0] for key in state)])
        _check_keys(state, set(modules))
        alphas = alphas_of(paths, known, hints.lora_alpha)
        layers = read_layers(paths, state, alphas, known, hints)
        ends = {p for p in layers if layers[p].base.kind == "embedding" or is_named(p, [_HEAD])}
        unmerged = {p for p in ends if known.get(p, NOTHING).lora_alpha is not None}
        named = (*hints.modules_to_save, *saved_too)
        entries, bias, saved = _read_others(state, layers, named, unmerged)
    others = [path for path in modules if not is_inside(path, layers)]
    if any(layers[p].base.kind == "linear" and not known[p].is_all for p in layers):
        doubt = f"{file}: factors do not tell a convolution from a Linear: {_IF_CONVOLUTION}"
        notes.insert(0, doubt)
    return Adapter(
        layers={path: layers[path] for path in modules if path in layers},
        entries=entries,
        bias=bias,
        modules_to_save=[p for p in modules if p in saved and not is_inside(split(p)[0], saved)],
        target_modules=name_targets(layers, others),
        base_model=base_model,
        source=Source(file, file, str),
        notes=[*taken_for(file, layers), *notes],
    )


class FileState(NamedTuple):
    """The state dict in a file, without what scripts and wrappers put around it.

    told: what the file tells of layers, by path; what follows: and of the model. notes: on what
    was around it. is_own: whether this package's layers have saved it, whose weights never have the
    update in them.
    """

    state: dict[str, Tensor]
    told: dict[str, Told]
    modules_to_save: list[str]
    base_model: str | None
    notes: list[str]
    is_own: bool


def read_state(file: Path, hints: Hints) -> FileState:
    """Raises: ValueError, naming the file, for anything but a state dict; OSError."""
    state = files.read_pickle(file)
    dropped = f"{hints.drop_prefix.rstrip('.')}." if hints.drop_prefix else ""
    fronts = [dropped] if dropped else []
    for name in _ENVELOPES:
        if isinstance(state, dict) and _LIGHTNING in state:
            fronts.append(_LIGHTNING_FRONT)
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{file}: must hold a state dict, got {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{file}: {key}: must be a tensor, got {type(value).__name__}")
    with files.naming(file):
        plain, taken = plain_keys(state, fronts)
        if dropped and not any(dropped in part for part in taken):
            raise ValueError(f"--drop-prefix: not every key begins with {dropped!r}")
    notes = [f"{file}: left out of the keys: {part!r}, as a wrapper's" for part in taken]
    metadata = getattr(state, "_metadata", None)
    metadata = metadata if isinstance(metadata, dict) else {}
    with files.naming(file):
        factors = {key: metadata.get(split(key)[0]) for key in state if split(key)[1] in FACTORS}
        known = {split(plain[key])[0]: told(split(key)[0], a) for key, a in factors.items()}
        of_model = told_of_model(metadata.get(""))
    is_told = all(one.is_all for one in known.values())
    if not (notes or is_told) and all(k.startswith(_LIGHTNING_FRONT) for k in plain.values()):
        notes.append(
            f"{file}: every key begins with {_LIGHTNING_FRONT!r}: if that is of a LightningModule "
            f"and not of the model, give --drop-prefix {_LIGHTNING_FRONT}"
        )
    versions = [about.get("version") for about in factors.values() if isinstance(about, dict)]
    state = mapped.map_pickle(file, {plain[key]: value for key, value in state.items()})
    return FileState(state, known, *of_model, notes, STATE_DICT_VERSION in versions)


def factor_paths(state: Iterable[str]) -> list[str]:
    """The paths of the layers whose factors are in a state dict. Raises: ValueError for none."""
    for key in state:
        if split(key)[1] == MAGNITUDE:
            raise ValueError(
                f"{key}: DoRA's, which loralib does not have: load the file into the model, and "
                f"lora_kernels.save_adapter writes it for PEFT"
            )
    paths = sorted({split(key)[0] for key in state if split(key)[1] in FACTORS})
    if not paths:
        raise ValueError("no key ends with lora_A or lora_B")
    return paths


def _check_keys(keys: Iterable[str], modules: Collection[str]) -> None:
    """A model can have these keys. Raises: ValueError that names one that it cannot have."""
    taken = nn.Module()
    for key in keys:
        for name in key.split("."):
            if not name:
                raise ValueError(f"{key}: a name in it is empty")
            if hasattr(taken, name):
                raise ValueError(
                    f"{key}: {name!r} cannot be a name in a model: nn.Module has an attribute of "
                    f"this name"
                )
        if key in modules:
            raise ValueError(f"{key}: is a tensor and the path of other tensors")


def read_layers(
    paths: Collection[str], state: Mapping[str, Tensor], alphas: Mapping[str, float],
    known: Mapping[str, Told], hints: Hints,
) -> dict[str, AdapterLayer]:  # fmt: skip
    """The layers at paths, each of a pair of factors; known: what the file tells of them."""
    enabled = _by_path("--enable-lora", hints.enable_lora, paths)
    sizes = _by_path("--out-splits", hints.out_splits, paths)
    embeddings = _matches("--embedding", hints.embedding, paths)
    layers = {}
    for path in paths:
        a, b = _factors(path, state)
        r, groups = b.shape[1], a.shape[0] // b.shape[1]
        splits, outputs = None, b.shape[0]
        own = known.get(path, NOTHING)
        is_embedding = own.embedding or (path in embeddings and not own.is_all)
        if is_embedding:
            if groups > 1:
                raise ValueError(
                    f"{join(path, 'lora_A')}: shape must be {[r, a.shape[1]]} for an embedding of "
                    f"rank {r}, got {list(a.shape)}"
                )
            base = BaseModule("embedding", a.shape[1], outputs)
        else:
            # Factors of one enabled group look like a Linear's: only a hint with a name tells.
            flags = enabled.get(path, enabled.get("") if groups > 1 else None)
            if groups > 1 or own.splits is not None or (flags is not None and not own.is_all):
                part = sizes.get(path, sizes.get(""))
                splits = _splits(path, own.splits, flags, part, groups, outputs)
                outputs = splits.columns
            transposed = own.fan_in_fan_out or (hints.fan_in_fan_out and not own.is_all)
            base = BaseModule("linear", a.shape[1], outputs, transposed)
        _check_bias(path, state, outputs)
        dropout = hints.dropout if own.lora_dropout is None else own.lora_dropout
        dropout = 0.0 if is_embedding else dropout
        spec = LayerSpec(r, alphas[path], alphas[path] / r, dropout, splits)
        layers[path] = AdapterLayer(path, base, spec, a, b)
    return layers


def _check_bias(path: str, state: Mapping[str, Tensor], outputs: int) -> None:
    """The bias at path, if there is one, is of so many outputs. Raises: ValueError if it is not."""
    bias = state.get(join(path, "bias"))
    if bias is not None and list(bias.shape) != [outputs]:
        raise ValueError(
            f"{join(path, 'bias')}: shape must be [{outputs}], as lora_B has it, got "
            f"{list(bias.shape)}: {_IF_CONVOLUTION}"
        )


def taken_for(file: Path, layers: Mapping[str, AdapterLayer]) -> list[str]:
    """Lines that say what the factors of each module were taken for."""
    kinds = defaultdict(list)
    for path, layer in layers.items():
        kind = layer.base.kind if layer.spec.splits is None else "MergedLinear"
        name = kind[0].upper() + kind[1:]
        sizes = f"{layer.base.inputs}, {layer.base.outputs}"
        kinds[f"{name}({sizes}, r={layer.spec.r})"].append(path)
    return [f"{file}: taken for {call}: {', '.join(paths)}" for call, paths in kinds.items()]


def _factors(path: str, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """lora_A [E·r, in] and lora_B [rows, r] of the layer at path."""
    weight = state.get(join(path, "weight"))
    if any(join(path, f"conv.{name}") in state for name in ("weight", "bias")) or (
        weight is not None and weight.dim() > 2
    ):
        raise ValueError(
            f"{path}: a convolution; PEFT's shapes depend on kernel and channels, which are not "
            f"in its factors: load the file into the model and call lora_kernels.save_adapter"
        )
    for name in FACTORS:
        key = join(path, name)
        if key not in state:
            raise ValueError(f"{key}: missing")
        factor = state[key]
        if factor.dim() != 2 or not factor.is_floating_point() or 0 in factor.shape:
            raise ValueError(
                f"{key}: must be a floating-point matrix, got {factor.dtype} {list(factor.shape)}"
            )
    a, b = (state[join(path, name)] for name in FACTORS)
    if a.shape[0] % b.shape[1]:
        raise ValueError(
            f"{path}: lora_A {list(a.shape)} and lora_B {list(b.shape)} have no rank in common"
        )
    return a, b


def _splits(
    path: str, known: OutputSplits | None, flags: Sequence[int] | None,
    sizes: Sequence[int] | None, count: int, rows: int,
) -> OutputSplits:  # fmt: skip
    """The groups of a MergedLinear of which count are enabled, with so many rows in lora_B."""
    if known is not None:
        given = [None if part is None else list(part) for part in (flags, sizes)]
        flags = agreed(path, "enable_lora", [*map(int, known.enabled)], given[0])
        sizes = agreed(path, "out_splits", [*known.sizes], given[1])
    if flags is None:
        raise Untold(
            f"{path}: a MergedLinear with {count} enabled groups, and the file does not say which",
            "--enable-lora 1,0,1",
            assumed={"enable_lora": (("", (1,) * count),)},
        )
    if set(flags) - {0, 1} or sum(flags) != count:
        raise ValueError(f"{path}: --enable-lora must enable {count} groups, got {list(flags)}")
    sizes = sizes or (rows // count,) * len(flags)
    splits = OutputSplits.of(
        sum(sizes),
        [flag == 1 for flag in flags],
        sizes,
        owner=path,
        names=("--enable-lora", "--out-splits"),
    )
    if splits.rows != rows:
        raise ValueError(
            f"{join(path, 'lora_B')}: must have {splits.rows} rows for groups of sizes "
            f"{list(sizes)} with --enable-lora {list(flags)}, got {rows}: give other --out-splits"
        )
    return splits


def _read_others(
    state: Mapping[str, Tensor], layers: Collection[str], modules_to_save: Sequence[str],
    unmerged: Collection[str],
) -> tuple[dict[str, Tensor], str, set[str]]:  # fmt: skip
    """The entries that are not factors, the adapter's bias, and the modules trained as a whole.

    unmerged: embeddings and heads whose weights, which PEFT keeps too, surely have no update in
    them, as this package tells alpha beside them.
    """
    others = {key: value for key, value in state.items() if split(key)[1] not in FACTORS}
    holders = in_model_order(split(key)[0] for key in others)
    saved = _matches("--modules-to-save", modules_to_save, holders)
    bias, unknown = "none", []
    for key in others:
        path, name = split(key)
        if is_inside(path, saved) or (name == "weight" and path in unmerged):
            continue
        if is_bias(name):
            bias = "lora_only" if path in layers and bias != "all" else "all"
        else:
            unknown.append(key)
    if unknown:
        heads = dict.fromkeys(split(key)[0] for key in unknown)
        what = f"{first_few(unknown)}: neither factors of LoRA nor biases"
        if heads.keys() & layers or len(heads) > _MOST_HEADS:
            raise Untold(f"{what} (of a whole state dict: save lora_state_dict(model) instead)")
        what += " (if no module was trained as a whole, save lora_state_dict(model) instead)"
        raise Untold(what, *(f"--modules-to-save {head}" for head in heads))
    return others, bias, saved


def _by_path(
    option: str, hints: Iterable[tuple[str, Sequence[int]]], paths: Collection[str]
) -> dict[str, Sequence[int]]:
    """The numbers for the modules at paths; under "", those for modules without their own."""
    found: dict[str, Sequence[int]] = {}
    for name, numbers in hints:
        found |= dict.fromkeys(_matches(option, [name], paths) if name else [""], numbers)
    return found


def _matches(option: str, names: Iterable[str], paths: Collection[str]) -> set[str]:
    """The paths that are, or end with, one of names; every name means one at least."""
    matches = set()
    for name in names:
        found = {path for path in paths if is_named(path, [name])}
        if not found:
            raise ValueError(f"{option}: no module in the file is called {name!r}")
        matches |= found
    return matches


# ---- writing ----


def write(adapter: Adapter, file: Path, hints: Hints | None = None) -> list[str]:
    """Writes the file; returns lines that say which layers of loralib it fits.

    Raises: ValueError for a convolution, for DoRA, and if file is a directory; OSError.
    """
    if file.is_dir():
        raise ValueError(f"{file}: is a directory, must be the file to write")
    state, calls = dict(adapter.entries), defaultdict(list)
    for path, layer in adapter.layers.items():
        where = f"{adapter.source.weights}: {path}" if adapter.source else path
        if layer.magnitude is not None:
            raise ValueError(f"{where}: use_dora: loralib has no layer with a magnitude")
        if layer.base.conv is not None:
            raise ValueError(
                f"{where}: a convolution; loralib's factors of one depend on kernel and channels "
                f"of the model: load the adapter with lora_kernels.load_adapter and save "
                f"lora_state_dict(model)"
            )
        state |= {join(path, "lora_A"): layer.lora_A, join(path, "lora_B"): layer.lora_B}
        calls[_call(layer)].append(path)
    state = OrderedDict(state)
    vars(state)["_metadata"] = metadata_of(adapter)
    with files.replacing(file.parent, [file.name]) as scratch:
        files.write_pickle(scratch / file.name, state)
    lines = [f"{file}: LoRA on {len(adapter.layers)} modules; the layers it fits:"]
    return lines + [f"  {call}: {', '.join(paths)}" for call, paths in calls.items()]


def _call(layer: AdapterLayer) -> str:
    """The call of loralib that makes the layer."""
    spec, name = layer.spec, layer.base.kind.capitalize()
    arguments = f"r={spec.r}, lora_alpha={alpha_of(spec):.15g}"
    if spec.splits is not None:
        name = "MergedLinear"
        arguments += f", enable_lora={list(spec.splits.enabled)}"
        if len(set(spec.splits.sizes)) > 1:  # not in loralib
            arguments += f", out_splits={list(spec.splits.sizes)}"
    return f"{name}({arguments})"
