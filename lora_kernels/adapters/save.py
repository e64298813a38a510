"""save_adapter: from a model to an Adapter, and from that to PEFT's two files."""

import os
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import distributed
from lora_kernels.adapters.formats import peft
from lora_kernels.adapters.formats.adapter import Adapter, AdapterLayer, BaseModule
from lora_kernels.adapters.formats.peft_moe import rewritten
from lora_kernels.adapters.formats.peft_saved import saved_modules
from lora_kernels.adapters.left_out import trained_beside
from lora_kernels.adapters.state_dict import entry_keys
from lora_kernels.foreign import check_no_peft, check_path
from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.conv import ConvLoRA
from lora_kernels.layers.experts import LoRAExperts
from lora_kernels.layers.merged_linear import LoRAMergedLinear
from lora_kernels.layers.mixture import weight_of
from lora_kernels.layers.quantized_linear import LoRAQuantizedLinear
from lora_kernels.model.other_layers import INSTEAD, other_lora_layers
from lora_kernels.model.parameters import adapted_parameters, name_parameters
from lora_kernels.model.paths import (
    adapted_layers,
    as_names,
    first_few,
    is_inside,
    join,
    lora_layers,
    named_modules,
    plain_state,
    split,
    unwrapped,
)
from lora_kernels.model.route import one_adapter
from lora_kernels.model.targets import LayerSpec, name_targets
from lora_kernels.model.trainable import recorded_biases, saved_paths, with_tied

__all__ = ["adapter_of", "save_adapter"]

# The way out for LoRA layers that are not of this package.
_OTHERS = f"{INSTEAD}, or save lora_state_dict(model), which holds all"


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    modules_to_save: str | Iterable[str] | None = None,
    *,
    adapter: str | None = None,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, which PEFT and load_adapter read.

    Saved: every LoRA layer that has factors; the biases and modules that
    mark_only_lora_as_trainable (apply_lora calls it) made trainable; the modules named in
    modules_to_save, and those that are tied to them, because PEFT and load_adapter untie them.
    LoRAMergedLinear and convolutions become PEFT layers of a higher rank with the same update;
    load_adapter gives back the original ones. Both files are complete before either replaces an
    older one. Wrappers around model and in it, such as DistributedDataParallel, FSDP, torch.compile
    and checkpoint_wrapper, leave no trace in the names. One rank or all of them may call this. If
    fully_shard or FSDP has sharded model, every rank has to call it: all gather; for fully_shard
    rank 0 writes, and all return when it has written.
    adapter: which of the adapters of a model with several; it becomes a directory like any other.
    Stacks of the weights of experts are PEFT's target_parameters. Their file says lora_dropout 0,
    because PEFT opens no other.
    dropout_low_rank_only is not in the file: PEFT has no such option.
    Warns: if PEFT would take some of the layers for others, as in some mixtures of experts; if
    dropout is left out; of LoRA layers that are not of this package, and of other parameters that
    train, which are left out.
    Raises: ValueError for a model without LoRA or with adapters of PEFT, a file in the place of the
    directory, a name that no adapter has, a value that is not finite, a LoRA layer inside a saved
    module, biases of experts that train, a layer of a user's own kind, layers with use_dora beside
    others without, and a convolution that PEFT cannot express: groups > 1, dilation, padding_mode.
    """
    check_no_peft("save_adapter", model, "model.save_pretrained(directory) saves them")
    check_path("save_adapter", "directory", directory)
    if Path(directory).is_file():
        raise ValueError(f"save_adapter: directory={str(directory)!r} is a file")
    saved = as_names("modules_to_save", modules_to_save, model)
    neutral, entries = adapter_of(model, saved, adapter)
    encoded = peft.encode(neutral)
    others = other_lora_layers(model, neutral.modules_to_save)
    if others is not None:
        warnings.warn(
            f"save_adapter: these LoRA layers are not of this package, and left out: {others}. "
            f"{_OTHERS}",
            stacklevel=2,
        )
    beside = trained_beside(model, set(entries.values()), neutral.modules_to_save)
    if beside:
        warnings.warn(
            f"save_adapter: parameters that train are not in the directory: {first_few(beside)}. "
            f"Name their modules in modules_to_save, or freeze them before training, as "
            f"mark_only_lora_as_trainable(model) does",
            stacklevel=2,
        )
    stacks = set(neutral.stacks)
    problem = rewritten(unwrapped(model), [path for path in neutral.layers if path not in stacks])
    if problem is not None:
        warnings.warn(f"save_adapter: {problem}", stacklevel=2)
    if stacks and any(layer.spec.lora_dropout for layer in neutral.layers.values()):
        warnings.warn(
            "save_adapter: PEFT refuses lora_dropout beside target_parameters, so the file says 0; "
            "give the layers their dropout again to go on training from it",
            stacklevel=2,
        )
    if not any(map(distributed.is_dtensor, model.state_dict().values())):
        encoded.write(Path(directory))
        return
    try:
        if torch.distributed.get_rank() == 0:
            encoded.write(Path(directory))
    finally:
        torch.distributed.barrier()


def adapter_of(
    model: nn.Module, modules_to_save: Collection[str], name: str | None = None
) -> tuple[Adapter, dict[str, str]]:
    """What LoRA has trained of model, with the whole of modules_to_save, gathered from all ranks.

    With it the keys of its entries, each with that in plain_state(model). name: which of several
    adapters.
    Raises: ValueError for a model that has no LoRA layer or is one itself, and for a name that no
    module has.
    """
    state = plain_state(model)  # first, because this makes FSDP shard its parameters again
    layers = one_adapter("save_adapter", model, name) or adapted_layers(model)
    if not layers or "" in layers:
        what = "has no LoRA layer" if not layers else "is itself a LoRA layer: put it in a module"
        others = other_lora_layers(model)
        if not layers and others is not None:
            what += f" of this package, but {others}. {_OTHERS}"
        raise ValueError(f"save_adapter: the model {what}")

    def takes_part(path: str) -> bool:
        return not any(is_inside(layer, [path]) for layer in layers)

    paths = [path for path, _ in named_modules(model)]
    saved = saved_modules(paths, saved_paths(model, modules_to_save), takes_part)
    saved = with_tied(model, saved)
    bias = recorded_biases(model)
    plain = unwrapped(model)
    base_model = getattr(getattr(plain, "config", None), "_name_or_path", None)
    entries = entry_keys(model, layers, bias, saved)
    modules = {p: layer for p, layer in layers.items() if not isinstance(layer, LoRAExperts)}
    parameters = [p for path, layer in layers.items() for p in adapted_parameters(path, layer)]
    stacks = [path for path in parameters if path not in modules]
    for key in entries:
        path = split(key)[0]
        if path in layers and path not in modules and not is_inside(path, saved):
            raise ValueError(
                f"save_adapter: {key} trains, and PEFT's format has no place for biases of "
                f"experts: save lora_state_dict(model, bias={bias!r})"
            )
    found = Adapter(
        layers={path: _layer(path, layers, state) for path in parameters},
        entries={key: distributed.full_tensor(state[own]) for key, own in entries.items()},
        bias=bias,
        modules_to_save=saved,
        target_modules=name_targets(modules, _beside(model, modules)),
        target_parameters=name_parameters(model, stacks),
        base_model=base_model if isinstance(base_model, str) and base_model else None,
        base_class=_library_class(plain) if hasattr(plain, "config") else None,
    )
    return found, entries


def _library_class(model: nn.Module) -> type | None:
    """The class of model that can be imported: fully_shard and parametrizations make others."""
    for kind in type(model).__mro__:
        home = sys.modules.get(kind.__module__)
        if issubclass(kind, nn.Module) and getattr(home, kind.__name__, None) is kind:
            return kind
    return None


def _layer(path: str, layers: Mapping[str, LoRALayer], state: Mapping[str, Tensor]) -> AdapterLayer:
    if path not in layers:
        experts: Any = layers[split(path)[0]]
        return _stack(path, experts, state)
    layer = layers[path]
    if not isinstance(layer, (nn.Linear, nn.Embedding, ConvLoRA, LoRAQuantizedLinear)):
        raise ValueError(
            f"save_adapter: {path} ({type(layer).__name__}) is no linear, embedding or "
            f"convolution, and PEFT has no layer like it: save lora_state_dict(model)"
        )
    base = BaseModule.of(layer)
    spec = LayerSpec(
        r=layer.r,
        lora_alpha=layer.lora_alpha,
        scaling=layer.scaling,
        lora_dropout=0.0 if base.kind == "embedding" else layer.lora_dropout.p,
        splits=layer.output_splits if isinstance(layer, LoRAMergedLinear) else None,
        use_dora=layer.use_dora,
    )
    # FSDP gives whole factors in the state dict alone; a parametrized layer has none there.
    factors = (state.get(join(path, name), getattr(layer, name)) for name in layer.factor_names)
    whole = (distributed.full_tensor(factor.detach()) for factor in factors)
    return AdapterLayer(path, base, spec, *whole)


def _stack(path: str, layer: LoRAExperts, state: Mapping[str, Tensor]) -> AdapterLayer:
    owner, name = split(path)
    _, n, k = weight_of(layer, name).shape
    spec = LayerSpec(
        r=layer.r[name],
        lora_alpha=layer.lora_alpha[name],
        scaling=layer.scaling[name],
        lora_dropout=layer.lora_dropout.p,
    )
    factors = (state[join(owner, factor)] for factor in layer.factors_of(name))
    a, b = (distributed.full_tensor(factor.detach()) for factor in factors)
    return AdapterLayer(path, BaseModule("experts", k, n), spec, a, b)


def _beside(model: nn.Module, paths: Collection[str]) -> list[str]:
    """Paths that target_modules could mean and that are not those of the layers at paths."""
    own = {id(module) for path, module in named_modules(model) if path in paths}
    all_layers = [path for path, _ in lora_layers(model)]
    return [
        path
        for path, module in named_modules(model, remove_duplicate=False)
        if id(module) not in own and not is_inside(split(path)[0], all_layers)
    ]
