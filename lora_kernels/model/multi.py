"""apply_lora with adapters={...}: several adapters over one model."""

import inspect
import warnings
from collections.abc import Mapping

from torch import nn

from lora_kernels.checks import check_dropout
from lora_kernels.foreign import ForeignModule
from lora_kernels.layers.linear import is_hf_conv1d
from lora_kernels.layers.multi_linear import AdapterSpec, MultiLoRALinear, check_adapter_name
from lora_kernels.model.paths import adapted_layers, named_modules
from lora_kernels.model.place import keep_hooks, replace_modules
from lora_kernels.model.route import adapter_names
from lora_kernels.model.targets import (
    Hyperparameters,
    check_wrappable,
    lora_dtype,
    match_targets,
    no_targets,
    plain_patterns,
)
from lora_kernels.model.trainable import mark_only_lora_as_trainable
from lora_kernels.quantization import is_quantised

__all__ = ["add_adapters", "check_no_named_adapters", "check_only_adapters", "put_adapters"]

_KEYS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern",
    "use_rslora",
)  # fmt: skip


def check_no_named_adapters(model: nn.Module) -> None:
    """apply_lora may add layers of one adapter. Raises: ValueError if there are named ones."""
    names = adapter_names(model)
    if names:
        raise ValueError(
            f"apply_lora: the model has the adapters {', '.join(map(repr, names))}: add further "
            f"ones with adapters={{name: {{...}}}}"
        )


def check_only_adapters(function, given: Mapping) -> None:
    """No argument of apply_lora is given that adapters={...} leaves no sense.

    Raises: ValueError that names it, with the way out.
    """
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ("model", "adapters", "target_modules", "autocast_adapter_dtype"):
            continue
        if parameter.kind is parameter.VAR_KEYWORD or given[name] == parameter.default:
            continue
        way = "all adapters share the base model" if name not in _KEYS else "give it to each"
        way = "nothing merges while there are several" if name == "merge_weights" else way
        way = "only a single adapter has magnitudes" if name == "use_dora" else way
        raise ValueError(
            f"apply_lora: {name} cannot be given with adapters: {way}, got {given[name]!r}"
        )


def add_adapters(
    model: nn.Module, adapters: Mapping[str, Mapping], target_modules, autocast_adapter_dtype: bool
) -> None:
    """What apply_lora does for adapters={...}, after the checks of its other arguments."""
    if not isinstance(adapters, Mapping) or not adapters:
        raise ValueError(
            f"apply_lora: adapters must map at least one name to its options, got {adapters!r}"
        )
    there = adapter_names(model)
    specs: dict[str, dict[str, AdapterSpec]] = {}  # by path, then by adapter
    for name, options in adapters.items():
        if check_adapter_name("apply_lora", name) in there:
            raise ValueError(f"apply_lora: the model has an adapter {name!r} already")
        for path, spec in _targets(model, name, options, target_modules).items():
            specs.setdefault(path, {})[name] = spec
    put_adapters(model, specs, autocast_adapter_dtype)
    mark_only_lora_as_trainable(model)


def put_adapters(
    model: nn.Module,
    specs: Mapping[str, Mapping[str, AdapterSpec]],
    autocast_adapter_dtype: bool = True,
) -> None:
    """Gives the modules at these paths adapters of these names, which they lack.

    Raises: ValueError for a module that cannot have several; then model is unchanged.
    """
    if adapted_layers(model):
        raise ValueError(
            "the model has LoRA layers of one adapter: named adapters go into a model without"
        )
    modules = {path: m for path, m in named_modules(model, False) if path in specs}
    plain = {path: m for path, m in modules.items() if not isinstance(m, MultiLoRALinear)}
    check_wrappable(plain)
    for path, module in plain.items():
        linear = isinstance(module, nn.Linear) or is_hf_conv1d(module)
        if not linear or is_quantised(module):
            raise ValueError(
                f"{path} ({type(module).__name__}) cannot get several adapters: only nn.Linear and "
                f"Hugging Face's Conv1D can, and none that is quantised"
            )
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    layers = {}
    try:
        for path, module in plain.items():
            layers[id(module)] = _wrap(module, specs[path], autocast_adapter_dtype)
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad = flag
        raise
    for path, module in modules.items():
        if isinstance(module, MultiLoRALinear):
            for name, spec in specs[path].items():
                dtype = lora_dtype(module.weight, autocast_adapter_dtype)
                module.add_adapter(name, spec, dtype)
    replace_modules(model, layers)


def _targets(model: nn.Module, name: str, options, target_modules) -> dict[str, AdapterSpec]:
    """The paths of the modules that one adapter is for, with its values there."""
    place = f"apply_lora: adapters[{name!r}]"
    if not isinstance(options, Mapping) or not {"r", "lora_alpha"} <= options.keys():
        raise ValueError(
            f"{place} must be a mapping with r and lora_alpha, such as dict(r=8, lora_alpha=16), "
            f"got {options!r}"
        )
    unknown = [key for key in options if key not in _KEYS]
    if unknown:
        raise ValueError(f"{place} takes {', '.join(_KEYS)}, got {', '.join(map(repr, unknown))}")
    chosen = options.get("target_modules", target_modules)
    targets = match_targets(model, chosen, ())
    if not targets:
        raise ValueError(f"{place}: {no_targets(model, chosen)}")
    numbers = Hyperparameters(
        options["r"],
        options["lora_alpha"],
        check_dropout(options.get("lora_dropout", 0.0), place),
        plain_patterns(options.get("rank_pattern")),
        plain_patterns(options.get("alpha_pattern")),
        options.get("use_rslora", False),
    )
    found = {}
    for path in targets:
        spec = numbers.of(path)
        found[path] = AdapterSpec(spec.r, spec.lora_alpha, spec.lora_dropout, spec.scaling)
    unmatched = numbers.unmatched(found)
    if unmatched is not None:
        warnings.warn(f"{place}: {unmatched}", RuntimeWarning, stacklevel=5)
    return found


def _wrap(
    module: ForeignModule, specs: Mapping[str, AdapterSpec], autocast_adapter_dtype: bool
) -> MultiLoRALinear:
    options = {
        name: {"r": spec.r, "lora_alpha": spec.lora_alpha, "lora_dropout": spec.lora_dropout}
        for name, spec in specs.items()
    }
    dtype = lora_dtype(module.weight, autocast_adapter_dtype)
    layer = MultiLoRALinear.from_linear(module, options, dtype)
    layer.adapters = dict(specs)
    keep_hooks(module, layer)
    return layer
