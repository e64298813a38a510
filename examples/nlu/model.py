"""The encoder with a new head, what of it trains, and adapters from disk."""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

import lora_kernels as lora
from examples.errors import InputError
from examples.finetune.model import head_names
from examples.nlu.tasks import Settings, Task
from examples.pretrained import from_pretrained, whole_model

__all__ = ["adapt", "load_head", "load_model", "positions", "save_head", "start_from", "task_head"]

TARGETS = {"deberta-v2": ["query_proj", "value_proj"], "distilbert": ["q_lin", "v_lin"]}
HEAD_FILE = "head.safetensors"
PEFT_PREFIX = "base_model.model."
# What torch.load and safetensors raise for files that are none of theirs.
UNREADABLE = (
    OSError, ValueError, TypeError, RuntimeError, EOFError, UnpicklingError, SafetensorError
)  # fmt: skip


def load_model(
    location: str, task: Task, settings: Settings, tokenizer, seed: int, new_head: bool = True
) -> nn.Module:
    """The pretrained encoder in float32; a head that it lacks for task is drawn from seed.

    Raises: InputError where a weight of the body is missing or of another shape, and without
    new_head where one of the head is.
    """
    config = from_pretrained(AutoConfig, location, num_labels=task.outputs)
    if settings.cls_dropout is not None:
        # DeBERTa's name for it, and that of BERT and RoBERTa.
        config.cls_dropout = config.classifier_dropout = settings.cls_dropout
    config.problem_type = "single_label_classification" if task.labels else "regression"
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(seed)
    head = task_head if new_head else lambda model: ()
    return whole_model(AutoModelForSequenceClassification, location, head, config=config)


def positions(model: nn.Module) -> float:
    """How many tokens model has learned positions for; RoBERTa's begin behind its padding token's.

    Infinity where it has none, as DeBERTa.
    """
    sizes = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if name.endswith(".position_embeddings") and isinstance(module, nn.Embedding)
    ]
    return min(sizes, default=math.inf)


def adapt(
    model: nn.Module,
    method: str,
    settings: Settings,
    dropout: float = 0.0,
    targets: Collection[str] | None = None,
) -> nn.Module:
    """Decides what of model trains: "lora" and the head, all of it ("full"), the "head" alone.

    targets: ends of the names of the layers that get LoRA; query and value of attention where
    None.
    """
    if method == "head":
        model.requires_grad_(False)
        for name in task_head(model):
            model.get_submodule(name).requires_grad_(True)
    elif method == "lora":
        targets = list(targets or TARGETS.get(model.config.model_type, ["query", "value"]))
        try:
            lora.apply_lora(
                model,
                r=settings.rank,
                lora_alpha=settings.alpha,
                lora_dropout=dropout,
                target_modules=targets,
                modules_to_save=task_head(model),
                merge_weights=True,  # evaluation runs merged, as in the original
            )
        except ValueError as error:
            raise InputError(f"--targets {','.join(targets)}: {error}") from None
    return model


def task_head(model: nn.Module) -> list[str]:
    """Paths of the modules of the head: all outside the pretrained body, as in loralib's scripts.

    RoBERTa's is a dense layer and a projection, and DeBERTa's a pooler and a classifier. BERT has
    the same two, but keeps the pooler in its body; it belongs to the head all the same.
    """
    body, names = model.base_model_prefix, head_names(model)
    if isinstance(getattr(model.base_model, "pooler", None), nn.Module):
        names.append(f"{body}.pooler")
    return names


def save_head(model: nn.Module, directory: str | Path) -> None:
    """Writes the head of model alone, for start_from; the body is the pretrained one."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    head = lora.lora_state_dict(model, modules_to_save=task_head(model))
    (directory / HEAD_FILE).write_bytes(save(head, {"format": "pt"}))


def load_head(model: nn.Module, directory: str | Path) -> None:
    """Reads what save_head wrote of this very model; start_from checks what others wrote."""
    model.load_state_dict(load_file(Path(directory) / HEAD_FILE), strict=False)


def start_from(
    model: nn.Module,
    path: str | Path,
    settings: Settings,
    *,
    with_head: bool,
    alpha_chosen: bool = False,
) -> list[str]:
    """Reads an adapter or a head into model, which adapt made; returns the keys left out.

    path: a folder that save_adapter or save_head wrote, or a file of loralib's lora_state_dict, as
    those that loralib's authors released. with_head=False leaves out the head's entries, of
    whatever shape.
    alpha_chosen: whether the user chose the alpha of settings, which such a file needs.
    Raises: InputError, which names every key that is missing, unexpected or of another shape, an
    alpha other than the one of settings, and a file without alpha. Then model is as it was.
    """
    tensors, config = _read(Path(path))
    if any(".lora_" in key for key in tensors):
        _check_scaling(path, config, settings.alpha, alpha_chosen)
    own = lora.lora_state_dict(model, modules_to_save=task_head(model))
    heads = tuple(f"{name}." for name in task_head(model))
    head = {key for key in tensors if key.startswith(heads)}
    left_out = set() if with_head else head
    wanted = {key for key in own if with_head or not key.startswith(heads)}
    given = {key: value for key, value in tensors.items() if key not in left_out}

    faults = [f"missing {key}" for key in sorted(wanted - set(given))]
    faults += [f"unexpected {key}" for key in sorted(set(given) - wanted)]
    faults += [
        f"{key} is {list(given[key].shape)}, must be {list(own[key].shape)}"
        for key in sorted(wanted & set(given))
        if given[key].shape != own[key].shape
    ]
    if faults:
        raise InputError(f"{path}: does not fit the model: {'; '.join(faults)}")
    model.load_state_dict(given, strict=False)
    return sorted(left_out)


def _check_scaling(path: str | Path, config: Mapping, alpha: float, chosen: bool) -> None:
    """An adapter's updates are scaled by the alpha that it was trained with, or InputError."""
    own = config.get("lora_alpha")
    if own is None and not chosen:
        raise InputError(
            f"{path}: does not say its alpha: pass --alpha, or --settings with the name of those "
            "that it was trained with; loralib's scripts (--settings ...-scripts) have 16 for "
            "RoBERTa and 32 for DeBERTa XXL"
        )
    if own not in (None, alpha):
        raise InputError(
            f"{path}: has alpha {own}, this run {alpha}, which would scale its updates "
            f"otherwise: pass --alpha {own}"
        )
    for key in ("use_rslora", "alpha_pattern"):  # PEFT's; this program writes neither
        if config.get(key):
            raise InputError(f"{path}: {key} is not supported: every update has alpha / r here")


def _read(path: Path) -> tuple[Mapping[str, Tensor], Mapping]:
    """The tensors of an adapter under loralib's keys, and its adapter_config.json if it has one."""
    try:
        if (path / HEAD_FILE).is_file():
            config, tensors = {}, load_file(path / HEAD_FILE)
        elif path.is_dir():
            config = dict(json.loads((path / "adapter_config.json").read_text(encoding="utf-8")))
            tensors = load_file(path / "adapter_model.safetensors")
        else:
            config = {}
            content = torch.load(path, map_location="cpu", weights_only=True)
            tensors = {str(key): value for key, value in dict(content).items()}
    except UNREADABLE as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(f"{path}: cannot be read: {reason}") from None
    for key, value in tensors.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{path}: {key} must be a tensor, got {type(value).__name__}")
    # save_adapter writes PEFT's keys: the same path, and .weight behind each factor.
    keys = {key: key.removeprefix(PEFT_PREFIX) for key in tensors}
    return {
        own.removesuffix(".weight") if ".lora_" in own else own: tensors[key]
        for key, own in keys.items()
    }, config
