"""The layers that are compared. A provider builds one module from the operands of a cell.

Every module holds copies of the same weights. Only lora_A and lora_B train, in that order among its
parameters. A peer is imported by its own provider: PEFT alone takes seconds.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from bench import peers
from bench.shapes import Cell
from lora_kernels.testing.problem import Problem

__all__ = ["FLOOR", "FUSED", "OURS", "PLAN", "PROVIDERS", "SANDWICH", "Provider", "choose"]

OURS = "lora_kernels"
FUSED, SANDWICH = f"{OURS}[fused]", f"{OURS}[sandwich]"  # this package under one of its plans
FLOOR = "frozen"
PLAN = "LORA_KERNELS_PLAN"


@dataclass(frozen=True)
class Provider:
    """One way to run the layer.

    takes: the cells that it can run. needs: the package that it is; None is part of this one.
    plan: the value of LORA_KERNELS_PLAN around its steps; None leaves the variable alone.
    """

    name: str
    build: Callable[[Problem], nn.Module]
    takes: Callable[[Cell], bool] = lambda cell: True
    needs: str | None = None
    plan: str | None = None

    def missing(self) -> str | None:
        """Why it cannot run here, if it cannot."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        return None

    @contextlib.contextmanager
    def context(self):
        before = os.environ.get(PLAN)
        if self.plan is not None:
            os.environ[PLAN] = self.plan
        try:
            yield
        finally:
            if before is not None:
                os.environ[PLAN] = before
            elif self.plan is not None:
                del os.environ[PLAN]


def choose(cell, names: Collection[str], providers: Collection[Provider]) -> dict[str, Provider]:
    """Those of providers that take the cell: the named ones, always the floor and this package.

    Without names: all.
    """
    return {
        provider.name: provider
        for provider in providers
        if provider.takes(cell) and (not names or provider.name in (*names, FLOOR, OURS))
    }


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
    layer = inject_adapter_in_model(
        config, nn.Sequential(_base(problem)), low_cpu_mem_usage=False
    )[0]  # fmt: skip
    layer.to(problem.x.dtype)  # adapters in the dtype of the base, as all providers have them
    _fill(layer.lora_A["default"].weight, problem.a)
    _fill(layer.lora_B["default"].weight, problem.b)
    return layer


def compiled(build: Callable[[Problem], nn.Module]) -> Callable[[Problem], nn.Module]:
    """The module of another provider under torch.compile, for its one shape."""

    @functools.wraps(build)
    def build_compiled(problem: Problem) -> nn.Module:
        return torch.compile(build(problem), dynamic=False)

    return build_compiled


def _linear(cell: Cell) -> bool:
    return not cell.merged


def _equal_groups(cell: Cell) -> bool:
    return cell.out_splits is None


def _on_gpu(cell: Cell) -> bool:
    return cell.device == "cuda"


PROVIDERS = (
    Provider(FLOOR, frozen),
    Provider("loralib", loralib, _equal_groups, needs="loralib"),
    Provider("peft", peft, _linear, needs="peft"),
    # On a CPU the compiler alone would take most of the five minutes.
    Provider(
        "compiled peft", compiled(peft), lambda cell: _linear(cell) and _on_gpu(cell), needs="peft"
    ),
    Provider("compiled formula", compiled(peers.Formula), _on_gpu),
    Provider("sandwich", peers.Sandwich, _linear),
    Provider("unsloth", peers.Unsloth, lambda cell: _linear(cell) and cell.dropout_p == 0),
    *(
        # A CPU has one plan, the reference.
        Provider(f"{OURS}[{plan}]", lora_kernels, _on_gpu, plan=plan)
        for plan in ("fused", "sandwich", "reference")
    ),
    Provider(OURS, lora_kernels),
)


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
        sizes = problem.out_splits
        if len(set(sizes)) > 1:
            options["out_splits"] = sizes
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
