"""Which parameters target_parameters means: stacks of the weights of experts."""

import warnings
from collections.abc import Collection, Iterable

from torch import nn

from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.experts import LoRAExperts, unfit_experts, unfit_stack
from lora_kernels.model.paths import (
    as_names,
    first_few,
    is_inside,
    is_named,
    join,
    named_modules,
    split,
)
from lora_kernels.model.targets import constructor_of, trained_whole

__all__ = ["adapted_parameters", "match_parameters", "name_parameters"]


def match_parameters(
    model: nn.Module,
    target_parameters: Iterable[str] | None,
    modules_to_save: Collection[str] = (),
    wrapped: bool = False,
) -> dict[str, nn.Module]:
    """The experts modules of the parameters that target_parameters means, by parameters' paths.

    An entry means every parameter whose path it is, or whose path ends with "." and it; of a
    module under several paths the first counts. What lies inside a module of modules_to_save is
    left out. wrapped: whether LoRAExperts count as matches, and not as an error.
    Warns: of entries that match nothing, beside others that do.
    Raises: ValueError if nothing matches, or what matches can get no update.
    """
    if isinstance(target_parameters, str):
        raise ValueError(f"target_parameters must be a list of names, got {target_parameters!r}")
    names = as_names("target_parameters", target_parameters, model)
    modules = dict(named_modules(model))
    saved = [path for path in modules if is_named(path, modules_to_save)]
    found, used, left_out = {}, set(), []
    for owner, module in modules.items():
        for name, parameter in module._parameters.items():
            path = join(owner, name)
            matches = [entry for entry in names if is_named(path, [entry])]
            if parameter is None or not matches:
                continue
            used.update(matches)
            if is_inside(owner, saved):
                left_out.append(path)
                continue
            _check_stack(path, module, wrapped)
            found[path] = module
    missing = [name for name in names if name not in used]
    if left_out and not found:
        raise ValueError(
            f"target_parameters={names} matches {first_few(left_out)} alone, which "
            f"{trained_whole(modules_to_save)}"
        )
    if names and not found:
        raise ValueError(
            f"target_parameters={names} matches no parameter; the model has {_candidates(modules)}"
        )
    if missing:
        warnings.warn(
            f"target_parameters: these entries match no parameter, and are ignored: {missing}",
            RuntimeWarning,
            stacklevel=3,
        )
    return found


def adapted_parameters(path: str, layer: LoRALayer) -> list[str]:
    """What path is the layer's: its own, or those of the stacks of LoRAExperts."""
    if isinstance(layer, LoRAExperts):
        return [join(path, name) for name in layer.target_parameters]
    return [path]


def name_parameters(model: nn.Module, paths: Collection[str]) -> list[str]:
    """target_parameters that means the parameters at paths: short names, if they mean no others."""
    everywhere = [
        join(path, name) for path, module in named_modules(model) for name in module._parameters
    ]
    short = sorted({".".join(path.split(".")[-2:]) for path in paths})
    if {path for path in everywhere if is_named(path, short)} == set(paths):
        return short
    return sorted(paths)


def _check_stack(path: str, module: nn.Module, wrapped: bool) -> None:
    owner, name = split(path)
    if wrapped and isinstance(module, LoRAExperts):
        return
    reason: str | None = None
    if not owner:
        reason = "it is the model's own: put the module into another, or use LoRAExperts(module, r)"
    elif constructor_of(module) is not None:
        reason = "it is no stack of the weights of experts: name its module in target_modules"
    else:
        reason = unfit_experts(module) or unfit_stack(module, name)
    if reason is not None:
        raise ValueError(
            f"target_parameters: {path} ({type(module).__name__}) cannot get LoRA: {reason}"
        )


def _candidates(modules: dict[str, nn.Module]) -> str:
    """Ends of paths of parameters that could be meant, for an error."""
    ends = {
        f"{split(path)[1]}.{name}": None
        for path, module in modules.items()
        if path and unfit_experts(module) is None
        for name in module._parameters
        if unfit_stack(module, name) is None
    }
    return ", ".join(map(repr, ends)) or "no stack of the weights of experts"
