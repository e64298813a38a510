"""Paths: what a module is called in its model, under wrappers and without them."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import Tensor, nn

from lora_kernels.foreign import ForeignModule, did_you_mean
from lora_kernels.layers.base import LoRALayer
from lora_kernels.quantization import is_quantised, restore

__all__ = [
    "accept_plain_keys", "adapted_layers", "as_names", "check_names_exist", "check_not_quantised",
    "first_few", "in_model_order", "is_inside", "is_named", "join", "load_plain_state",
    "lora_layers", "named_modules", "pattern_without_wrappers", "plain_state", "split", "unwrapped",
    "with_nearest", "without_wrappers", "wrapper_prefix",
]  # fmt: skip

# What wrappers call the module inside: torch.compile, FSDP, checkpoint_wrapper, Fabric.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
            "_forward_module", "_original_module")  # fmt: skip
# Of these, state_dict() does not show any.
_HIDDEN = _WRAPPED[1:]
# Classes of which libraries call it so. In any other class it is the model's own name.
_LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning")
_WRAPPED_BY = {
    "_orig_mod": ("torch._dynamo",),
    "_fsdp_wrapped_module": ("torch.distributed",),
    "_checkpoint_wrapped_module": ("torch.distributed",),
    "_forward_module": _LIGHTNING,
    "_original_module": _LIGHTNING,
    "module": ("torch.nn.parallel", "torch.optim.swa_utils", "deepspeed"),
    "model": _LIGHTNING,
}


# ---- paths as text ----


def join(path: str, name: str) -> str:
    """The path of what is called name in the module at path."""
    return f"{path}.{name}" if path else name


def split(path: str) -> tuple[str, str]:
    """The path of the module that holds what is at path, and its name there."""
    parent, _, name = path.rpartition(".")
    return parent, name


def in_model_order(paths: Iterable[str]) -> list[str]:
    """paths and their parents, ordered as named_modules() if modules are made in this order."""
    tree: dict[str, dict] = {}
    for path in paths:
        node = tree
        for part in path.split(".") if path else ():
            node = node.setdefault(part, {})

    def walk(node: dict[str, dict], parent: str) -> Iterator[str]:
        for name, children in node.items():
            yield join(parent, name)
            yield from walk(children, join(parent, name))

    return list(walk(tree, ""))


def is_inside(path: str, parents: Iterable[str]) -> bool:
    """Whether path is one of parents or lies in one."""
    return any(path == parent or path.startswith(f"{parent}.") for parent in parents)


def is_named(path: str, names: Iterable[str]) -> bool:
    """Whether path is one of names or ends with "." and one."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def first_few(names: Collection[str]) -> str:
    """The first eight of names, for an error."""
    return ", ".join(map(repr, list(names)[:8])) + (", ..." if len(names) > 8 else "")


def with_nearest(name: str, paths: Collection[str]) -> str:
    """name, and the nearest of paths, or of their ends, for an error."""
    ends = dict.fromkeys(split(path)[1] for path in paths)
    nearest = did_you_mean(name, paths if "." in name else ends)
    return repr(name) + (f" (did you mean {nearest!r}?)" if nearest else "")


def as_names(argument: str, names: str | Iterable[str] | None, model: nn.Module) -> list[str]:
    """names, of modules of model, as a list of strings without wrappers.

    Raises: ValueError that names the argument.
    """
    listed = [] if names is None else [names] if isinstance(names, str) else names
    listed = list(listed) if isinstance(listed, Iterable) else [None]
    if not all(isinstance(name, str) and name for name in listed):
        raise ValueError(f"{argument} must be a name or a list of names, got {names!r}")
    paths = [path for path, _ in model.named_modules()] if _has_wrappers(model) else []
    plain = {path: without_wrappers(path, model) for path in paths}
    return [plain.get(name) or without_wrappers(name) for name in listed]


# ---- wrappers ----


def without_wrappers(path: str, model: nn.Module | None = None) -> str:
    """path, or a key of a state dict, as it is in the model without wrappers.

    Every part of it that a wrapper has added is taken off, if model has such a wrapper there,
    because a model may use these names itself: torch.compile's, FSDP's, checkpoint_wrapper's,
    Fabric's, "module" of DDP, DataParallel, AveragedModel and DeepSpeed, "model" of Lightning. A
    LightningModule counts as one if all of its parameters are in "model". Without a model, the
    names that hardly any model uses are taken off: all but "module" and "model".
    """
    return ".".join(part for part, wrapped, _ in _walk(path, model) if not wrapped)


def _walk(path: str, model: nn.Module | None) -> Iterator[tuple[str, bool, nn.Module | None]]:
    """Each part of path, whether a wrapper has added it, and the module that holds it.

    The module is None if model has none there.
    """
    module = model
    for part in path.split("."):
        wrapped = part in _WRAPPED
        while module is not None and (name := _wrapped_name(module)) is not None:
            inside = module._modules[name]
            wrapped = module._modules.get(part) is inside  # by this name or by another
            if wrapped or part in module._parameters or part in module._buffers:
                break
            module = inside  # state_dict() does not show the name
        else:
            wrapped = wrapped and module is None
        yield part, wrapped, module
        module = None if module is None else module._modules.get(part)


def _wrapped_name(module: nn.Module) -> str | None:
    """What a wrapper calls the module inside; None if module is not a wrapper."""
    children = module._modules
    for name, libraries in _WRAPPED_BY.items():
        if children.get(name) is not None and any(
            f"{cls.__module__}.".startswith(f"{library}.")
            for cls in type(module).__mro__
            for library in libraries
        ):
            if name in _WRAPPED:
                return name
            beside = (child for key, child in children.items() if key != name and child is not None)
            held = any(next(child.parameters(), None) is not None for child in beside)
            return None if held or module._parameters else name
    return None


def pattern_without_wrappers(pattern: str) -> str:
    """A regular expression for paths without the parts that only wrappers are called."""
    parts = "|".join(_WRAPPED)
    return re.sub(rf"(?<![\w])(?:{parts})(?:\\?\.|$)|\\?\.(?:{parts})(?!\w)", "", pattern)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of all wrappers around model."""
    inside: ForeignModule = model
    while (name := _wrapped_name(inside)) is not None:
        inside = inside._modules[name]
    return inside


def wrapper_prefix(model: ForeignModule) -> str:
    """What the wrappers around model put in front of every key of model.state_dict()."""
    prefix, inside = "", model
    while (name := _wrapped_name(inside)) is not None:
        if name not in _HIDDEN:
            prefix += f"{name}."
        inside = inside._modules[name]
    return prefix


def _has_wrappers(model: nn.Module) -> bool:
    return any(_wrapped_name(module) is not None for module in model.modules())


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """model.state_dict() as it is without wrappers: without their names, and their own tensors."""
    state = _state_dict(model)
    if not _has_wrappers(model):
        return dict(state)
    return {without_wrappers(k, model): v for k, v in state.items() if not _is_wrappers(k, model)}


def _state_dict(model: nn.Module) -> dict[str, Tensor]:
    restore(model)
    return model.state_dict()


def _is_wrappers(key: str, model: nn.Module) -> bool:
    """Whether a tensor is a wrapper's own, such as n_averaged of an AveragedModel."""
    *_, (_, _, holder) = _walk(key, model)
    return holder is not None and _wrapped_name(holder) is not None


def accept_plain_keys(model: nn.Module) -> None:
    """Has model.load_state_dict() take keys without the names of wrappers inside model as well."""
    hooks = model._load_state_dict_pre_hooks.values()
    if _add_wrappers not in [getattr(hook, "hook", hook) for hook in hooks]:
        model.register_load_state_dict_pre_hook(_add_wrappers)


def _add_wrappers(model: nn.Module, state: dict[str, Tensor], prefix: str, *_) -> None:
    if not _has_wrappers(model):
        return
    for path, module in model.named_modules(remove_duplicate=False):
        parts = _walk(path, model) if path else ()
        shown = ".".join(part for part, wrapped, _ in parts if not (wrapped and part in _HIDDEN))
        plain = without_wrappers(shown, model)
        if plain == shown:
            continue
        for name in (*module._parameters, *module._buffers):
            own, given = prefix + join(shown, name), prefix + join(plain, name)
            if own not in state and given in state:
                state[own] = state.pop(given)


def load_plain_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads entries of plain_state(model), not necessarily all; modules may know others, too."""
    if _has_wrappers(model):
        keys = {without_wrappers(key, model): key for key in _state_dict(model)}
        state = {keys.get(key, key): value for key, value in state.items()}
    model.load_state_dict(state, strict=False)


# ---- modules by their paths ----


def named_modules(
    model: nn.Module, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """model.named_modules() without wrappers, neither as modules nor in the paths."""
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        if remove_duplicate:
            seen.add(id(module))
        wrapped = _wrapped_name(module)
        if wrapped is None:
            yield path, module
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(child, path if name in (wrapped, *_WRAPPED) else join(path, name))

    yield from walk(model, "")


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Path and module of every LoRA layer, r = 0 included."""
    for path, module in named_modules(model):
        if isinstance(module, LoRALayer):
            yield path, module


def adapted_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The LoRA layers that have lora_A and lora_B, by path."""
    return {path: layer for path, layer in lora_layers(model) if layer.has_lora}


def check_names_exist(model: nn.Module, names: Collection[str]) -> None:
    """Every name of modules_to_save means modules that can train. Raises: ValueError if not."""
    paths = [path for path, _ in named_modules(model, remove_duplicate=False)]
    for name in names:
        if not any(is_named(path, [name]) for path in paths):
            ends = dict.fromkeys(split(path)[1] for path in paths if path)
            raise ValueError(
                f"modules_to_save: no module of the model is called {with_nearest(name, paths)}; "
                f"the model has {first_few(ends) or 'none inside'}"
            )
    check_not_quantised(model, [path for path in paths if is_named(path, names)])


def check_not_quantised(model: nn.Module, paths: Collection[str]) -> None:
    """The modules at paths can train as a whole. Raises: ValueError that names what cannot."""
    for path, module in named_modules(model, remove_duplicate=False):
        if is_inside(path, paths) and is_quantised(module):
            raise ValueError(
                f"modules_to_save: {path} ({type(module).__name__}) is quantised, and cannot train "
                f"as a whole: leave it out of the quantisation, or name it in target_modules"
            )
