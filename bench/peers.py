"""Peers that are written here because no package has them: each is what its name says, no more."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.testing.problem import Problem, lora_formula

__all__ = ["Addmm", "Formula", "Unsloth"]


class _Peer(nn.Module):
    """The operands of a problem, of which lora_A and lora_B train."""

    def __init__(self, problem: Problem):
        super().__init__()
        for name, value in (("w", problem.w), ("bias", problem.bias)):
            self.register_buffer(name, None if value is None else value.detach().clone())
        self.a, self.b = nn.Parameter(problem.a.clone()), nn.Parameter(problem.b.clone())
        self.spec = problem.spec

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w, self.a, self.b, self.bias, self.spec)


class Formula(_Peer):
    """The formula in plain PyTorch, for torch.compile to make what it can of it."""

    @staticmethod
    def function(x, w, a, b, bias, spec):
        p = spec.dropout_p
        mask = F.dropout(torch.ones_like(x), p) if p > 0 else None
        return lora_formula(x, w, a, b, bias, spec, mask)


class _Addmm(torch.autograd.Function):
    """Shapes: x [M, K], w [N, K], a [R, K], b [N, R], bias [N] -> y [M, N]. Keeps x, mask and h."""

    @staticmethod
    def forward(ctx, x, w, a, b, bias, spec):
        scaling, dropout_p = spec.scaling, spec.dropout_p
        x_hat, mask = x, None
        if dropout_p > 0:
            x_hat, mask = torch.native_dropout(x, dropout_p, True)
        h = x_hat @ a.T  # [M, R]
        y = torch.addmm(bias, h, b.T, alpha=scaling)  # [M, N]
        y.addmm_(x, w.T)
        ctx.save_for_backward(x, mask, h, w, a, b)
        ctx.scaling, ctx.keep_scale = scaling, 1 / (1 - dropout_p)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, mask, h, w, a, b = ctx.saved_tensors
        dh = (dy @ b) * ctx.scaling  # [M, R]
        dx = dh @ a
        x_hat = x
        if mask is not None:
            dx = torch.ops.aten.native_dropout_backward(dx, mask, ctx.keep_scale)
            x_hat = torch.ops.aten.native_dropout_backward(x, mask, ctx.keep_scale)
        dx.addmm_(dy, w)
        return dx, None, dh.T @ x_hat, (dy.T @ h) * ctx.scaling, None, None


class Addmm(_Peer):
    """The small product first, then cuBLAS adds the large one to it in place."""

    function = _Addmm.apply


class _Unsloth(torch.autograd.Function):
    """Shapes: x [M, K], w [N, K], a [R, K], b [N, R], bias [N] -> y [M, N]. Keeps x."""

    @staticmethod
    def forward(ctx, x, w, a, b, bias, spec):
        y = F.linear(x, w, bias)
        y.addmm_(x @ a.T, b.T, alpha=spec.scaling)
        ctx.save_for_backward(x, w, a, b)
        ctx.scaling = spec.scaling
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w, a, b = ctx.saved_tensors
        da = ((dy @ b).T @ x) * ctx.scaling
        db = (dy.T @ (x @ a.T)) * ctx.scaling
        dx = dy @ w
        dx.addmm_(dy @ b, a, alpha=ctx.scaling)
        return dx, None, da, db, None, None


class Unsloth(_Peer):
    """No dropout; the backward computes h again. In the manner of Unsloth's LoRA_W.

    Source: unslothai/unsloth, unsloth/kernels/fast_lora.py.
    """

    function = _Unsloth.apply
