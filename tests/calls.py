"""The public functions on a Problem."""

from torch import Tensor, autograd

import lora_kernels
from lora_kernels.functional.dora import dora_forward
from lora_kernels.testing.dora_problem import DORA_OPERANDS, DoraProblem
from lora_kernels.testing.problem import OPERANDS, Problem


def call(problem: Problem, **operands) -> Tensor:
    """y by the public function on problem's operands, some of them replaced."""
    x, w, a, b, bias = (operands.get(name, getattr(problem, name)) for name in OPERANDS)
    constants = {
        "scaling": problem.scaling,
        "dropout_p": problem.dropout_p,
        "seed": problem.seed if problem.dropout_p else None,
    }
    if problem.splits.enabled == (True,):
        return lora_kernels.lora_linear(x, w, a, b, bias, **constants)
    return lora_kernels.lora_merged_linear(
        x, w, a, b, bias, enable_lora=problem.splits.enabled, out_splits=problem.splits.sizes,
        **constants,
    )  # fmt: skip


def solve(problem: Problem) -> dict[str, Tensor]:
    """y and the gradients of all operands through the public function, strides kept."""
    leaves = {name: value.detach().requires_grad_() for name, value in problem.operands().items()}
    y = (call_dora if isinstance(problem, DoraProblem) else call)(problem, **leaves)
    grads = autograd.grad(y, list(leaves.values()), problem.dy)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def call_dora(problem: DoraProblem, **operands) -> Tensor:
    """y with a magnitude, on problem's operands, some of them replaced."""
    x, w, a, b, bias, magnitude = (
        operands.get(name, getattr(problem, name)) for name in DORA_OPERANDS
    )
    spec, seed = problem.spec, problem.seed if problem.dropout_p else None
    if spec.low_rank_only:
        return dora_forward("lora_linear", x, w, a, b, bias, magnitude, spec, seed)
    return lora_kernels.lora_linear(
        x, w, a, b, bias, magnitude=magnitude, scaling=spec.scaling, dropout_p=spec.dropout_p,
        seed=seed,
    )  # fmt: skip
