"""How an Adapter fits a model: every check that needs both, before anything changes."""

import contextlib
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_kernels.adapters.files import naming
from lora_kernels.adapters.formats.adapter import (
    FACTORS,
    MAGNITUDE,
    Adapter,
    AdapterLayer,
    BaseModule,
    Source,
    own_factors,
)
from lora_kernels.adapters.formats.peft_saved import saved_modules
from lora_kernels.adapters.state_dict import entry_keys
from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.experts import LoRAExperts
from lora_kernels.layers.merged_linear import LoRAMergedLinear
from lora_kernels.layers.multi_linear import AdapterSpec, check_adapter_name
from lora_kernels.model.multi import put_adapters
from lora_kernels.model.parameters import adapted_parameters
from lora_kernels.model.paths import (
    adapted_layers,
    check_not_quantised,
    is_inside,
    join,
    named_modules,
    plain_state,
    split,
    unwrapped,
)
from lora_kernels.model.route import multi_layers
from lora_kernels.model.targets import LayerSpec, check_wrappable, match_targets
from lora_kernels.model.trainable import (
    mark_only_lora_as_trainable,
    with_tied,
)
from lora_kernels.quantization import is_quantised
from lora_kernels.spec import OutputSplits

__all__ = ["Fitted", "fit", "fit_named"]


@dataclass(frozen=True, eq=False)
class Fitted:
    """What a model becomes: its layers by path, then the entries to load, the modules saved.

    The path of a stack of the weights of experts is the parameter's.
    """

    specs: dict[str, LayerSpec]
    state: dict[str, Tensor]
    saved: list[str]


def fit(model: nn.Module, adapter: Adapter, stacks: Collection[str]) -> Fitted:
    """How adapter fits model, after every check that needs both; this changes nothing.

    stacks: paths of the parameters that target_parameters means.
    """
    source, adapted, own = adapter.read_from, adapted_layers(model), plain_state(model)

    def takes_part(path: str) -> bool:
        # What a LoRA layer has besides its factors is not that of a saved module.
        return any(
            key in adapter.entries and not is_inside(key, adapter.layers)
            for key in own
            if is_inside(key, [path])
        )

    paths = [path for path, _ in named_modules(model)]
    saved = saved_modules(paths, adapter.modules_to_save, takes_part)
    saved = with_tied(model, saved) if adapter.keeps_ties else saved
    heads = {split(key)[0] for key in _embedding_keys(model) if key in adapter.entries}
    with naming(source.config):
        check_not_quantised(model, {*saved, *heads})
    with naming(f"{source.config}: target_modules"):
        targets = _targets(model, adapter, adapted)
    trained = entry_keys(model, targets, adapter.bias, saved)
    keys = _embedding_keys(model) | trained
    _check_entries(adapter, {*targets, *stacks}, trained, keys, saved)
    specs: dict[str, LayerSpec] = {}
    state: dict[str, Tensor] = {}
    for path, module in targets.items():
        layer = adapter.layers[path]
        _check_base(layer, module, source)
        a, b = own_factors(layer)
        if isinstance(module, LoRALayer):
            _check_agrees(layer, own[join(path, "lora_A")].shape == a.shape, module, source)
        specs[path] = layer.spec
        state |= {join(path, "lora_A"): a, join(path, "lora_B"): b}
        if layer.magnitude is not None:
            state[join(path, MAGNITUDE)] = layer.magnitude
    for path in stacks:
        layer, (owner, name) = adapter.layers[path], split(path)
        factors = [join(owner, factor) for factor in LoRAExperts.factors_of(name)]
        if adapted and own[factors[0]].shape != layer.lora_A.shape:
            raise ValueError(
                f"{source.place(join(path, 'lora_A'))}: the model has LoRA of rank "
                f"{own[factors[0]].shape[1]} here, the adapter {layer.spec.r}"
            )
        specs[path] = layer.spec
        state |= dict(zip(factors, (layer.lora_A, layer.lora_B), strict=True))
    for key, own_key in keys.items():
        if key in adapter.entries:
            _check_like(source.place(key), adapter.entries[key], own[own_key])
            state[own_key] = adapter.entries[key]
    if adapted or adapter.keeps_ties:
        _check_ties(source, model, state, saved)
    return Fitted(specs, state, saved)


def fit_named(model: nn.Module, adapter: Adapter, name: str) -> Fitted:
    """Makes room for adapter under this name, after every check; its values are not loaded yet."""
    source, modules = adapter.read_from, dict(named_modules(model))
    if adapter.stacks:
        raise ValueError(f"{source.config}: target_parameters: only linears have several adapters")
    targets = set(match_targets(model, adapter.target_modules))
    if adapter.restricted:
        targets &= set(adapter.layers)
    _check_entries(adapter, targets, (), (), ())
    held = {p: m for p, m in multi_layers(model).items() if name in m.adapters}
    for path in sorted(set(held) ^ set(adapter.layers)) if held else ():
        has, lacks = (name, "file") if path in held else ("file", name)
        raise ValueError(f"{source.weights}: {has} has factors for {path!r}, {lacks} does not")
    specs: dict[str, AdapterSpec] = {}
    state: dict[str, Tensor] = {}
    for path, layer in adapter.layers.items():
        _check_base(layer, modules[path], source)
        spec = layer.spec
        if spec.use_dora:
            place = source.place(join(path, MAGNITUDE))
            raise ValueError(
                f"{place}: only a single adapter has magnitudes: load it without a name"
            )
        if layer.base.kind != "linear" or spec.splits is not None:
            raise ValueError(f"{source.place(join(path, 'lora_A'))}: only a linear has several")
        own = held[path].adapters[name] if held else None
        if own is not None and own.r != spec.r:
            place = source.place(join(path, "lora_A"))
            raise ValueError(f"{place}: {name} has rank {own.r} here, the file {spec.r}")
        dropout = spec.lora_dropout if own is None else own.lora_dropout
        specs[path] = AdapterSpec(spec.r, spec.lora_alpha, dropout, spec.scaling)
        for kind, factor in zip(FACTORS, own_factors(layer), strict=True):
            state[join(path, f"{kind}_{name}")] = factor
    if held:
        for path, multi in held.items():
            multi.adapters[name] = specs[path]
    else:
        check_adapter_name("load_adapter", name)
        put_adapters(model, {path: {name: spec} for path, spec in specs.items()})
        mark_only_lora_as_trainable(model)
        for multi in multi_layers(model).values():
            if name in multi.adapters:
                multi.factors(name)[1].requires_grad &= adapter.trains_b
    return Fitted({}, state, [])


def _targets(
    model: nn.Module, adapter: Adapter, adapted: Mapping[str, LoRALayer]
) -> dict[str, nn.Module]:
    """The modules that the adapter means: the LoRA layers, if model has some."""
    targets = match_targets(model, adapter.target_modules, adapter.modules_to_save)
    if adapter.keeps_ties:
        targets |= _tied_targets(model, adapter, targets)
    if adapter.restricted:
        targets = {path: module for path, module in targets.items() if path in adapter.layers}
    if not targets and not adapter.stacks:
        raise ValueError(f"{adapter.target_modules!r} matches no module of the model")
    if not adapted:
        check_wrappable(targets)
        return targets
    own = {p for path, layer in adapted.items() for p in adapted_parameters(path, layer)}
    for path in sorted({*targets, *adapter.stacks} ^ own):
        has, lacks = ("model", "adapter") if path in own else ("adapter", "model")
        raise ValueError(f"the {has} has LoRA on {path!r}, the {lacks} does not")
    return targets


def _tied_targets(
    model: nn.Module, adapter: Adapter, targets: Collection[str]
) -> dict[str, nn.Module]:
    """Further modules that the adapter has factors for, because they are tied to targets."""
    modules = dict(named_modules(model))
    found = [path for path in with_tied(model, list(targets)) if path not in targets]
    tied = {path: modules[path] for path in found if path in adapter.layers}
    if tied:
        warnings.warn(
            f"load_adapter: the factors of {', '.join(tied)} are tied to others in PEFT "
            f"(ensure_weight_tying); here they have the same values, and train by themselves",
            stacklevel=5,
        )
    return tied


def _embedding_keys(model: nn.Module) -> dict[str, str]:
    """Key in the plain model -> key in plain_state(model), of weights that PEFT may store too.

    PEFT does so if the input embedding or the output head is wrapped, or has a new vocabulary.
    """
    keys: dict[str, str] = {}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):
            module = unwrapped(getattr(unwrapped(model), getter)())
            keys |= {
                join(path, "weight"): join(path, "weight")
                for path, candidate in named_modules(model)
                if candidate is module
            }
    return keys


# ---- what does not fit ----


def _check_entries(
    adapter: Adapter,
    targets: Collection[str],
    trained: Collection[str],
    allowed: Collection[str],
    saved: Collection[str],
) -> None:
    """The adapter has exactly the layers and entries that its config and the model ask for.

    trained: keys of what trains besides the factors; allowed: all keys that there may be.
    """
    source = adapter.read_from
    missing = f"missing, though {source.config.name} and the model ask for"
    unexpected = f"unexpected, neither {source.config.name} nor the model asks for it"
    for path in sorted(set(targets) - set(adapter.layers)):
        raise ValueError(f"{source.weights}: lora_A and lora_B of {path!r}: {missing} them")
    for path in sorted(set(adapter.layers) - set(targets)):
        raise ValueError(f"{source.place(join(path, 'lora_A'))}: {unexpected}")
    # PEFT does not count in_proj_bias and its like among the biases.
    required = {key for key in trained if is_inside(key, saved) or split(key)[1] == "bias"}
    for key in sorted(required - set(adapter.entries)):
        raise ValueError(f"{source.place(key)}: {missing} it")
    for key in sorted(set(adapter.entries) - set(allowed)):
        raise ValueError(f"{source.place(key)}: {unexpected}")


def _check_base(layer: AdapterLayer, module: nn.Module, source: Source) -> None:
    """The layer fits module. Raises: ValueError that says what differs."""
    base, kind = BaseModule.of(module), type(module).__name__
    a, b = (source.place(join(layer.path, name)) for name in ("lora_A", "lora_B"))
    reason = base.conv and base.conv.not_two_convolutions()
    if reason is not None:
        raise ValueError(f"{a}: no change of the weight does the same as the factors: {reason}")
    if base.kind != layer.base.kind:
        raise ValueError(
            f"{a}: must be a factor of a {base.kind} for {kind}, got one of a {layer.base.kind}"
        )
    if layer.spec.splits is not None and is_quantised(module):
        raise ValueError(
            f"{b}: must be of one group for a quantised {kind}, got {layer.spec.splits.count}"
        )
    if base.inputs != layer.base.inputs:
        raise ValueError(f"{a}: must have {base.inputs} inputs for {kind}, got {layer.base.inputs}")
    own, got = base.conv, layer.base.conv
    if own is not None and got is not None and own.kernel_size != got.kernel_size:
        raise ValueError(f"{a}: kernel must be {own.kernel_size} for {kind}, got {got.kernel_size}")
    if base.outputs != layer.base.outputs:
        raise ValueError(
            f"{b}: must have {base.outputs} outputs for {kind}, got {layer.base.outputs}"
        )


def _check_agrees(layer: AdapterLayer, fits: bool, module: LoRALayer, source: Source) -> None:
    """module has layer's groups and rank, and lora_A fits. Raises: ValueError that names both."""
    place = source.place(join(layer.path, "lora_A"))
    splits = module.output_splits if isinstance(module, LoRAMergedLinear) else None
    if splits != layer.spec.splits:
        raise ValueError(
            f"{place}: the model has {type(module).__name__} with {_words(splits)}, the adapter "
            f"one with {_words(layer.spec.splits)}"
        )
    if module.use_dora != layer.spec.use_dora:
        raise ValueError(
            f"{place}: the model has use_dora={module.use_dora} here, the adapter "
            f"{layer.spec.use_dora}"
        )
    if module.r != layer.spec.r or not fits:
        raise ValueError(
            f"{place}: the model has LoRA of rank {module.r} here, the adapter {layer.spec.r}"
        )


def _words(splits: OutputSplits | None) -> str:
    if splits is None:
        return "no groups"
    return f"enable_lora={list(splits.enabled)} and out_splits={list(splits.sizes)}"


def _check_like(place: str, stored: Tensor, own: Tensor) -> None:
    """A stored tensor can replace one of the model. Raises: ValueError that says what differs."""
    if stored.shape != own.shape:
        raise ValueError(f"{place}: shape must be {list(own.shape)}, got {list(stored.shape)}")
    if (
        stored.is_floating_point() != own.is_floating_point()
        or stored.is_complex() != own.is_complex()
        or (stored.dtype == torch.bool) != (own.dtype == torch.bool)
    ):
        raise ValueError(f"{place}: dtype must be like {own.dtype}, got {stored.dtype}")


def _check_ties(
    source: Source, model: nn.Module, state: Mapping[str, Tensor], saved: Collection[str]
) -> None:
    """Parameters tied to a module that trains as a whole get the same values from state."""
    keys_of: dict[int, list[str]] = {}
    for owner, module in named_modules(model, remove_duplicate=False):
        for name, parameter in module._parameters.items():
            keys_of.setdefault(id(parameter), []).append(join(owner, name))
    for keys in keys_of.values():
        for key in keys:
            if key not in state or not is_inside(key, saved):
                continue
            for other in keys:
                if other not in state or not torch.equal(state[key], state[other]):
                    raise ValueError(
                        f"{source.weights}: {key} is tied to {other} in the model, but the "
                        f"adapter lacks {other}, or has other values for it: load the adapter "
                        f"into a plain model, which unties them"
                    )
