"""Which modules target_modules means, and what each of them becomes."""

import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import distributed
from lora_kernels.checks import check_alpha, check_rank
from lora_kernels.foreign import ForeignModule
from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from lora_kernels.layers.embedding import LoRAEmbedding
from lora_kernels.layers.linear import LoRALinear, is_hf_conv1d
from lora_kernels.layers.quantized_linear import LoRAQuantizedLinear
from lora_kernels.model.paths import (
    as_names,
    first_few,
    is_inside,
    is_named,
    join,
    named_modules,
    pattern_without_wrappers,
    split,
    unwrapped,
    with_nearest,
)
from lora_kernels.quantization import FrozenWeight, find, is_quantised
from lora_kernels.spec import OutputSplits

__all__ = [
    "Hyperparameters", "LayerSpec", "candidates", "check_dora", "check_wrappable",
    "constructor_name", "constructor_of", "lora_dtype", "match_targets", "name_targets",
    "no_targets", "plain_patterns", "trained_whole", "unmatched_names",
]  # fmt: skip


# ---- what a module becomes ----


@dataclass(frozen=True)
class LayerSpec:
    """The values of one LoRA layer that are not tensors; splits: those of a LoRAMergedLinear."""

    r: int
    lora_alpha: float
    scaling: float
    lora_dropout: float = 0.0
    splits: OutputSplits | None = None
    use_dora: bool = False
    dropout_low_rank_only: bool = False


@dataclass(frozen=True)
class Hyperparameters:
    """Arguments of apply_lora: the numbers for all layers, and by pattern other ones for some."""

    r: int | None  # None: the patterns have to say it of every path
    lora_alpha: float | None
    lora_dropout: float = 0.0
    rank_pattern: Mapping[str, int] | None = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] | None = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    dropout_low_rank_only: bool = False

    def of(self, path: str) -> LayerSpec:
        """What the module at path becomes. Raises: ValueError that names it, for a bad number."""
        layer = f"LoRA on {path!r}"
        r = _look_up("rank_pattern", self.rank_pattern, path, self.r)
        alpha = _look_up("alpha_pattern", self.alpha_pattern, path, self.lora_alpha)
        missing = [name for name, value in (("r", r), ("lora_alpha", alpha)) if value is None]
        if missing:
            raise ValueError(
                f"{layer}: {' and '.join(missing)} must be given, as in apply_lora(model, r=8, "
                f"lora_alpha=16), got None"
            )
        rank = check_rank(r, layer)
        if not 1 <= rank < 2**31:
            raise ValueError(f"{layer}: r must be in [1, 2**31), got {rank}")
        alpha = check_alpha(alpha, layer)
        scaling = alpha / (math.sqrt(rank) if self.use_rslora else rank)
        return LayerSpec(
            rank,
            alpha,
            scaling,
            self.lora_dropout,
            use_dora=self.use_dora,
            dropout_low_rank_only=self.dropout_low_rank_only,
        )

    def unmatched(self, paths: Collection[str]) -> str | None:
        """A sentence about patterns that match none of paths; None if there are none."""
        unused = {
            argument: [
                pattern
                for pattern in patterns or ()
                if not any(_match(argument, pattern, path) for path in paths)
            ]
            for argument, patterns in (
                ("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern),
            )
        }  # fmt: skip
        told = [
            f"{argument}: {', '.join(with_nearest(pattern, paths) for pattern in patterns)}"
            for argument, patterns in unused.items()
            if patterns
        ]
        if not told:
            return None
        return f"these keys match no module that gets LoRA, and are ignored: {'; '.join(told)}"


def unmatched_names(model: nn.Module, target_modules: str | Iterable[str]) -> str | None:
    """A sentence about names in a list of target_modules that no module has; None if all have."""
    if isinstance(target_modules, str):
        return None
    paths = [path for path, _ in named_modules(model, remove_duplicate=False) if path]
    names = as_names("target_modules", target_modules, model)
    unused = [name for name in names if not any(is_named(path, [name]) for path in paths)]
    if not unused:
        return None
    listed = ", ".join(with_nearest(name, paths) for name in unused)
    return f"these names in target_modules match no module, and are ignored: {listed}"


def plain_patterns(patterns: Mapping | None) -> Mapping | None:
    """rank_pattern or alpha_pattern without the names of wrappers; the first of two counts."""
    if not isinstance(patterns, Mapping):
        return patterns
    plain: dict = {}
    for pattern, value in patterns.items():
        plain.setdefault(pattern_without_wrappers(str(pattern)), value)
    return plain


def _match(argument: str, pattern: str, path: str) -> re.Match | None:
    return _compile(argument, rf"(.*\.)?({pattern})$").match(path)


def _look_up(argument: str, patterns: Mapping | None, path: str, default):
    if patterns is not None and not isinstance(patterns, Mapping):
        raise ValueError(f"{argument} must map patterns to numbers, got {patterns!r}")
    for pattern, value in (patterns or {}).items():
        if _match(argument, pattern, path):
            return value
    return default


def _compile(argument: str, pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument}: {pattern!r} is not a regular expression: {error}") from None


# ---- which modules ----


def match_targets(
    model: nn.Module,
    target_modules: str | Iterable[str],
    modules_to_save: Collection[str] = (),
    parameters: Collection[str] = (),
) -> dict[str, nn.Module]:
    """The modules that target_modules means, by the first of their paths.

    What lies inside a module of modules_to_save or inside a LoRA layer is left out. parameters:
    paths of those that get LoRA by themselves.
    """
    modules = dict(named_modules(model, remove_duplicate=False))
    saved = [path for path in modules if is_named(path, modules_to_save)]
    adapted = [path for path, module in modules.items() if isinstance(module, LoRALayer)]
    first_path = {id(module): path for path, module in reversed(modules.items())}
    chosen = {}
    for path in _matching_paths(model, modules, target_modules, parameters):
        if path and not is_inside(path, saved) and not is_inside(split(path)[0], adapted):
            chosen[first_path[id(modules[path])]] = modules[path]
    return chosen


def no_targets(
    model: nn.Module, target_modules: str | Iterable[str], modules_to_save: Collection[str] = ()
) -> str:
    """A sentence that says why match_targets finds nothing."""
    modules = dict(named_modules(model, remove_duplicate=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # match_targets has given them
        paths = [path for path in _matching_paths(model, modules, target_modules, ()) if path]
    if not paths:
        has = candidates(model)
        return f"target_modules={target_modules!r} matches no module; the model has {has}"
    saved = [path for path in modules if is_named(path, modules_to_save)]
    reason = "is inside a LoRA layer already"
    if any(is_inside(path, saved) for path in paths):
        reason = trained_whole(modules_to_save)
    return f"target_modules={target_modules!r} matches {first_few(paths)} alone, which {reason}"


def trained_whole(modules_to_save: Collection[str]) -> str:
    """Why what lies in a module of modules_to_save gets no LoRA, for an error."""
    return (
        f"modules_to_save={list(modules_to_save)!r} trains as a whole, without LoRA: name it in "
        f"one of the two"
    )


def _matching_paths(
    model, modules: dict[str, nn.Module], target_modules, parameters: Collection[str]
) -> list[str]:
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        return _linear_paths(model, modules, parameters)
    if not isinstance(target_modules, str):
        names = as_names("target_modules", target_modules, model)
        return [path for path in modules if is_named(path, names)]
    pattern = _compile("target_modules", pattern_without_wrappers(target_modules))
    matches = [path for path in modules if pattern.fullmatch(path)]
    names = as_names("target_modules", target_modules, model)
    return matches or [path for path in modules if is_named(path, names)]


def _linear_paths(
    model: nn.Module, modules: dict[str, nn.Module], parameters: Collection[str]
) -> list[str]:
    try:
        inside: ForeignModule = unwrapped(model)
        head = unwrapped(inside.get_output_embeddings())
    except (AttributeError, NotImplementedError):
        head = None
    paths: list[str] = []
    skipped: list[str] = []
    for path, module in modules.items():
        linear = isinstance(module, nn.Linear) or constructor_of(module) in _OF_LINEARS
        if module is head or not linear:
            continue
        taken = constructor_of(module) is not None or isinstance(module, LoRALayer)
        (paths if taken else skipped).append(path)
    if skipped:
        warnings.warn(
            f"target_modules='all-linear' leaves subclasses of nn.Linear as they are: "
            f"{', '.join(f'{path} ({type(modules[path]).__name__})' for path in skipped)}",
            stacklevel=5,
        )
    stacked = _stacked_weights(modules, parameters)
    if stacked:
        warnings.warn(
            f"target_modules='all-linear' leaves out stacks of matrices that are parameters "
            f"and no modules, such as the weights of experts: {', '.join(stacked)}. LoRA "
            f"goes into the other linear modules alone; target_parameters takes such weights of "
            f"experts",
            stacklevel=5,
        )
    return paths


def _stacked_weights(modules: Mapping[str, nn.Module], parameters: Collection[str]) -> list[str]:
    """Parameters [stack, rows, columns] of modules that are no kind of torch's; * for numbers.

    Those that parameters names, and those of LoRA layers, are left out.
    """
    found: dict[str, None] = {}
    for path, module in modules.items():
        kinds = set(type(module).__mro__) - {nn.Module}
        if any(kind.__module__.startswith("torch.nn.") for kind in kinds):
            continue
        if isinstance(module, LoRALayer):
            continue
        for name, parameter in module._parameters.items():
            if join(path, name) in parameters:
                continue
            if parameter is not None and parameter.dim() == 3 and 1 not in parameter.shape:
                found[re.sub(r"(?<=\.)\d+(?=\.)", "*", f".{join(path, name)}")[1:]] = None
    return list(found)


def name_targets(paths: Iterable[str], others: Collection[str]) -> list[str] | str:
    """target_modules that means the modules at paths, and none of those at others.

    It is a list of paths if that means no others. Otherwise it is a regular expression: in a list,
    "lin" would mean "block.lin" too.
    """
    paths = sorted(paths)
    if any(is_named(other, paths) for other in others):
        return "|".join(map(re.escape, paths))
    return paths


# ---- which modules can become LoRA layers ----

_CONSTRUCTORS: dict[type[nn.Module], Callable[..., LoRALayer]] = {
    nn.Linear: LoRALinear.from_linear,
    nn.Embedding: LoRAEmbedding.from_embedding,
    nn.Conv1d: LoRAConv1d.from_conv,
    nn.Conv2d: LoRAConv2d.from_conv,
    nn.Conv3d: LoRAConv3d.from_conv,
}

# What constructor_of returns for linears.
_OF_LINEARS = (LoRALinear.from_linear, LoRAQuantizedLinear)


def constructor_of(module: nn.Module) -> Callable[..., LoRALayer] | None:
    """What wraps a module of this kind: from_linear, from_embedding, from_conv, ..., or None."""
    if is_hf_conv1d(module):
        return LoRALinear.from_linear
    if is_quantised(module):
        return LoRAQuantizedLinear
    return _CONSTRUCTORS.get(type(module))


def constructor_name(construct: Any) -> str:
    """What constructor_of returns, as a user would write it."""
    if isinstance(construct, type):
        return construct.__name__
    return f"{construct.__self__.__name__}.{construct.__name__}"


def candidates(model: nn.Module) -> str:
    """Names of the modules that could be wrapped, for an error."""
    names = {
        split(path)[1]
        for path, module in named_modules(model)
        if path and constructor_of(module) is not None
    }
    return first_few(sorted(names)) or "none to wrap"


def check_dora(targets: Mapping[str, nn.Module], parameters: Collection[str]) -> None:
    """Every target can get a magnitude. Raises: ValueError that names the first that cannot."""
    no_linear = [
        f"{path} ({type(module).__name__})"
        for path, module in targets.items()
        if constructor_of(module) not in (None, *_OF_LINEARS)
    ]
    for name in (*no_linear, *(f"target_parameters: {path}" for path in parameters)):
        raise ValueError(
            f"{name} cannot get a LoRA layer with use_dora: only nn.Linear, quantised linears "
            f"and Hugging Face's Conv1D can"
        )


def check_wrappable(targets: Mapping[str, nn.Module]) -> None:
    """Every target can be wrapped. Raises: ValueError that names path, type and reason."""
    for path, module in targets.items():
        kind = type(module).__name__
        if isinstance(module, LoRALayer):
            reason = "it is a LoRA layer already"
        elif is_quantised(module):
            found = find(module)
            if isinstance(found, FrozenWeight):
                continue
            reason = found.reason
        elif constructor_of(module) is None:
            reason = (
                "only nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d and Hugging Face's "
                "Conv1D can, and their subclasses cannot"
            )
        elif distributed.is_managed(module) or any(
            map(distributed.is_dtensor, module._parameters.values())
        ):
            reason = "its weight is sharded: call apply_lora before fully_shard or FSDP"
        elif (weight := module._parameters.get("weight")) is None:
            reason = "its weight is computed, not a parameter"
        elif not weight.is_floating_point():
            reason = f"its weight is {weight.dtype}, which no formula of LoRA can take"
        elif "forward" in module.__dict__:
            reason = "its forward has been replaced"
        else:
            continue
        raise ValueError(f"{path} ({kind}) cannot get a LoRA layer: {reason}")


# ---- what its factors are made of ----


def lora_dtype(weight: Tensor | FrozenWeight, autocast_adapter_dtype: bool) -> torch.dtype | None:
    """The dtype of factors over weight: float32 over 16 bits if asked for; None: the weight's."""
    sixteen_bit = weight.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if autocast_adapter_dtype and sixteen_bit else None
