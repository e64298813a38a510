"""apply_lora puts LoRA layers into a model."""

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_kernels.checks import check_dropout
from lora_kernels.foreign import ForeignModule, Model, check_keywords, check_no_peft
from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.experts import LoRAExperts
from lora_kernels.layers.merged_linear import LoRAMergedLinear
from lora_kernels.model.multi import add_adapters, check_no_named_adapters, check_only_adapters
from lora_kernels.model.parameters import match_parameters
from lora_kernels.model.paths import (
    as_names,
    check_names_exist,
    named_modules,
    split,
    unwrapped,
)
from lora_kernels.model.place import keep_hooks, replace_modules
from lora_kernels.model.targets import (
    Hyperparameters,
    LayerSpec,
    check_dora,
    check_wrappable,
    constructor_name,
    constructor_of,
    lora_dtype,
    match_targets,
    no_targets,
    plain_patterns,
    unmatched_names,
)
from lora_kernels.model.trainable import (
    Bias,
    check_bias,
    mark_only_lora_as_trainable,
    saved_paths,
    untie,
)
from lora_kernels.quantization import frozen_weight, is_quantised

if TYPE_CHECKING:
    from typing import TypedDict

    from typing_extensions import Unpack

    class _None(TypedDict):
        """No keyword at all."""


__all__ = ["apply_lora", "wrap_modules"]


def apply_lora(
    model: Model,
    *,
    r: int | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    target_modules: str | Iterable[str] | None = None,
    target_parameters: Iterable[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    dropout_low_rank_only: bool = False,
    bias: Bias = "none",
    modules_to_save: str | Iterable[str] | None = None,
    merge_weights: bool = False,
    autocast_adapter_dtype: bool = True,
    adapters: Mapping[str, Mapping[str, Any]] | None = None,
    **misspelt: "Unpack[_None]",
) -> Model:
    """Replaces modules of model by LoRA layers around the same parameters; returns model.

    Wraps nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Hugging Face's Conv1D, and the
    quantised linears that ``frozen_weight`` takes, which stay as they are inside a
    LoRAQuantizedLinear.
    target_modules says which; None is "all-linear", or no module if there are target_parameters:

    * a list: every module whose path is an entry or ends with "." and an entry;
    * a string: a regular expression that the whole path matches; if it matches nothing, a name
      as in a list;
    * "all-linear": every nn.Linear, quantised linear and Conv1D except
      ``model.get_output_embeddings()``. Other subclasses of nn.Linear stay as they are, with a
      warning: their owner may read the weight without calling them, as nn.MultiheadAttention does.
      So do weights of experts that are stacked in one parameter, as in transformers 5, if
      target_parameters does not name them.

    target_parameters: paths, or ends of paths, of parameters that are stacks of the weights of
    experts, such as "experts.gate_up_proj" and "experts.down_proj". Their modules become
    LoRAExperts. merge_weights has no effect on these.

    Nothing inside a module of modules_to_save is wrapped. rank_pattern and alpha_pattern map a
    regular expression for the path of a module or target parameter, or its end, to another r or
    lora_alpha; the first match counts, and one that matches nothing has a warning.
    scaling = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora. use_dora: DoRA, for linears;
    dropout_low_rank_only: see LoRALinear. autocast_adapter_dtype: whether adapters over 16-bit
    weights are float32. A module of modules_to_save whose parameters
    are tied to others', such as an output head to the input embedding, gets its own copies of them,
    as in PEFT. Last, mark_only_lora_as_trainable(model, bias, modules_to_save) is called. A module
    under several names is wrapped once and stays shared. Forward and backward hooks and train/eval
    mode are kept. merge_weights: whether eval() merges; merge_lora(model) merges later. A model in
    eval mode is merged by its next eval().

    adapters: several adapters over the same weights, by name, as MultiLoRALinear has them:
    ``{"a": dict(r=8, lora_alpha=16), "b": dict(r=4, lora_alpha=8, target_modules=["q_proj"])}``.
    Each takes r, lora_alpha, lora_dropout, rank_pattern, alpha_pattern, use_rslora and its own
    target_modules, or that of the call. They go into nn.Linear and Conv1D. A layer has factors for
    the adapters that target it. A later call adds further adapters. ``route`` says which samples
    take which. Of other arguments autocast_adapter_dtype is allowed.

    Warns: of names in target_modules, rank_pattern and alpha_pattern that match nothing, with the
    nearest name that the model has; of lora_alpha=0.
    Raises: ValueError (NotImplementedError for bias) before anything has changed: a model with
    adapters of PEFT, bad or missing
    numbers, an adapter that is there already, a pattern that is not a regular expression, no match,
    use_dora for what is no linear, a match that cannot be wrapped (parameters of experts without
    Transformers' experts interface among them), a model that is itself a linear, embedding or
    convolution (use the from_... constructor of its LoRA layer). TypeError, with the nearest name,
    for an argument that there is not.
    Source: Hu et al. 2021, arXiv 2106.09685; rsLoRA: Kalajdzievski 2023, arXiv 2312.03732; the
    meaning of the arguments: PEFT's LoraConfig.
    """
    given = locals()
    check_keywords("apply_lora", misspelt, [name for name in given if name != "misspelt"])
    if adapters is not None:
        check_only_adapters(apply_lora, given)
        every = "all-linear" if target_modules is None else target_modules
        add_adapters(model, adapters, every, autocast_adapter_dtype)
        return model
    check_no_peft(
        "apply_lora",
        model,
        "call lora_kernels.patch_peft(), which runs them on this package; or model.unload(), which "
        "gives the plain model back",
    )
    check_no_named_adapters(model)
    check_bias(bias)
    dropout = check_dropout(lora_dropout, "apply_lora")
    saved = as_names("modules_to_save", modules_to_save, model)
    check_names_exist(model, saved)
    inside = unwrapped(model)
    construct = constructor_of(inside)
    if construct is not None:
        raise ValueError(
            f"apply_lora: model is itself a {type(inside).__name__}, which cannot be replaced "
            f"in place: use {constructor_name(construct)}(model, r, ...)"
        )
    parameters = match_parameters(model, target_parameters, saved)
    if target_modules is None:
        target_modules = [] if parameters else "all-linear"
    targets = match_targets(model, target_modules, saved, parameters)
    ranks, alphas = plain_patterns(rank_pattern), plain_patterns(alpha_pattern)
    dora = bool(use_dora), bool(dropout_low_rank_only)
    numbers = Hyperparameters(r, lora_alpha, dropout, ranks, alphas, use_rslora, *dora)
    specs = {path: numbers.of(path) for path in (*targets, *parameters)}
    if not targets and (target_modules or not parameters):
        raise ValueError(f"apply_lora: {no_targets(model, target_modules, saved)}")
    check_wrappable(targets)
    if use_dora:
        check_dora(targets, parameters)
    for told in (unmatched_names(model, target_modules), numbers.unmatched(specs)):
        if told is not None:
            warnings.warn(f"apply_lora: {told}", RuntimeWarning, stacklevel=2)
    if any(spec.lora_alpha == 0 for spec in specs.values()):
        warnings.warn(
            "apply_lora: lora_alpha=0: LoRA changes nothing then", RuntimeWarning, stacklevel=2
        )
    wrap_modules(model, specs, merge_weights, autocast_adapter_dtype)
    untie(model, saved_paths(model, saved))
    mark_only_lora_as_trainable(model, bias, saved)
    return model


def wrap_modules(
    model: nn.Module,
    specs: Mapping[str, LayerSpec],
    merge_weights: bool,
    autocast_adapter_dtype: bool = True,
) -> None:
    """Builds the layer of every path in specs, then puts all of them in their places.

    A path that is no module's is that of a stack of the weights of experts. If building one fails,
    model is unchanged.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modules, layers = dict(named_modules(model, remove_duplicate=False)), {}
    stacks: dict[str, dict[str, LayerSpec]] = {}
    try:
        for path, spec in specs.items():
            if path not in modules:
                owner, name = split(path)
                stacks.setdefault(owner, {})[name] = spec
                continue
            module = modules[path]
            layers[id(module)] = _wrap(module, spec, merge_weights, autocast_adapter_dtype)
        for path, by_name in stacks.items():
            module = modules[path]
            layers[id(module)] = _wrap_experts(module, by_name, autocast_adapter_dtype)
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad = flag
        raise
    replace_modules(model, layers)


def _wrap(
    module: ForeignModule, spec: LayerSpec, merge_weights: bool, autocast_adapter_dtype: bool
) -> LoRALayer:
    quantised = is_quantised(module)
    options: dict[str, Any] = {
        "merge_weights": False,  # scaling is not final yet
        "lora_dtype": lora_dtype(
            frozen_weight(module) if quantised else module.weight, autocast_adapter_dtype
        ),
    }
    if not isinstance(module, nn.Embedding):
        options["lora_dropout"] = spec.lora_dropout
    construct: Any = constructor_of(module)
    if spec.splits is not None:
        construct = LoRAMergedLinear.from_linear
        options |= {"enable_lora": spec.splits.enabled, "out_splits": spec.splits.sizes}
    if spec.use_dora:
        options |= {"use_dora": True, "dropout_low_rank_only": spec.dropout_low_rank_only}
    layer = construct(module, spec.r, spec.lora_alpha, **options)
    layer.scaling, layer.merge_weights = spec.scaling, merge_weights
    if not quantised:  # such a module is called by its layer, and keeps its hooks
        keep_hooks(module, layer)
    return layer


def _wrap_experts(
    module: nn.Module, specs: Mapping[str, LayerSpec], autocast_adapter_dtype: bool
) -> LoRAExperts:
    layer = LoRAExperts(
        module,
        {name: spec.r for name, spec in specs.items()},
        {name: spec.lora_alpha for name, spec in specs.items()},
        next(iter(specs.values())).lora_dropout,
        specs,
        lora_dtype(getattr(module, next(iter(specs))), autocast_adapter_dtype),
    )
    layer.scaling = {name: specs[name].scaling for name in layer.target_parameters}
    return layer
