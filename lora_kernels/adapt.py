"""apply_lora puts LoRA into a model; mark_only_lora_as_trainable decides what trains."""

import dataclasses
import math
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import nn

from lora_kernels import distributed
from lora_kernels.checks import check_alpha, check_dropout, check_rank
from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from lora_kernels.layers.embedding import LoRAEmbedding
from lora_kernels.layers.linear import LoRALinear, is_hf_conv1d
from lora_kernels.layers.merged_linear import LoRAMergedLinear

__all__ = ["apply_lora", "mark_only_lora_as_trainable"]

_BIAS = ("none", "all", "lora_only")
# What mark_only_lora_as_trainable opened, written on the module that holds it ("module" or "bias"),
# where deepcopy and pickle carry it along and state_dict does not see it.
_RECORD = "_trained_with_lora"
_CHECKPOINTED = "_checkpoint_wrapped_module"


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What one wrapped module becomes; enable_lora is set for a LoRAMergedLinear."""

    r: int
    lora_alpha: float
    scaling: float
    enable_lora: tuple[bool, ...] | None = None
    out_splits: tuple[int, ...] | None = None


def apply_lora(
    model: nn.Module,
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    target_modules: str | Iterable[str] = "all-linear",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    bias: str = "none",
    modules_to_save: str | Iterable[str] | None = None,
    merge_weights: bool = True,
    autocast_adapter_dtype: bool = True,
) -> nn.Module:
    """Replaces modules of model by LoRA layers around the same parameters; returns model.

    Wraps nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d and Hugging Face's Conv1D.
    target_modules says which:

    * a list: every module whose path is an entry or ends with "." and an entry;
    * a string: a regular expression that the whole path matches; where it matches nothing, a name
      as in a list;
    * "all-linear": every nn.Linear and Conv1D but ``model.get_output_embeddings()``. Subclasses
      of nn.Linear stay as they are, with a warning: their owner may read the weight without
      calling them, as nn.MultiheadAttention does.

    Nothing inside a module of modules_to_save is wrapped. rank_pattern and alpha_pattern map a
    regular expression for the path or its end to another r or lora_alpha; the first match counts.
    scaling = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora. autocast_adapter_dtype:
    float32 adapters over 16-bit weights. Then mark_only_lora_as_trainable(model, bias,
    modules_to_save). A module of modules_to_save whose parameters are tied to others', such as an
    output head to the input embedding, gets its own copies of them first, as PEFT's do. A module
    under several names is wrapped once and stays shared; forward and backward hooks and train/eval
    mode are kept. A model in eval mode is merged by its next eval().

    Raises: ValueError (NotImplementedError for bias) before anything has changed: bad numbers, a
    pattern that is no regular expression, no match, a match that cannot be wrapped, a model that is
    itself a linear, embedding or convolution (use the from_... constructor of its LoRA layer).
    Source: Hu et al. 2021, arXiv 2106.09685; rsLoRA: Kalajdzievski 2023, arXiv 2312.03732; the
    meaning of the arguments: PEFT's LoraConfig.
    """
    check_bias(bias)
    check_dropout(lora_dropout, "apply_lora")
    saved = as_names("modules_to_save", modules_to_save)
    _check_names_exist(model, saved)
    construct = _constructor(model)
    if construct is not None:
        raise ValueError(
            f"apply_lora: model is itself an nn.{type(model).__name__}, which cannot be replaced "
            f"in place: use {construct.__self__.__name__}.{construct.__name__}(model, r, ...)"
        )
    targets = match_targets(model, target_modules, saved)
    plans = {
        path: plan_layer(path, r, lora_alpha, rank_pattern, alpha_pattern, use_rslora)
        for path in targets
    }
    if not plans:
        raise ValueError(
            f"apply_lora: target_modules={target_modules!r} matches no module; the model has "
            f"{_candidates(model)}"
        )
    check_wrappable(targets)
    del targets  # a second holder of the weights would keep them from being merged
    wrap_modules(model, plans, lora_dropout, merge_weights, autocast_adapter_dtype)
    untie(model, saved_paths(model, saved))
    mark_only_lora_as_trainable(model, bias, saved)
    return model


def mark_only_lora_as_trainable(
    model: nn.Module, bias: str = "none", modules_to_save: str | Iterable[str] | None = None
) -> None:
    """Freezes model but for its LoRA factors, the biases asked for and modules_to_save.

    Trainable: lora_A and lora_B of LoRA layers; other parameters whose own name starts with "lora_"
    stay as they are. bias: "none"; "all" biases (a parameter named bias, ..._bias or bias_...);
    "lora_only": those of LoRA layers. modules_to_save: paths, or ends of paths, of modules that
    train as a whole; lora_state_dict and save_adapter find them again.
    Raises: NotImplementedError for another bias; ValueError for a name that no module has.
    Source: loralib's function; a name in the middle of a path decides nothing here.
    """
    check_bias(bias)
    names = as_names("modules_to_save", modules_to_save)
    _check_names_exist(model, names)
    trainable, left_alone = set(), set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(module, LoRALayer) and name in ("lora_A", "lora_B"):
                trainable.add(id(parameter))
            elif name.startswith("lora_"):
                left_alone.add(id(parameter))
    record_trained(model, bias, names)
    for module in model.modules():
        kind = module.__dict__.get(_RECORD)
        if kind == "module":
            trainable.update(id(parameter) for parameter in module.parameters())
        elif kind == "bias":
            trainable.update(id(module._parameters[name]) for name in bias_names(module))
    for parameter in model.parameters():
        if id(parameter) in trainable:
            parameter.requires_grad = parameter.is_floating_point()
        elif id(parameter) not in left_alone:
            parameter.requires_grad = False


# ---- what trains besides lora_A and lora_B ----


def check_bias(bias) -> None:
    """bias is one of loralib's three values, or a NotImplementedError names it."""
    if bias not in _BIAS:
        raise NotImplementedError(f"bias must be 'none', 'all' or 'lora_only', got {bias!r}")


def as_names(argument: str, names: str | Iterable[str] | None) -> list[str]:
    """names as a list of strings, or a ValueError that names the argument."""
    listed = [] if names is None else [names] if isinstance(names, str) else names
    listed = list(listed) if isinstance(listed, Iterable) else [None]
    if not all(isinstance(name, str) and name for name in listed):
        raise ValueError(f"{argument} must be a name or a list of names, got {names!r}")
    return listed


def record_trained(model: nn.Module, bias: str, modules_to_save: Collection[str]) -> None:
    """Writes down which biases and modules train, replacing what was written before."""
    for module in model.modules():
        module.__dict__.pop(_RECORD, None)
        if bias == "all" and bias_names(module):
            module.__dict__[_RECORD] = "bias"
    if bias == "lora_only":
        for _, layer in lora_layers(model):
            if bias_names(layer._weight_owner()):
                layer._weight_owner().__dict__[_RECORD] = "bias"
    for path, module in named_modules(model, remove_duplicate=False):
        if is_named(path, modules_to_save):
            module.__dict__[_RECORD] = "module"


def bias_names(module: nn.Module) -> list[str]:
    """Names of the parameters that module itself holds and that are biases."""
    return [
        name
        for name, parameter in module._parameters.items()
        if parameter is not None and is_bias(name)
    ]


def is_bias(name: str) -> bool:
    """Whether a parameter of this own name is a bias: bias, in_proj_bias, bias_ih_l0."""
    return name == "bias" or name.endswith("_bias") or name.startswith("bias_")


def recorded_biases(model: nn.Module) -> str:
    """The bias argument that opened the biases of model."""
    owners = {id(m) for m in model.modules() if m.__dict__.get(_RECORD) == "bias"}
    if not owners:
        return "none"
    of_layers = {id(layer._weight_owner()) for _, layer in lora_layers(model) if layer.has_lora}
    return "lora_only" if owners <= of_layers else "all"


def saved_paths(model: nn.Module, modules_to_save: Collection[str] = ()) -> list[str]:
    """Paths of the modules that train as a whole: recorded, or named here; none inside another."""
    _check_names_exist(model, modules_to_save)
    paths: list[str] = []
    for path, module in named_modules(model):
        chosen = module.__dict__.get(_RECORD) == "module" or is_named(path, modules_to_save)
        if chosen and not is_inside(path, paths):
            paths.append(path)
    return paths


def untie(model: nn.Module, paths: Collection[str]) -> None:
    """Gives the modules at paths copies of the parameters that modules beside them hold as well."""
    modules = dict(named_modules(model, remove_duplicate=False))
    for path in paths:
        inside = {id(module) for module in modules[path].modules()}
        copies = {
            id(parameter): parameter
            for module in model.modules()
            if id(module) not in inside
            for parameter in module._parameters.values()
            if parameter is not None
        }
        for parameter in modules[path].parameters():
            if id(parameter) in copies:
                copy = parameter.detach().clone()
                copies[id(parameter)] = nn.Parameter(copy, parameter.requires_grad)
        for module in modules[path].modules():
            for name, parameter in module._parameters.items():
                if id(parameter) in copies:
                    module._parameters[name] = copies[id(parameter)]


def with_tied(model: nn.Module, paths: Collection[str]) -> list[str]:
    """paths, and those of the modules beside them that hold a parameter of theirs as well."""
    modules = dict(named_modules(model, remove_duplicate=False))
    inside = {id(module) for path in paths for module in modules[path].modules()}
    tied = {id(parameter) for path in paths for parameter in modules[path].parameters()}
    return [
        path
        for path, module in named_modules(model)
        if path in paths
        or (id(module) not in inside and not tied.isdisjoint(map(id, module._parameters.values())))
    ]


def join(path: str, name: str) -> str:
    """The path of what is called name in the module at path."""
    return f"{path}.{name}" if path else name


def is_inside(path: str, parents: Collection[str]) -> bool:
    """Whether path is one of parents or lies in one."""
    return any(path == parent or path.startswith(f"{parent}.") for parent in parents)


def is_named(path: str, names: Collection[str]) -> bool:
    """Whether path is one of names or ends with "." and one."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def _check_names_exist(model: nn.Module, names: Collection[str]) -> None:
    paths = [path for path, _ in named_modules(model, remove_duplicate=False)]
    for name in names:
        if not any(is_named(path, [name]) for path in paths):
            raise ValueError(f"modules_to_save: no module of the model is called {name!r}")


def named_modules(
    model: nn.Module, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """model.named_modules() under the paths that model.state_dict() has.

    What PyTorch's checkpoint_wrapper puts around a module is in the paths of the former alone.
    """
    for path, module in model.named_modules(remove_duplicate=remove_duplicate):
        if _CHECKPOINTED not in module._modules:
            yield ".".join(part for part in path.split(".") if part != _CHECKPOINTED), module


def unwrapped(model: nn.Module) -> nn.Module:
    """model without DistributedDataParallel and torch.compile around it, which prefix its paths."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            return model


# ---- which modules become LoRA layers ----


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Path and module of every LoRA layer, r = 0 included."""
    for path, module in named_modules(model):
        if isinstance(module, LoRALayer):
            yield path, module


def match_targets(
    model: nn.Module,
    target_modules: str | Iterable[str],
    modules_to_save: Collection[str] = (),
) -> dict[str, nn.Module]:
    """The modules that target_modules means, by the first of their paths.

    What lies inside a module of modules_to_save or inside a LoRA layer is left out.
    """
    modules = dict(named_modules(model, remove_duplicate=False))
    saved = [path for path in modules if is_named(path, modules_to_save)]
    adapted = [path for path, module in modules.items() if isinstance(module, LoRALayer)]
    first_path = {id(module): path for path, module in reversed(modules.items())}
    chosen = {}
    for path in _matching_paths(model, modules, target_modules):
        parent, _, _ = path.rpartition(".")
        if path and not is_inside(path, saved) and not is_inside(parent, adapted):
            chosen[first_path[id(modules[path])]] = modules[path]
    return chosen


def _matching_paths(model, modules: dict[str, nn.Module], target_modules) -> list[str]:
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        return _linear_paths(model, modules)
    if not isinstance(target_modules, str):
        names = as_names("target_modules", target_modules)
        return [path for path in modules if is_named(path, names)]
    pattern = _compile("target_modules", target_modules)
    matches = [path for path in modules if pattern.fullmatch(path)]
    return matches or [path for path in modules if is_named(path, [target_modules])]


def _linear_paths(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    paths, skipped = [], []
    for path, module in modules.items():
        if module is head or not (isinstance(module, nn.Linear) or is_hf_conv1d(module)):
            continue
        plain = type(module) is nn.Linear or is_hf_conv1d(module) or isinstance(module, LoRALayer)
        (paths if plain else skipped).append(path)
    if skipped:
        warnings.warn(
            f"target_modules='all-linear' leaves subclasses of nn.Linear as they are: "
            f"{', '.join(f'{path} ({type(modules[path]).__name__})' for path in skipped)}",
            stacklevel=5,
        )
    return paths


def plan_layer(
    path: str,
    r: int,
    lora_alpha: float,
    rank_pattern: Mapping[str, int] | None,
    alpha_pattern: Mapping[str, float] | None,
    use_rslora: bool,
) -> LayerPlan:
    """r, lora_alpha and scaling of the module at path, checked."""
    layer = f"LoRA on {path!r}"
    rank = check_rank(_look_up("rank_pattern", rank_pattern, path, r), layer)
    if not 1 <= rank < 2**31:
        raise ValueError(f"{layer}: r must be in [1, 2**31), got {rank}")
    alpha = check_alpha(_look_up("alpha_pattern", alpha_pattern, path, lora_alpha), layer)
    return LayerPlan(rank, alpha, alpha / (math.sqrt(rank) if use_rslora else rank))


def _look_up(argument: str, patterns: Mapping | None, path: str, default):
    if patterns is not None and not isinstance(patterns, Mapping):
        raise ValueError(f"{argument} must map patterns to numbers, got {patterns!r}")
    for pattern, value in (patterns or {}).items():
        if _compile(argument, rf"(.*\.)?({pattern})$").match(path):
            return value
    return default


def _compile(argument: str, pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument}: {pattern!r} is no regular expression: {error}") from None


def _candidates(model: nn.Module) -> str:
    names = {
        path.rpartition(".")[2]
        for path, module in named_modules(model)
        if path and _constructor(module) is not None
    }
    listed = sorted(names)[:8]
    return ", ".join(map(repr, listed)) + (", ..." if len(names) > 8 else "") or "none to wrap"


# ---- putting LoRA layers in their place ----

_CONSTRUCTORS = {
    nn.Linear: LoRALinear.from_linear,
    nn.Embedding: LoRAEmbedding.from_embedding,
    nn.Conv1d: LoRAConv1d.from_conv,
    nn.Conv2d: LoRAConv2d.from_conv,
    nn.Conv3d: LoRAConv3d.from_conv,
}


def _constructor(module: nn.Module):
    return LoRALinear.from_linear if is_hf_conv1d(module) else _CONSTRUCTORS.get(type(module))


def check_wrappable(targets: Mapping[str, nn.Module]) -> None:
    """Every target can be wrapped, or a ValueError names the path and the type of one."""
    for path, module in targets.items():
        kind = type(module).__name__
        if isinstance(module, LoRALayer):
            reason = "it is a LoRA layer already"
        elif _constructor(module) is None:
            reason = (
                "only nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d and Hugging Face's "
                "Conv1D can, and no subclasses of them"
            )
        elif distributed.is_managed(module) or any(
            map(distributed.is_dtensor, module._parameters.values())
        ):
            reason = "its weight is sharded: apply_lora goes before fully_shard"
        elif "weight" not in module._parameters:
            reason = "its weight is computed, not a parameter"
        elif "forward" in module.__dict__:
            reason = "its forward has been replaced"
        else:
            continue
        raise ValueError(f"{path} ({kind}) cannot get a LoRA layer: {reason}")


def wrap_modules(
    model: nn.Module,
    plans: Mapping[str, LayerPlan],
    lora_dropout: float,
    merge_weights: bool,
    autocast_adapter_dtype: bool,
) -> None:
    """Builds every planned layer, then puts all of them in their places.

    Where building one fails, model is as it was.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modules, layers = dict(named_modules(model, remove_duplicate=False)), {}
    try:
        for path, plan in plans.items():
            module = modules[path]
            layers[id(module)] = _wrap(
                module, plan, lora_dropout, merge_weights, autocast_adapter_dtype
            )
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad = flag
        raise
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in layers:
                setattr(parent, name, layers[id(child)])
    for module in model.modules():
        # PyTorch's own inference path of these reads the weights without calling the layers.
        if isinstance(module, nn.TransformerEncoderLayer) and any(lora_layers(module)):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and any(lora_layers(module)):
            module.use_nested_tensor = False


def _wrap(module, plan: LayerPlan, lora_dropout, merge_weights, autocast_adapter_dtype):
    sixteen_bit = module.weight.dtype in (torch.float16, torch.bfloat16)
    options = {
        "merge_weights": merge_weights,
        "lora_dtype": torch.float32 if autocast_adapter_dtype and sixteen_bit else None,
    }
    if not isinstance(module, nn.Embedding):
        options["lora_dropout"] = lora_dropout
    construct = _constructor(module)
    if plan.enable_lora is not None:
        construct = LoRAMergedLinear.from_linear
        options |= {"enable_lora": plan.enable_lora, "out_splits": plan.out_splits}
    training = module.training
    module.training = True  # in eval mode it would be merged while two modules hold its weight
    try:
        layer = construct(module, plan.r, plan.lora_alpha, **options)
    finally:
        module.training = training
    layer.scaling = plan.scaling
    for name, hooks in vars(module).items():
        if name.startswith(("_forward_", "_backward_", "_is_full_backward")):
            setattr(layer, name, hooks)
    return nn.Module.train(layer, training)
