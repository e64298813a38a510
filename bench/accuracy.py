"""The gate in front of every time: results against float64, by the one rule of the tests."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.formula import Problem, lora_formula
from tests.tolerance import assert_close

__all__ = ["check", "dropout_mask"]

_SEED = 1234  # of torch's generator in front of a forward; equal seeds, equal masks


def check(name: str, build: Callable[[Problem], nn.Module], problem: Problem) -> None:
    """AssertionError unless y, dx, da and db of a provider in training mode are right.

    They are compared with the formula under the provider's own dropout mask.
    """
    mask = dropout_mask(build, problem)
    _check_mask(name, mask, problem.dropout_p)
    exact = _formula(problem, mask, torch.float64)
    baseline = _formula(problem, mask, problem.x.dtype)

    module = build(problem)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    x = problem.x.clone().requires_grad_()
    torch.manual_seed(_SEED)
    y = module(x)
    actual = (y, *torch.autograd.grad(y, (x, *trained), problem.dy))
    for what, *results in zip(("y", "dx", "da", "db"), actual, exact, baseline, strict=True):
        assert_close(*results, what=f"{name} {what}")


def dropout_mask(build: Callable[[Problem], nn.Module], problem: Problem) -> Tensor:
    """What a provider's dropout multiplies x by [M, K], in float64: 0 or 1 / (1 - p).

    Read off dx = dy·w + mask∘(dh·a) of a module with w = 0 and ones for a, b and dy.
    """
    ones = {name: torch.ones_like(getattr(problem, name)) for name in ("x", "a", "b", "dy")}
    probe = Problem(**{**vars(problem), **ones, "w": torch.zeros_like(problem.w)})
    module = build(probe)  # draws initial weights, so before the seed
    x = probe.x.requires_grad_()
    torch.manual_seed(_SEED)
    (dx,) = torch.autograd.grad(module(x), x, probe.dy)
    return dx.double() / (problem.scaling * problem.b.numel())


def _check_mask(name: str, mask: Tensor, p: float) -> None:
    kept = mask != 0
    sigma = (p * (1 - p) / mask.numel()) ** 0.5
    rate = kept.double().mean().item()
    assert abs(rate - (1 - p)) <= 5 * sigma, f"{name} keeps {rate:.4f} of x at dropout {p}"
    scale = torch.full_like(mask, 1 / (1 - p)).where(kept, 0)
    # p may be rounded to 16 bits.
    torch.testing.assert_close(mask, scale, rtol=1e-4, atol=0, msg=f"{name} scales x wrongly")


def _formula(problem: Problem, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """y, dx, da and db in dtype."""
    x, a, b = (t.to(dtype).requires_grad_() for t in (problem.x, problem.a, problem.b))
    w, bias, dy, mask = (t.to(dtype) for t in (problem.w, problem.bias, problem.dy, mask))
    y = lora_formula(
        x, w, a, b, bias, scaling=problem.scaling, mask=mask, groups=problem.groups
    )  # fmt: skip
    return y.detach(), *torch.autograd.grad(y, (x, a, b), dy)
