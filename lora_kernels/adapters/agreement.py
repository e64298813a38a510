"""Options that contradict the files of an adapter, or that nothing in them takes, are refused."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from lora_kernels.model.paths import is_inside, is_named, split

if TYPE_CHECKING:
    from lora_kernels.adapters.formats.adapter import Adapter, AdapterLayer, Hints
    from lora_kernels.spec import OutputSplits

__all__ = ["agreed", "check_agrees", "check_layers_agree"]

_FLOAT32 = 1e-6  # some formats keep alpha so, and users write it as a decimal


def agreed(path: str, name: str, known: Any, given: Any) -> Any:
    """What the file tells, or else the user. Raises: ValueError if they differ."""
    if known is not None and given is not None and known != given:
        raise ValueError(
            f"{path}: the file says {name}={known}, and {given} was given: leave it out"
        )
    return given if known is None else known


def check_agrees(adapter: "Adapter", hints: "Hints", exempt: Collection[str] = ()) -> None:
    """An adapter that was read with hints is as they say.

    exempt: fields of Hints that mean something else to the format, whose reader checks them.
    Raises: ValueError that names layer or option and the values.
    """
    if hints.drop_prefix and "drop_prefix" not in exempt:
        raise ValueError("--drop-prefix: is for loralib's file, and this is none: leave it out")
    check_layers_agree(adapter.layers, hints, exempt)
    saved, holders = adapter.modules_to_save, {split(entry)[0] for entry in adapter.entries}
    for name in hints.modules_to_save:
        as_whole = any(is_named(path, [name]) or is_named(name, [path]) for path in saved)
        if not as_whole and not any(is_named(p, [name]) and is_inside(p, saved) for p in holders):
            raise ValueError(
                f"--modules-to-save: the file says {', '.join(saved) or 'none'}, and {name} was "
                f"given: leave it out"
            )


def check_layers_agree(
    layers: Mapping[str, "AdapterLayer"], hints: "Hints", exempt: Collection[str] = ()
) -> None:
    """As check_agrees, of layers alone."""
    alpha, dropout = hints.lora_alpha, hints.lora_dropout
    linears = [path for path, layer in layers.items() if layer.base.kind == "linear"]
    dropping = [path for path, layer in layers.items() if layer.base.kind != "embedding"]
    for path, layer in layers.items():
        if alpha is None:
            break
        r = layer.lora_A.shape[0] if layer.is_two_convolutions else layer.spec.r
        # loralib knows no other scaling than alpha / r, so there alpha is scaling·r.
        known = (layer.spec.lora_alpha, layer.spec.scaling * r)
        if not any(math.isclose(alpha, one, rel_tol=_FLOAT32) for one in known):
            agreed(path, "lora_alpha", f"{known[0]:.15g}", f"{alpha:.15g}")
    if dropout is not None:
        for path in _some(dropping, "--lora-dropout", "layer with dropout"):
            agreed(path, "lora_dropout", layers[path].spec.lora_dropout, dropout)
    if hints.fan_in_fan_out:
        for path in _some(linears, "--fan-in-fan-out", "linear layer"):
            agreed(path, "fan_in_fan_out", layers[path].base.fan_in_fan_out, True)
    for name in hints.embedding:
        for path in _some(_called(name, layers), "--embedding", f"layer called {name!r}"):
            agreed(path, "kind", layers[path].base.kind, "embedding")
    if "enable_lora" not in exempt:
        _check_splits(layers, "enable_lora", hints.enable_lora, lambda s: [*map(int, s.enabled)])
    _check_splits(layers, "out_splits", hints.out_splits, lambda s: [*s.sizes])


def _check_splits(
    layers: Mapping[str, "AdapterLayer"], name: str,
    hints: Collection[tuple[str, tuple[int, ...]]], of: Callable[["OutputSplits"], list[int]],
) -> None:  # fmt: skip
    """What hints say of the groups of columns; without a name, of layers with several enabled."""
    splits = {path: layer.spec.splits for path, layer in layers.items()}
    groups = {path: sum(s.enabled) for path, s in splits.items() if s is not None}
    stacked = [path for path, count in groups.items() if count > 1] or list(groups)
    given: dict[str, tuple[int, ...]] = {}
    for module, numbers in sorted(hints, key=lambda hint: hint[0] != ""):
        paths = _called(module, layers) if module else stacked
        what = f"layer called {module!r}" if module else "MergedLinear"
        given |= dict.fromkeys(_some(paths, f"--{name.replace('_', '-')}", what), numbers)
    for path, numbers in given.items():
        own = splits[path]
        agreed(path, name, "none" if own is None else of(own), list(numbers))


def _called(name: str, paths: Collection[str]) -> list[str]:
    return [path for path in paths if is_named(path, [name])]


def _some(paths: list[str], option: str, what: str) -> list[str]:
    """paths. Raises: ValueError if there are none, as nothing takes the option then."""
    if not paths:
        raise ValueError(f"{option}: the file has no {what}: leave it out")
    return paths
