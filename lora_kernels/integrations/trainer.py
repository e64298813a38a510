"""Checkpoints of Hugging Face's Trainer, and TRL's, that hold the adapter of this package's layers.

Trainer writes every weight of a model that is no PeftModel, and no library finds the adapter among
them.
"""

import functools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from lora_kernels.adapters.save import save_adapter
from lora_kernels.adapters.state_dict import lora_state_dict
from lora_kernels.foreign import check_no_peft, importing
from lora_kernels.model.paths import adapted_layers
from lora_kernels.model.route import adapter_names

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["adapter_callback"]

_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


def adapter_callback(only: bool = False) -> "TrainerCallback":
    """A TrainerCallback: every checkpoint gets a folder ``adapter``, as save_adapter writes it.

    load_adapter and PEFT open it. only: the checkpoint's model.safetensors then holds what LoRA
    trains, under the keys of lora_state_dict, and nothing of the base model. Trainer resumes from
    such a checkpoint, and loads the best one at the end, into a model that has its base weights.
    Usage: ``Trainer(..., callbacks=[lora_kernels.adapter_callback()])``.
    Raises: ImportError if transformers is not installed; when training begins, ValueError for a
    model without LoRA, with PEFT's adapters or with several; when a checkpoint is written, what
    save_adapter raises.
    """
    return _callback_class()(only)


@functools.cache
def _callback_class() -> type:
    with importing("transformers", "adapter_callback"):
        from transformers import TrainerCallback

    class AdapterCallback(TrainerCallback):
        def __init__(self, only: bool):
            self.only = only

        def on_train_begin(self, args, state, control, model=None, **others):
            _check_model(model)

        def on_save(self, args, state, control, model=None, **others):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_adapter(model, folder / "adapter")  # on every rank: they gather what is sharded
            if self.only and state.is_world_process_zero:
                _keep_only_lora(model, folder)

    return AdapterCallback


def _check_model(model: nn.Module) -> None:
    """model has an adapter that save_adapter can write. Raises: ValueError, TypeError."""
    where = "adapter_callback"
    check_no_peft(where, model, "Trainer saves them by itself: leave the callback out")
    if adapter_names(model):
        raise ValueError(
            f"{where}: the model has several adapters, and a checkpoint has a folder for one: call "
            f"save_adapter(model, directory, adapter=...) for each of them"
        )
    if not adapted_layers(model):
        raise ValueError(f"{where}: the model has no LoRA layer: call apply_lora(model, ...) first")


def _keep_only_lora(model: nn.Module, folder: Path) -> None:
    """Puts what LoRA trains in place of all weights in a folder of a checkpoint."""
    from safetensors.torch import save_file

    kept = {
        key: value.detach().cpu().clone().contiguous()  # tied tensors share memory
        for key, value in lora_state_dict(model).items()
    }
    beside = folder / ".lora.safetensors"
    save_file(kept, beside, metadata={"format": "pt"})
    for path in list(folder.iterdir()):
        if _WEIGHTS.fullmatch(path.name):
            path.unlink()
    os.replace(beside, folder / "model.safetensors")
