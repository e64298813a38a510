"""What a file that convert writes tells beside loralib's keys, for the way back.

loralib's own file leaves all of it to who reads it. Here it is in the metadata that PyTorch keeps
beside a state dict, by the paths of modules, and that load_state_dict() passes over.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_kernels.adapters.agreement import agreed
from lora_kernels.adapters.formats.adapter import Adapter, AdapterLayer
from lora_kernels.adapters.untold import ALPHA, Untold
from lora_kernels.checks import check_alpha, check_dropout
from lora_kernels.model.targets import LayerSpec
from lora_kernels.spec import OutputSplits

__all__ = [
    "NOTHING",
    "Told",
    "alpha_of",
    "alphas_of",
    "metadata_of",
    "told",
    "told_of_model",
]

_ALPHA = "lora_alpha"
_SAVED, _BASE = "modules_to_save", "base_model"  # under the path of the whole model


@dataclass(frozen=True)
class Told:
    """What is told of one layer; None for what is not."""

    lora_alpha: float | None = None
    lora_dropout: float | None = None
    splits: OutputSplits | None = None
    embedding: bool = False
    fan_in_fan_out: bool = False

    @property
    def is_all(self) -> bool:
        """Whether write has made the file, which tells all: what it leaves out is the default."""
        return self.lora_alpha is not None


NOTHING = Told()


def metadata_of(adapter: Adapter) -> OrderedDict[str, dict[str, Any]]:
    """As nn.Module.state_dict() has it beside the entries."""
    whole = {_SAVED: list(adapter.modules_to_save), _BASE: adapter.base_model}
    whole = {name: value for name, value in whole.items() if value}
    return OrderedDict([("", whole), *((p, _of(layer)) for p, layer in adapter.layers.items())])


def _of(layer: AdapterLayer) -> dict[str, Any]:
    spec, base = layer.spec, layer.base
    found: dict[str, Any] = {_ALPHA: alpha_of(spec)}
    if spec.lora_dropout:
        found["lora_dropout"] = spec.lora_dropout
    if spec.splits is not None:
        found["enable_lora"] = list(spec.splits.enabled)
        found["out_splits"] = list(spec.splits.sizes)
    if base.kind == "embedding":
        found["embedding"] = True
    if base.fan_in_fan_out:
        found["fan_in_fan_out"] = True
    return found


def alpha_of(spec: LayerSpec) -> float:
    """lora_alpha of a layer of loralib, which divides it by r."""
    return spec.lora_alpha if spec.scaling == spec.lora_alpha / spec.r else spec.scaling * spec.r


def told(path: str, about: Any) -> Told:
    """What the metadata of the module at path tells. Raises: ValueError for what cannot be."""
    if not isinstance(about, dict):
        return NOTHING
    alpha, dropout = about.get(_ALPHA), about.get("lora_dropout")
    flags: Any
    flags, sizes = about.get("enable_lora"), about.get("out_splits")
    splits = None
    if flags is not None or sizes is not None:
        if not isinstance(sizes, list) or not all(type(size) is int for size in sizes):
            raise ValueError(f"{path}: out_splits must be a list of integers, got {sizes!r}")
        splits = OutputSplits.of(sum(sizes), flags, sizes, owner=path)
    for name in ("embedding", "fan_in_fan_out"):
        if not isinstance(about.get(name, False), bool):
            raise ValueError(f"{path}: {name} must be True or False, got {about[name]!r}")
    dropout = 0.0 if dropout is None and alpha is not None else dropout
    return Told(
        None if alpha is None else check_alpha(alpha, f"{path}: {_ALPHA}"),
        None if dropout is None else check_dropout(dropout, f"{path}: lora_dropout"),
        splits,
        about.get("embedding", False),
        about.get("fan_in_fan_out", False),
    )


def told_of_model(about: Any) -> tuple[list[str], str | None]:
    """modules_to_save and base_model, as the metadata of the model has them. Raises: ValueError."""
    about = about if isinstance(about, dict) else {}
    names, base = about.get(_SAVED, []), about.get(_BASE)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{_SAVED} must be a list of names, got {names!r}")
    if not isinstance(base, (str, type(None))):
        raise ValueError(f"{_BASE} must be a name, got {base!r}")
    return names, base


def alphas_of(
    paths: Iterable[str], known: Mapping[str, Told], hint: float | None
) -> dict[str, float]:
    """lora_alpha of the layers at paths: the file's, else the hint."""
    if hint is not None:
        check_alpha(hint, "--lora-alpha")
    found: dict[str, float] = {}
    for path in paths:
        alpha = known.get(path, NOTHING).lora_alpha
        if alpha is not None and hint is not None:
            agreed(path, _ALPHA, f"{alpha:.15g}", f"{hint:.15g}")  # as convert prints it
        alpha = hint if alpha is None else alpha
        if alpha is None:
            raise Untold("the file does not hold lora_alpha", ALPHA, assumed={"lora_alpha": 1.0})
        found[path] = alpha
    return found
