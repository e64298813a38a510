"""The layers that are compared. A provider builds one module from the operands of a cell.

Every module holds copies of the same weights. Only lora_A and lora_B train, in that order among its
parameters. A peer is imported by its own provider: PEFT alone takes seconds.
"""

from types import ModuleType

import torch
from torch import Tensor, nn

from tests.formula import Problem

__all__ = ["frozen", "lora_kernels", "loralib", "peft"]


def frozen(problem: Problem) -> nn.Module:
    """The floor: the base layer alone."""
    return _base(problem).requires_grad_(False)


def loralib(problem: Problem) -> nn.Module:
    import loralib as lora

    return _loralib_layer(lora, problem)


def lora_kernels(problem: Problem) -> nn.Module:
    import lora_kernels as lora

    return _loralib_layer(lora, problem)


def peft(problem: Problem) -> nn.Module:
    """PEFT in eager mode, without the model around the layer."""
    from peft import LoraConfig, inject_adapter_in_model

    r = problem.b.shape[1]
    config = LoraConfig(
        r=r, lora_alpha=problem.scaling * r, lora_dropout=problem.dropout_p, target_modules=["0"]
    )
    layer = inject_adapter_in_model(config, nn.Sequential(_base(problem)))[0]
    _fill(layer.lora_A["default"].weight, problem.a)
    _fill(layer.lora_B["default"].weight, problem.b)
    return layer


def _base(problem: Problem) -> nn.Linear:
    n, k = problem.w.shape
    layer = nn.Linear(k, n, device=problem.w.device, dtype=problem.w.dtype)
    _fill(layer.weight, problem.w)
    _fill(layer.bias, problem.bias)
    return layer


def _loralib_layer(lora: ModuleType, problem: Problem) -> nn.Module:
    """The same script serves loralib and lora_kernels."""
    (n, k), r = problem.w.shape, problem.b.shape[1]
    options = {
        "r": r,
        "lora_alpha": problem.scaling * r,
        "lora_dropout": problem.dropout_p,
        "device": problem.w.device,
        "dtype": problem.w.dtype,
    }
    if len(problem.groups) > 1:
        layer = lora.MergedLinear(k, n, enable_lora=problem.enable_lora, **options)
    else:
        layer = lora.Linear(k, n, **options)
    _fill(layer.weight, problem.w)
    _fill(layer.bias, problem.bias)
    _fill(layer.lora_A, problem.a)
    _fill(layer.lora_B, problem.b)
    layer.bias.requires_grad_(False)
    return layer


def _fill(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)
