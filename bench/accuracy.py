"""The check in front of every time: results against float64, by the one rule of the tests."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lora_kernels.testing.problem import Problem, lora_formula
from lora_kernels.testing.tolerance import assert_close

__all__ = ["check", "compare", "dropout_mask", "solve", "trained"]

_SEED = 1234  # of torch's generator in front of a forward; equal seeds, equal masks


def check(name: str, build: Callable[[Problem], nn.Module], problem: Problem) -> None:
    """AssertionError unless y, dx, da and db of a module in training mode are right.

    They are compared with the formula under the module's own dropout mask. Of a module in which
    nothing trains, the frozen layer, y and dx are, with the formula under a mask that drops all.
    """
    module = build(problem)
    nothing = torch.zeros_like(problem.x, dtype=torch.float64)
    mask = dropout_mask(name, build, problem) if trained(module) else nothing
    actual = solve(module, problem.x, problem.dy)
    exact = _formula(problem, mask, torch.float64)[: len(actual)]
    baseline = _formula(problem, mask, problem.x.dtype)[: len(actual)]
    compare(name, ("y", "dx", "da", "db")[: len(actual)], actual, exact, baseline)


def compare(
    name: str,
    labels: Sequence[str],
    actual: Sequence[Tensor],
    exact: Sequence[Tensor],
    baseline: Sequence[Tensor],
) -> None:
    """AssertionError that names the implementation and the first tensor which is wrong.

    float32 gradients of factors over a 16-bit layer are judged as the layer's own.
    """
    for label, result, *references in zip(labels, actual, exact, baseline, strict=True):
        assert_close(result.to(references[1].dtype), *references, what=f"{name} {label}")


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that train, in their order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def solve(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """y, dx and the gradient of each trained parameter, in their order."""
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(_SEED)
    y = module(x)
    return y.detach(), *torch.autograd.grad(y, (x, *trained(module)), dy)


def dropout_mask(name: str, build: Callable[[Problem], nn.Module], problem: Problem) -> Tensor:
    """What a module's dropout multiplies x by [M, K], in float64: 0 or 1 / (1 - p).

    Read off dx = dy·w + mask∘(dh·a) of a module with w = 0, ones for x, a and dy, and for b a
    power of two that makes dh·a about one without rounding.
    Raises: AssertionError if it keeps too much or too little, or scales wrongly.
    """
    ones = {what: torch.ones_like(getattr(problem, what)) for what in ("x", "a", "dy")}
    _, exponent = math.frexp(problem.scaling * problem.b.numel())
    b = torch.full_like(problem.b, 2.0**-exponent)
    probe = Problem(**{**vars(problem), **ones, "b": b, "w": torch.zeros_like(problem.w)})
    _, dx, *_ = solve(build(probe), probe.x, probe.dy)
    observed = dx.double() / (problem.scaling * b.double().sum())

    kept, p = observed != 0, problem.dropout_p
    sigma = (p * (1 - p) / kept.numel()) ** 0.5
    rate = kept.double().mean().item()
    assert abs(rate - (1 - p)) <= 5 * sigma, f"{name} keeps {rate:.4f} of x at dropout {p}"
    scale = torch.where(kept, 1 / (1 - p), 0.0).double()
    # p may be rounded to 16 bits; the probe rounds as its dtype does, a few times over.
    tolerance = max(1e-4, 8 * torch.finfo(problem.x.dtype).eps)
    torch.testing.assert_close(
        observed, scale, rtol=tolerance, atol=0, msg=f"{name} scales x wrongly"
    )
    # In 16 bits the probe is too coarse to be the mask itself, and p's rounding too fine to count.
    return observed if tolerance == 1e-4 else scale


def _formula(problem: Problem, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """y, dx, da and db in dtype."""
    x, a, b = (t.to(dtype).requires_grad_() for t in (problem.x, problem.a, problem.b))
    w, bias, dy, mask = (t.to(dtype) for t in (problem.w, problem.bias, problem.dy, mask))
    y = lora_formula(x, w, a, b, bias, problem.spec, mask)
    return y.detach(), *torch.autograd.grad(y, (x, a, b), dy)
