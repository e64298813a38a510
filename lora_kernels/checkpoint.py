"""State dicts and adapters on disk: loralib's keys, the merged plain model, PEFT's two files."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_kernels import adapt, distributed, peft_format
from lora_kernels.adapt import LayerPlan
from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.conv import ConvLoRA
from lora_kernels.layers.merged_linear import LoRAMergedLinear
from lora_kernels.peft_format import AdapterConfig, Record

__all__ = ["load_adapter", "lora_state_dict", "merged_state_dict", "save_adapter"]

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
_METADATA = "lora_kernels"
PEFT_COPIES = ("original_module", "modules_to_save")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def lora_state_dict(
    model: nn.Module, bias: str = "none", modules_to_save: str | Iterable[str] | None = None
) -> dict[str, Tensor]:
    """The entries of model.state_dict() that LoRA trains, under loralib's keys, unmerged.

    Keys whose last part starts with "lora_"; biases as in mark_only_lora_as_trainable; the whole
    of each module in modules_to_save and of those recorded by mark_only_lora_as_trainable. As in
    model.state_dict(), parameters that fully_shard has sharded are DTensors: ``full_tensor()``, on
    every rank, gathers one.
    Raises: NotImplementedError for another bias; ValueError for a name that no module has.
    Source: loralib's function; a name in the middle of a path decides nothing here.
    """
    adapt.check_bias(bias)
    saved = adapt.saved_paths(model, adapt.as_names("modules_to_save", modules_to_save))
    wanted = _bias_keys(model, bias)
    return {
        key: value
        for key, value in model.state_dict().items()
        if key in wanted or _leaf(key).startswith("lora_") or adapt.is_inside(key, saved)
    }


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model without LoRA: same keys, each weight with its delta folded in.

    Loads strictly into the original architecture and gives the outputs of model in eval mode.
    Weights that LoRA changes are copies, the rest is shared with model as in state_dict(). Where a
    tied weight has LoRA on one side or two different ones, its entries differ: load it into an
    untied model.
    Parameters that fully_shard has sharded are DTensors; every rank has to call it then.
    Raises: ValueError for an embedding with max_norm, which would limit the merged rows anew.
    """
    renamed, dropped, merged = {}, set(), {}
    copies: dict[int, Tensor] = {}
    state = model.state_dict()  # first: FSDP has its parameters sharded again by this
    for path, layer in adapt.named_modules(model, remove_duplicate=False):
        if not isinstance(layer, LoRALayer):
            continue
        prefix = f"{path}." if path else ""
        if isinstance(layer, ConvLoRA):
            renamed |= {f"{prefix}conv.{name}": f"{prefix}{name}" for name in ("weight", "bias")}
        if layer.has_lora:
            if getattr(layer, "max_norm", None) is not None:
                raise ValueError(f"{path}: an embedding with max_norm cannot be merged for good")
            if id(layer) not in copies:
                copies[id(layer)] = layer.merged_weight()
            merged[prefix + layer._weight_name] = copies[id(layer)]
            dropped |= {f"{prefix}lora_A", f"{prefix}lora_B"}
    return {
        renamed.get(key, key): merged.get(key, value)
        for key, value in state.items()
        if key not in dropped
    }


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    modules_to_save: str | Iterable[str] | None = None,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, which PEFT and load_adapter read.

    Saved: every LoRA layer that has factors; the biases and modules that
    mark_only_lora_as_trainable (apply_lora calls it) opened; the modules named in modules_to_save,
    and those that are tied to them, for PEFT and load_adapter untie them.
    LoRAMergedLinear and convolutions become PEFT layers of a higher rank with the same update;
    load_adapter gives back the original ones. Both files are complete before either replaces an
    older one. DistributedDataParallel and torch.compile around model are looked through, and
    PyTorch's checkpoint_wrapper in it; one rank or all of them may call it. With a model that
    fully_shard has sharded every rank has to: all gather, rank 0 writes, and all return when it
    has.
    Raises: ValueError for a model without LoRA, a value that is not finite, a LoRA layer inside a
    saved module, and a convolution that PEFT cannot express: groups > 1, dilation, padding_mode.
    """
    model = adapt.unwrapped(model)
    names = adapt.as_names("modules_to_save", modules_to_save)
    saved = adapt.with_tied(model, _saved_in_peft(model, adapt.saved_paths(model, names)))
    layers = _adapted(model)
    if not layers or "" in layers:
        what = "has no LoRA layer" if not layers else "is itself a LoRA layer: put it in a module"
        raise ValueError(f"save_adapter: the model {what}")
    state = model.state_dict()  # first: FSDP has its parameters sharded again by this
    tensors, records, ranks = {}, {}, {}
    for path, layer in layers.items():
        if adapt.is_inside(path, saved):
            raise ValueError(f"{path}: a LoRA layer cannot lie inside modules_to_save={saved}")
        reason = peft_format.why_not(layer)
        if reason is not None:
            raise ValueError(
                f"{path}: this layer does not fit PEFT's format ({reason}); save lora_state_dict()"
            )
        a, b, record = peft_format.to_peft(layer)
        tensors |= dict(zip(_adapter_keys(path, layer), (a, b), strict=True))
        ranks[path] = a.shape[0]
        if record is not None:
            records[path] = record
    bias = adapt.recorded_biases(model)
    for key, model_key in _other_keys(model, layers, bias, saved).items():
        tensors[key] = distributed.full_tensor(state[model_key])
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"save_adapter: {key} is not finite")
    paths = sorted(layers)
    if set(adapt.match_targets(model, paths)) != set(paths):  # "lin" would mean "block.lin" too
        paths = "|".join(map(re.escape, paths))
    config = peft_format.make_config(layers, ranks, paths, bias, saved)
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    config["base_model_name_or_path"] = name if isinstance(name, str) and name else None
    metadata = {"format": "pt"}
    if records:
        metadata[_METADATA] = json.dumps({path: vars(record) for path, record in records.items()})
    tensors = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}

    if not any(map(distributed.is_dtensor, state.values())):
        _write(Path(directory), tensors, metadata, config)
        return
    try:
        if torch.distributed.get_rank() == 0:
            _write(Path(directory), tensors, metadata, config)
    finally:
        torch.distributed.barrier()


def load_adapter(
    model: nn.Module, directory: str | os.PathLike, *, merge_weights: bool = True
) -> nn.Module:
    """Reads an adapter that save_adapter or PEFT wrote into model; returns model.

    A plain model is wrapped as by apply_lora, with adapters in float32 over 16-bit weights, and
    trains what the adapter trained; modules that the adapter brings as a whole are untied as there.
    A model that has LoRA layers must have exactly those of the
    adapter, with the same ranks; it takes over values, lora_alpha and scaling, and keeps its
    dropout and requires_grad. The same wrappers are looked through as by save_adapter. A model that
    fully_shard has sharded must have its LoRA layers already, and every rank has to call this.
    Raises: FileNotFoundError for a missing directory or file; ValueError, naming file and key, for
    all that is damaged, does not fit together or does not fit the model, for pickles (never read)
    and for what PEFT offers beyond LoRA (DoRA, lora_bias, layer_replication, ...). Then model is
    as it was.
    """
    directory = Path(directory)
    adapter = read_adapter(directory)
    wrapper, model = model, adapt.unwrapped(model)
    plans, state, saved = _fit(model, adapter)
    config = adapter.config
    layers = _adapted(model)
    if layers:
        for path, plan in plans.items():
            layer = layers[path]
            layer.lora_alpha, layer.scaling = plan.lora_alpha, plan.scaling
        adapt.record_trained(model, config.bias, saved)
        own = model.state_dict()
        state = {key: distributed.distribute_like(value, own[key]) for key, value in state.items()}
    else:
        adapt.wrap_modules(model, plans, config.lora_dropout, merge_weights, True)
        adapt.untie(model, saved)
        adapt.mark_only_lora_as_trainable(model, config.bias, saved)
        layers = _adapted(model)
    model.load_state_dict(state, strict=False)
    for path in plans:
        layer = layers[path]
        if not layer.training:
            layer.eval()  # merged with its new values
    return wrapper


# ---- what a model has, under the keys of the files ----


def _adapted(model: nn.Module) -> dict[str, LoRALayer]:
    """The LoRA layers that have lora_A and lora_B, by path."""
    return {path: layer for path, layer in adapt.lora_layers(model) if layer.has_lora}


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _bias_keys(model: nn.Module, bias: str) -> set[str]:
    """Keys of model.state_dict() of the biases that mark_only_lora_as_trainable(bias) opens."""
    owners = set()
    if bias == "all":
        owners = {id(module) for module in model.modules()}
    elif bias == "lora_only":
        owners = {id(layer._weight_owner()) for _, layer in adapt.lora_layers(model)}
    return {
        adapt.join(path, name)
        for path, module in adapt.named_modules(model, remove_duplicate=False)
        if id(module) in owners
        for name in adapt.bias_names(module)
    }


def _adapter_keys(path: str, module: nn.Module) -> tuple[str, str]:
    a, b = peft_format.key_names(module)
    return f"{PREFIX}{path}.{a}", f"{PREFIX}{path}.{b}"


def _other_keys(
    model: nn.Module, targets: Mapping[str, nn.Module], bias: str, saved: Collection[str]
) -> dict[str, str]:
    """Key in the file -> key in model.state_dict(), for biases and modules that train as a whole.

    PEFT keeps what a LoRA layer wraps as its base_layer.
    """
    keys = {PREFIX + key: key for key in model.state_dict() if adapt.is_inside(key, saved)}
    for path, module in adapt.named_modules(model):
        if bias == "none" or adapt.is_inside(path, saved):
            continue
        parent = path.rpartition(".")[0]
        target = parent if isinstance(targets.get(parent), ConvLoRA) else path
        for name in adapt.bias_names(module):
            if target in targets:
                keys[f"{PREFIX}{target}.base_layer.{name}"] = adapt.join(path, name)
            elif bias == "all":
                keys[PREFIX + adapt.join(path, name)] = adapt.join(path, name)
    return keys


def _base_keys(model: nn.Module, targets: Mapping[str, nn.Module]) -> dict[str, str]:
    """Key in the file -> key in model.state_dict(), for base weights that PEFT may store too.

    It does so where the input embedding or the output head is wrapped, or has a new vocabulary.
    """
    keys = {}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):
            module = getattr(model, getter)()
            for path, candidate in adapt.named_modules(model):
                if candidate is module:
                    base = f"{path}.base_layer" if path in targets else path
                    keys[f"{PREFIX}{base}.weight"] = f"{path}.weight"
    return keys


def _saved_in_peft(
    model: nn.Module, names: Collection[str], stored: Collection[str] | None = None
) -> list[str]:
    """Paths of the modules that PEFT saves as a whole for these modules_to_save.

    PEFT compares the end of the path without regard to dots: "head" means "lm_head" too. Such a
    module counts where the stored keys have it; without them, where it holds no LoRA layer.
    """
    state, adapted = model.state_dict(), _adapted(model)
    paths: list[str] = []
    for path, _ in adapt.named_modules(model):
        if stored is None:
            takes_part = not any(adapt.is_inside(layer, [path]) for layer in adapted)
        else:
            takes_part = any(
                PREFIX + key in stored for key in state if adapt.is_inside(key, [path])
            )
        exact = adapt.is_named(path, names)
        loose = takes_part and any(path.endswith(name) for name in names)
        if (exact or loose) and not adapt.is_inside(path, paths):
            paths.append(path)
    return paths


# ---- writing ----


def _write(
    directory: Path, tensors: dict[str, Tensor], metadata: dict[str, str], config: dict
) -> None:
    """Puts both files into directory; both are complete before either replaces an older one."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".adapter-", dir=directory))
    try:
        save_file(tensors, scratch / _WEIGHTS, metadata)
        (scratch / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for name in (_WEIGHTS, _CONFIG):
            os.replace(scratch / name, directory / name)
    finally:
        shutil.rmtree(scratch)


# ---- reading ----


@dataclasses.dataclass(frozen=True)
class _Adapter:
    """Both files as read, each checked in itself."""

    config_path: Path
    config: AdapterConfig
    weights_path: Path
    tensors: dict[str, Tensor]
    records: dict[str, Record]


@contextlib.contextmanager
def _naming(where):
    """Errors inside begin with where: the file, and the key in it."""
    try:
        yield
    except (ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from error


def read_adapter(directory: Path) -> _Adapter:
    """Both files of an adapter; the errors of load_adapter for what is damaged in itself."""
    config_path, weights_path = directory / _CONFIG, directory / _WEIGHTS
    if not weights_path.is_file() and (directory / _PICKLE).exists():
        raise ValueError(
            f"{directory / _PICKLE}: a pickle can run code and is never read; have PEFT save the "
            f"adapter as {_WEIGHTS}"
        )
    for path in (config_path, weights_path):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
    with _naming(config_path):
        config = peft_format.parse_config(json.loads(config_path.read_text("utf-8")))
    tensors, metadata = _read_tensors(weights_path)
    with _naming(f"{weights_path}: metadata {_METADATA}"):
        records = peft_format.parse_records(metadata.get(_METADATA, "{}"))
    return _Adapter(config_path, config, weights_path, tensors, records)


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: damaged, or no safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype not in _FLOATS:
            raise ValueError(f"{path}: {key}: dtype {tensor.dtype} is not supported")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: {key}: holds NaN or infinite values")
    return tensors, metadata


def _fit(
    model: nn.Module, adapter: _Adapter
) -> tuple[dict[str, LayerPlan], dict[str, Tensor], list[str]]:
    """What to make of model, the entries to load then, and the modules that train as a whole.

    Every check that needs both adapter and model is here; nothing changes here.
    """
    config, tensors, adapted = adapter.config, adapter.tensors, _adapted(model)
    saved = _saved_in_peft(model, config.modules_to_save, tensors)
    with _naming(f"{adapter.config_path}: target_modules"):
        targets = adapt.match_targets(model, config.target_modules, config.modules_to_save)
        if config.restricted:
            targets = {p: m for p, m in targets.items() if _adapter_keys(p, m)[0] in tensors}
        if not targets:
            raise ValueError(f"{config.target_modules!r} matches no module of the model")
        if adapted:
            for path in sorted(set(targets) ^ set(adapted)):
                has, lacks = ("model", "adapter") if path in adapted else ("adapter", "model")
                raise ValueError(f"the {has} has LoRA on {path!r}, the {lacks} has not")
        else:
            adapt.check_wrappable(targets)
    other_keys = _other_keys(model, targets, config.bias, saved)
    base_keys = _base_keys(model, targets)
    _check_keys(adapter, targets, other_keys, base_keys, saved)

    plans, state = {}, {}
    for path, module in targets.items():
        plans[path], state[f"{path}.lora_A"], state[f"{path}.lora_B"] = _fit_layer(
            path, module, adapter
        )
    own = model.state_dict()
    for key, model_key in (base_keys | other_keys).items():
        if key in tensors:
            _check_like(adapter.weights_path, key, tensors[key], own[model_key])
            state[model_key] = tensors[key]
    if adapted:
        _check_ties(adapter.weights_path, model, state, saved)
    return plans, state, saved


def _check_ties(
    path: Path, model: nn.Module, state: Mapping[str, Tensor], saved: Collection[str]
) -> None:
    """What model ties to a module that trains as a whole gets the same values from state."""
    keys_of: dict[int, list[str]] = {}
    for owner, module in adapt.named_modules(model, remove_duplicate=False):
        for name, parameter in module._parameters.items():
            keys_of.setdefault(id(parameter), []).append(adapt.join(owner, name))
    for keys in keys_of.values():
        for key in keys:
            if key not in state or not adapt.is_inside(key, saved):
                continue
            for other in keys:
                if other not in state or not torch.equal(state[key], state[other]):
                    raise ValueError(
                        f"{path}: {key} is alone in it, or another than {other}, to which the "
                        f"model ties it: load the adapter into a plain model, which unties them"
                    )


def _check_keys(
    adapter: _Adapter,
    targets: Mapping[str, nn.Module],
    other_keys: Collection[str],
    base_keys: Collection[str],
    saved: Collection[str],
) -> None:
    """The file holds exactly the keys that its config and the model ask for."""
    required = {key for path, module in targets.items() for key in _adapter_keys(path, module)}
    for key in other_keys:
        # PEFT does not count in_proj_bias and its like among the biases.
        if adapt.is_inside(key.removeprefix(PREFIX), saved) or _leaf(key) == "bias":
            required.add(key)
    allowed = required.union(other_keys, base_keys)
    # With bias="all" PEFT writes the biases of modules_to_save three times.
    repeated = [f"{PREFIX}{path}.{copy}" for path in saved for copy in PEFT_COPIES]
    for key in sorted(required - set(adapter.tensors)):
        raise ValueError(
            f"{adapter.weights_path}: {key}: missing, though {_CONFIG} and the model ask for it"
        )
    for key in sorted(set(adapter.tensors) - allowed):
        if adapter.config.bias != "all" or not adapt.is_inside(key, repeated):
            raise ValueError(
                f"{adapter.weights_path}: {key}: unexpected, neither {_CONFIG} nor the model asks "
                f"for it"
            )
    for path in sorted(set(adapter.records) - set(targets)):
        raise ValueError(f"{adapter.weights_path}: metadata {_METADATA}: {path}: no LoRA layer")


def _fit_layer(path: str, module: nn.Module, adapter: _Adapter) -> tuple[LayerPlan, Tensor, Tensor]:
    """What the module at path becomes, and its lora_A and lora_B."""
    config, tensors, where = adapter.config, adapter.tensors, adapter.weights_path
    with _naming(adapter.config_path):
        plan = adapt.plan_layer(
            path, config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern,
            config.use_rslora,
        )  # fmt: skip
    keys = _adapter_keys(path, module)
    reason = peft_format.why_not(module)
    if reason is not None:
        raise ValueError(f"{where}: {keys[0]}: this is no change of the weight: {reason}")
    for key, shape in zip(keys, peft_format.peft_shapes(module, plan.r), strict=True):
        if tensors[key].dtype not in _FLOATS:
            raise ValueError(f"{where}: {key}: dtype must be floating, got {tensors[key].dtype}")
        if tensors[key].shape != shape:
            raise ValueError(
                f"{where}: {key}: shape must be {list(shape)} for r={plan.r} on "
                f"{type(module).__name__}, got {list(tensors[key].shape)}"
            )
    record = adapter.records.get(path)
    with _naming(f"{where}: {keys[0]}"):
        factors = peft_format.from_peft(module, *(tensors[key] for key in keys), record)
        plan = _plan_own(plan, factors, record, config.use_rslora)
        if isinstance(module, LoRALayer):
            _check_agrees(module, plan, factors)
    return plan, factors.a, factors.b


def _plan_own(plan: LayerPlan, factors, record: Record | None, use_rslora: bool) -> LayerPlan:
    """PEFT's plan for a layer as this package's: the same scaling at another rank."""
    ratio = factors.r / plan.r
    return LayerPlan(
        factors.r,
        plan.lora_alpha
        if ratio == 1
        else plan.lora_alpha * (math.sqrt(ratio) if use_rslora else ratio),
        plan.scaling,
        record and record.enable_lora,
        record and record.out_splits,
    )


def _check_agrees(layer: LoRALayer, plan: LayerPlan, factors) -> None:
    """The layer in the model is the one in the adapter, or a ValueError says what differs."""
    groups = None
    if isinstance(layer, LoRAMergedLinear):
        groups = tuple(layer.enable_lora), tuple(layer.out_splits)
    stored = None if plan.enable_lora is None else (plan.enable_lora, plan.out_splits)
    if groups != stored:
        raise ValueError(
            f"the model has {type(layer).__name__} with groups {groups}, the adapter {stored}"
        )
    if layer.r != plan.r or layer.lora_A.shape != factors.a.shape:
        raise ValueError(f"the model has LoRA of rank {layer.r} here, the adapter {plan.r}")


def _check_like(path: Path, key: str, stored: Tensor, own: Tensor) -> None:
    """A stored tensor can replace one of the model, or a ValueError says what differs."""
    if stored.shape != own.shape:
        raise ValueError(
            f"{path}: {key}: shape must be {list(own.shape)}, got {list(stored.shape)}"
        )
    if (
        stored.is_floating_point() != own.is_floating_point()
        or stored.is_complex() != own.is_complex()
        or (stored.dtype == torch.bool) != (own.dtype == torch.bool)
    ):
        raise ValueError(f"{path}: {key}: dtype must be like {own.dtype}, got {stored.dtype}")
