"""The layers that are compared. An implementation builds one module from the operands of a cell.

Every module holds copies of the same weights. Only lora_A and lora_B train, in that order among its
parameters. A peer is imported by its own implementation: PEFT alone takes seconds.
"""

import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor, nn

import lora_kernels
from bench import peers
from bench.cells import Cell
from lora_kernels.testing.problem import Problem
from lora_kernels.tuning.rows import OURS

__all__ = [
    "FLOOR", "IMPLEMENTATIONS", "VARIABLE", "Implementation", "choose", "compiled", "fill",
    "frozen", "loralib", "loralib_layer", "ours", "peft",
]  # fmt: skip

FLOOR = "frozen"
VARIABLE = "LORA_KERNELS_PLAN"


@dataclass(frozen=True)
class Implementation:
    """One way to run the layer.

    takes: the cells that it can run. needs: the package that it is; None is part of this one.
    algorithm: the value of LORA_KERNELS_PLAN around its steps; None leaves the variable alone.
    always: it takes part even if others are named.
    """

    name: str
    build: Callable[..., nn.Module]
    takes: Callable[[Cell], bool] = lambda cell: True
    needs: str | None = None
    algorithm: str | None = None
    always: bool = False

    def context(self):
        """In which its algorithm is asked for."""
        return mock.patch.dict(os.environ, {VARIABLE: self.algorithm} if self.algorithm else {})


def choose(
    cell, names: Collection[str], implementations: Iterable[Implementation]
) -> dict[str, Implementation]:
    """Those that take the cell: the named ones and those of always. Without names: all."""
    return {
        each.name: each
        for each in implementations
        if each.takes(cell) and (not names or each.always or each.name in names)
    }


def frozen(problem: Problem) -> nn.Module:
    """The floor: the base layer alone."""
    w, bias = problem.w, problem.bias
    (n, k), has_bias = w.shape, bias is not None
    layer = nn.Linear(k, n, has_bias, w.device, w.dtype).requires_grad_(False)
    return fill(layer, (layer.weight, w), (layer.bias, bias))


def loralib(problem: Problem) -> nn.Module:
    """loralib's layer."""
    import loralib as lora

    return loralib_layer(lora, problem)


def ours(problem: Problem) -> nn.Module:
    """The layer of this package."""
    return loralib_layer(lora_kernels, problem)


def loralib_layer(lora: ModuleType, problem: Problem) -> nn.Module:
    """The layer of loralib or of lora_kernels, at any commit: the same script serves all."""
    w, r, splits = problem.w, problem.b.shape[1], problem.splits
    n, k = w.shape
    fan_in_fan_out = not w.is_contiguous()  # stored [K, N], and kept so
    options = {
        "r": r,
        "lora_alpha": problem.scaling * r,
        "lora_dropout": problem.dropout_p,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": problem.bias is not None,
        "device": w.device,
        "dtype": w.dtype,
    }
    if len(splits.sizes) > 1:
        if len(set(splits.sizes)) > 1:
            options["out_splits"] = list(splits.sizes)
        layer = lora.MergedLinear(k, n, enable_lora=list(splits.enabled), **options)
    else:
        layer = lora.Linear(k, n, **options)
    if layer.bias is not None:
        layer.bias.requires_grad_(False)
    layer.weight.data = (w.T if fan_in_fan_out else w).clone()
    for factor in (layer.lora_A, layer.lora_B):
        factor.data = factor.data.to(problem.a.dtype)
    return fill(
        layer, (layer.bias, problem.bias), (layer.lora_A, problem.a), (layer.lora_B, problem.b)
    )


def peft(problem: Problem) -> nn.Module:
    """PEFT in eager mode, without the model around the layer."""
    from peft import LoraConfig, inject_adapter_in_model

    r = problem.b.shape[1]
    config = LoraConfig(
        r=r, lora_alpha=problem.scaling * r, lora_dropout=problem.dropout_p, target_modules=["0"]
    )
    model = inject_adapter_in_model(
        config, nn.Sequential(frozen(problem)), low_cpu_mem_usage=False
    )  # fmt: skip
    layer = model[0].to(problem.w.dtype)  # adapters in the dtype of the base, as all have them
    factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for factor in factors:
        factor.data = factor.data.to(problem.a.dtype)
    return fill(layer, (factors[0], problem.a), (factors[1], problem.b))


def compiled(build: Callable[[Problem], nn.Module]) -> Callable[[Problem], nn.Module]:
    """The module of another implementation under torch.compile, for its one shape."""
    return lambda problem: torch.compile(build(problem), dynamic=False)


def fill(module: nn.Module, *pairs: tuple[Tensor | None, Tensor | None]) -> nn.Module:
    """The module, with the second of each pair copied into the first, if there is one."""
    with torch.no_grad():
        for parameter, value in pairs:
            if parameter is not None:
                parameter.copy_(value)
    return module


def _linear(cell: Cell) -> bool:
    return not cell.merged


def _on_gpu(cell: Cell) -> bool:
    return cell.device == "cuda"


IMPLEMENTATIONS = (
    Implementation(FLOOR, frozen, always=True),
    Implementation("loralib", loralib, lambda cell: cell.out_splits is None, needs="loralib"),
    Implementation("peft", peft, _linear, needs="peft"),
    # On a CPU the compiler alone would take most of the five minutes.
    Implementation(
        "compiled peft", compiled(peft), lambda cell: _linear(cell) and _on_gpu(cell), needs="peft"
    ),
    Implementation("compiled formula", compiled(peers.Formula), _on_gpu),
    Implementation("addmm", peers.Addmm, _linear),
    Implementation("unsloth", peers.Unsloth, lambda cell: _linear(cell) and cell.dropout_p == 0),
    *(
        # A CPU has one algorithm, the reference.
        Implementation(f"{OURS}[{algorithm}]", ours, _on_gpu, algorithm=algorithm)
        for algorithm in ("fused", "addmm", "reference")
    ),
    Implementation(OURS, ours, always=True),
)
