"""Paths: what a module is called in its model, under wrappers and without them."""

from collections.abc import Collection, Iterable, Iterator

from torch import nn

from lora_kernels.layers.base import LoRALayer

__all__ = [
    "adapted_layers", "as_names", "check_names_exist", "in_model_order", "is_inside", "is_named",
    "join", "lora_layers", "named_modules", "split", "unwrapped",
]  # fmt: skip

_CHECKPOINTED = "_checkpoint_wrapped_module"


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


def as_names(argument: str, names: str | Iterable[str] | None) -> list[str]:
    """names as a list of strings. Raises: ValueError that names the argument."""
    listed = [] if names is None else [names] if isinstance(names, str) else names
    listed = list(listed) if isinstance(listed, Iterable) else [None]
    if not all(isinstance(name, str) and name for name in listed):
        raise ValueError(f"{argument} must be a name or a list of names, got {names!r}")
    return listed


# ---- modules by their paths ----


def named_modules(
    model: nn.Module, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """model.named_modules() under the paths that model.state_dict() has.

    PyTorch's checkpoint_wrapper adds a part to the paths of model.named_modules() only.
    """
    for path, module in model.named_modules(remove_duplicate=remove_duplicate):
        if _CHECKPOINTED not in module._modules:
            yield ".".join(part for part in path.split(".") if part != _CHECKPOINTED), module


def unwrapped(model: nn.Module) -> nn.Module:
    """model without DistributedDataParallel and torch.compile, which add a prefix to its paths."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            return model


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Path and module of every LoRA layer, r = 0 included."""
    for path, module in named_modules(model):
        if isinstance(module, LoRALayer):
            yield path, module


def adapted_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The LoRA layers that have lora_A and lora_B, by path."""
    return {path: layer for path, layer in lora_layers(model) if layer.has_lora}


def check_names_exist(model: nn.Module, names: Collection[str]) -> None:
    """Every name of modules_to_save means a module. Raises: ValueError for one that does not."""
    paths = [path for path, _ in named_modules(model, remove_duplicate=False)]
    for name in names:
        if not any(is_named(path, [name]) for path in paths):
            raise ValueError(f"modules_to_save: no module of the model is called {name!r}")
