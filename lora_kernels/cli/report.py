"""lora-kernels report: on what LoRA layers of a model would run here, from its configuration."""

import argparse
import json
import warnings

import torch
from torch import nn

from lora_kernels.cli.errors import UsageError
from lora_kernels.integrations import patch_peft
from lora_kernels.model.apply import apply_lora
from lora_kernels.model.targets import unmatched_names
from lora_kernels.report_rows import Report
from lora_kernels.reporting import report as report_of
from lora_kernels.tuning import machine, model_shapes

__all__ = ["as_json", "main", "report"]


def main(options: argparse.Namespace) -> int:
    """Prints the report that the command line asks for."""
    found = report(options)
    print(as_json(found) if options.json else found)
    return 0


def report(options: argparse.Namespace) -> Report:
    """What the command line asks for.

    Raises: UsageError, in one line, if no model can be made, or if it cannot get such layers.
    """
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    try:
        model = model_shapes.without_weights(options.model, dtype)
        if getattr(model.config, "quantization_config", None) is not None:
            raise ValueError(
                f"{options.model}: its layers are quantised, which their configuration alone does "
                f"not make: load the model and call lora_kernels.report(model)"
            )
        add = _add_peft if options.peft else _add_own
        model = add(model, options.rank, options.target_modules or "all-linear")
        device = machine.device_of_kernels() or torch.device("cpu")
        return report_of(model, options.tokens, options.verbose, device=device)
    except ImportError as error:
        needs = "peft transformers" if options.peft else "transformers"
        raise UsageError(f"report: {error}: pip install {needs}") from error
    except ValueError as error:
        raise UsageError(f"report: {' '.join(str(error).split())}") from error


def _add_own(model: nn.Module, rank: int, targets) -> nn.Module:
    return apply_lora(model, r=rank, lora_alpha=rank, target_modules=targets)


def _add_peft(model: nn.Module, rank: int, targets) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    patch_peft()
    told = unmatched_names(model, targets)  # PEFT says it only if no name matches
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    if told is not None:
        warnings.warn(f"report: {told}", RuntimeWarning, stacklevel=2)
    return model


def as_json(found: Report) -> str:
    """One JSON object."""
    return json.dumps(found.as_dict(), indent=2)
