"""load_adapter: an Adapter is put into a model that it fits."""

import functools
import logging
import operator
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from lora_kernels import distributed
from lora_kernels.adapters import hub
from lora_kernels.adapters.advice import in_python
from lora_kernels.adapters.agreement import check_agrees
from lora_kernels.adapters.files import naming
from lora_kernels.adapters.fit import fit, fit_named
from lora_kernels.adapters.formats import FORMATS, locate, peft
from lora_kernels.adapters.formats.adapter import Adapter, Hints, renamed
from lora_kernels.adapters.formats.base import Base
from lora_kernels.adapters.formats.peft_experts import Stack
from lora_kernels.adapters.untold import Untold
from lora_kernels.checks import check_alpha
from lora_kernels.foreign import ForeignModule, Model, check_no_peft, check_path
from lora_kernels.layers.mixture import weight_of
from lora_kernels.model.apply import wrap_modules
from lora_kernels.model.parameters import match_parameters
from lora_kernels.model.paths import (
    adapted_layers,
    join,
    load_plain_state,
    named_modules,
    plain_state,
    split,
)
from lora_kernels.model.route import multi_layers
from lora_kernels.model.trainable import (
    check_bias,
    mark_only_lora_as_trainable,
    record_trained,
    untie,
)

__all__ = ["load_adapter"]

_log = logging.getLogger("lora_kernels")


def load_adapter(
    model: Model,
    directory: str | os.PathLike,
    *,
    merge_weights: bool = False,
    adapter: str | None = None,
    lora_alpha: float | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Model:
    """Puts an adapter, from files of save_adapter, PEFT or another tool, into model; returns model.

    directory: also a file, or OWNER/NAME on the Hugging Face Hub, of which adapter files alone are
    downloaded. Every format of ``lora-kernels convert`` is recognised by its content,
    and the logger lora_kernels tells, at level INFO, what it was taken for.
    A plain model is wrapped as by apply_lora, with float32 adapters over 16-bit weights.
    merge_weights: whether eval() merges; a plain model in eval mode is merged at once. It trains
    what the adapter trained. Modules that the adapter holds as a whole are untied as by apply_lora,
    unless PEFT's ensure_weight_tying kept them tied. Stacks of the weights of experts become
    LoRAExperts. A warning tells of a file that may have either of the two orientations of PEFT's.
    A model that has LoRA layers must have exactly those of the adapter, with the same ranks. It
    takes over values, lora_alpha and scaling, and keeps its dropout and requires_grad. Wrappers
    around model and in it are looked through as by save_adapter. A model that fully_shard or FSDP
    has sharded must have its LoRA layers already, and every rank has to call this.
    PEFT's lora_bias adds scaling·lora_B.bias to the biases of a plain model, which then train; they
    are saved as those of bias="lora_only". BD-LoRA with lora_B in blocks becomes LoRAMergedLinear.
    VeLoRA, which changes PEFT's backward alone, becomes LoRA.
    lora_alpha: for files that do not hold it; another one than a file holds is refused.
    adapter: a name, for a model with several adapters or a plain one that becomes such a model. An
    adapter of this name takes the values, and keeps its dropout; a new one joins the others. It may
    have factors of linears alone.
    revision, token, cache_dir: of the download, as huggingface_hub has them.
    Raises: FileNotFoundError for a missing directory or file, and for a name that the Hub does not
    give; ValueError, naming file and key, for
    all that is damaged, does not fit together or does not fit the model, for pickles (never read)
    for a model with adapters of PEFT, and for what PEFT offers beyond LoRA and DoRA of linears
    (KaSA, layer_replication, ...).
    TypeError for a model that is none, or a directory that is no path.
    After an error model is unchanged.
    """
    check_no_peft("load_adapter", model, "model.load_adapter(directory, name) loads another one")
    is_state = isinstance(directory, Mapping)
    instead = "model.load_state_dict(it, strict=False) takes a state dict" if is_state else ""
    check_path("load_adapter", "directory", directory, instead)
    stacks: dict[str, Stack] = {}

    def find_stacks(names: Sequence[str]) -> dict[str, Stack]:
        stacks.update(_stacks(model, names))
        return stacks

    where = "load_adapter: directory"
    path = hub.path_of(directory, where, revision=revision, token=token, cache_dir=cache_dir)
    is_peft = (path / peft.WEIGHTS).is_file()
    if lora_alpha is not None:
        check_alpha(lora_alpha, "load_adapter")
    found, file = ("peft", path) if is_peft else locate(path)
    if found == "peft":
        read = peft.read(file, stacks=find_stacks)
        with naming(file):
            check_agrees(read, Hints(lora_alpha=lora_alpha))
    else:
        try:
            read = FORMATS[found].read(file, Hints(lora_alpha=lora_alpha, base=Base.of(model)))
        except Untold as error:
            raise ValueError(in_python(error, model, file, lora_alpha)) from None
    _log.info("load_adapter: %s: taken for the format of %s", file, found)
    read = _with_biases_of(model, _aligned(read, model), adapter)
    fitted = fit(model, read, stacks) if adapter is None else fit_named(model, read, adapter)
    for note in read.notes:
        if found == "peft":
            warnings.warn(f"load_adapter: {note}", RuntimeWarning, stacklevel=2)
        else:
            _log.info("load_adapter: %s", note)
    if adapter is not None:
        load_plain_state(model, _distributed(fitted.state, plain_state(model)))
        return model
    state, layers = fitted.state, adapted_layers(model)
    if layers:
        for at, spec in fitted.specs.items():
            if at in layers:
                layers[at].lora_alpha, layers[at].scaling = spec.lora_alpha, spec.scaling
            else:
                owner, stack = split(at)
                experts: ForeignModule = layers[owner]
                experts.lora_alpha[stack], experts.scaling[stack] = spec.lora_alpha, spec.scaling
        record_trained(model, read.bias, fitted.saved)
        state = _distributed(state, plain_state(model))
    else:
        wrap_modules(model, fitted.specs, merge_weights)
        if not read.keeps_ties:
            untie(model, fitted.saved)
        mark_only_lora_as_trainable(model, check_bias(read.bias), fitted.saved)
        layers = adapted_layers(model)
        for layer in layers.values():
            for name in layer.factor_names:
                if name.startswith("lora_B"):
                    getattr(layer, name).requires_grad &= read.trains_b
    load_plain_state(model, state)
    for layer in layers.values():
        if not layer.training:
            layer.eval()  # merged, if it is to be
    return model


def _with_biases_of(model: nn.Module, adapter: Adapter, name: str | None) -> Adapter:
    """adapter with what its lora_biases make of the model's biases, which train then.

    Raises: ValueError if they are no biases of a plain model's.
    """
    if not adapter.lora_biases:
        return adapter
    place, own = f"{adapter.read_from.config}: lora_bias", plain_state(model)
    entries: dict[str, Tensor] = {}
    if name is not None or adapted_layers(model) or multi_layers(model):
        raise ValueError(
            f"{place}: adds to the biases of a plain model: load it into one, and without a name"
        )
    for path, lora_bias in adapter.lora_biases.items():
        key = join(path, "bias")
        bias = adapter.entries.get(key, own.get(key))
        if bias is None:
            raise ValueError(
                f"{place}: {path} has no bias to add it to: give it one, "
                f"nn.Parameter(torch.zeros({len(lora_bias)})), before you load"
            )
        if bias.shape != lora_bias.shape:
            raise ValueError(
                f"{adapter.read_from.weights}: {path}.lora_B.bias: shape must be "
                f"{list(bias.shape)}, got {list(lora_bias.shape)}"
            )
        wide = lora_bias.double() * adapter.layers[path].spec.scaling
        entries[key] = (bias.cpu().double() + wide).to(bias.dtype)
    trains = "lora_only" if adapter.bias == "none" else adapter.bias
    return replace(adapter, entries={**adapter.entries, **entries}, bias=trains)


# What may lie in front of the paths in a model, or in an adapter, that the other does not know of.
_FRONTS = ("module.", "model.")


def _aligned(adapter: Adapter, model: nn.Module) -> Adapter:
    """adapter under model's paths, if they differ by what DDP or Lightning puts in front."""
    paths = {path for path, _ in named_modules(model, remove_duplicate=False)}
    paths |= set(adapter.stacks)  # of this model
    for front in _FRONTS:
        if paths.issuperset(adapter.layers):
            break
        if all(path.startswith(front) and path[len(front) :] in paths for path in adapter.layers):
            return renamed(adapter, operator.methodcaller("removeprefix", front))
        if paths.issuperset(front + path for path in adapter.layers):
            longer = renamed(adapter, functools.partial(operator.add, front))
            return replace(longer, modules_to_save=adapter.modules_to_save)  # ends of paths
    if not paths.issuperset(adapter.layers):
        _check_not_inside(adapter, paths)
    return adapter


def _check_not_inside(adapter: Adapter, paths: Collection[str]) -> None:
    """adapter is not for a module in the model. Raises: ValueError that says for which one."""
    first = next(iter(adapter.layers))
    for path in paths:
        front = path.removesuffix(first)
        if path.endswith(f".{first}") and all(front + p in paths for p in adapter.layers):
            raise ValueError(
                f"{adapter.read_from.weights}: the adapter is for a module inside of the model: "
                f"load it into model.get_submodule({front[:-1]!r}) (for sentence-transformers that "
                f"is model[0].auto_model)"
            )


def _stacks(model: nn.Module, names: Sequence[str]) -> dict[str, Stack]:
    """The stacks of the weights of experts that target_parameters means in model."""
    found: dict[str, ForeignModule] = match_parameters(model, names, wrapped=True)
    stacks = {}
    for path, module in found.items():
        count, n, k = weight_of(module, split(path)[1]).shape
        stacks[path] = Stack(count, n, k, module.is_transposed)
    return stacks


def _distributed(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """state, each tensor distributed over the ranks as own's tensor with the same key."""
    return {key: distributed.distribute_like(value, own[key]) for key, value in state.items()}
