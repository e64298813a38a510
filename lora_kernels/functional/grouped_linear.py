"""lora_grouped_linear: many updates in one call, each for its own rows."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels import checks
from lora_kernels.functional.operands import under_autocast
from lora_kernels.functional.seeds import seeds_for
from lora_kernels.ops import grouped_linear
from lora_kernels.ops.obstacle import obstacle
from lora_kernels.spec import GroupedSpec

__all__ = ["lora_grouped_linear"]

_NAME = "lora_grouped_linear"


def lora_grouped_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    ends: Tensor,
    bias: Tensor | None = None,
    *,
    groups: Tensor | None = None,
    scaling: float | Sequence[float] = 1.0,
    dropout_p: float | Sequence[float] = 0.0,
    seed: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """y_i = x_i·weightᵀ + bias + scaling_g·(dropout(x_i)·lora_A_gᵀ)·lora_B_gᵀ, row by row.

    The rows lie in Q segments, one after another, and all rows of a segment have one group g of
    factors. So adapters of a batch are groups of rows over one weight, and experts of a mixture are
    groups of rows over a stack of weights.

    Shapes: x [S, K]; weight [N, K], or [E, N, K] (any strides: pass ``w.mT`` for one stored
    [E, K, N]); lora_A [G, R, K] and lora_B [G, N, R], or G factors [R_g, K] and [N, R_g] of any
    ranks; ends int32 [Q], the row behind each segment, ascending; bias [N], or [E, N] -> y [S, N].

    * groups: int32 [Q], the group of each segment, -1 for none. One group may have several
      segments. None: segment q has group q, and Q is G.
    * A weight [E, N, K] is a stack of experts: Q is a multiple of E, and each expert has Q/E
      segments, expert after expert.
    * index: int64 [S]. Row i is x[index[i]] of an x [T, K]. What is kept for the backward is x, and
      not the rows gathered from it.
    * Rows behind the last end: x·weightᵀ + bias with one weight, zero with experts.
    * scaling, dropout_p: one number for all groups, or G. seed: int64 tensor of G elements on x's
      device; None draws them. The dropout mask of a group counts its own rows, so it is the same
      whatever else is in the batch.

    On a GPU the kernels find each row's segment on the device, so nothing waits for ends on the
    host. float64, and LORA_KERNELS_PLAN=reference, run PyTorch's operators segment by segment, and
    do wait.

    Dtypes: as lora_linear. Gradients: of x, weight, lora_A, lora_B and bias; those of a group
    without rows are zero.
    Raises: TypeError, ValueError for operands that do not fit, as lora_linear; ValueError if ends
    are not ascending or pass the rows, or groups or index are out of range. These values are looked
    at on a CPU alone: on a GPU that would wait for it. NotImplementedError under torch.func's
    transforms, recorders and for tensors of other classes. RuntimeError for a double backward
    through x and lora_B if lora_A does not require a gradient.
    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1, for many pairs of factors at once.
    """
    reason = obstacle(x, weight, _first(lora_A), _first(lora_B), bias)
    if reason is not None:
        raise NotImplementedError(
            f"{_NAME}: {reason}, and this function has no plain form for that: call lora_linear "
            f"for the rows of each group"
        )
    _check_weight(weight)
    a, b = _stacked("lora_A", lora_A, 0), _stacked("lora_B", lora_B, 1)
    checks.check_tensor(_NAME, "x", x)
    if x.dim() != 2 or x.shape[1] != weight.shape[-1]:
        _fail("x", f"have shape [rows, {weight.shape[-1]}]", list(x.shape))
    dtype = checks.autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = bias.to(dtype) if isinstance(bias, Tensor) else bias
    checks.check_device_and_dtype(_NAME, x, weight)
    _check_factors(weight, a, b, bias)
    _check_routing(x, weight, a.shape[0], ends, groups, index)
    spec = _spec(a.shape[0], scaling, dropout_p)
    seeds = None
    if spec.drops:
        seeds = seeds_for(_NAME, x, max(spec.dropout_ps), seed, a.shape[0])
    spec = under_autocast(spec, x, a, b)
    return grouped_linear.lora_grouped_linear(
        (x, weight, a, b, bias), (ends, groups, index), seeds, spec
    )


def _first(factors):
    return factors[0] if isinstance(factors, (list, tuple)) and factors else factors


def _stacked(name: str, factors: Tensor | Sequence[Tensor], rank_dim: int) -> Tensor:
    """Factors of any ranks as one tensor, padded with zeros: these add nothing, and stay zero."""
    if isinstance(factors, Tensor):
        checks.check_tensor(_NAME, name, factors)
        if factors.dim() != 3:
            shape = "[G, R, K]" if rank_dim == 0 else "[G, N, R]"
            _fail(name, f"have shape {shape}, or be a sequence of matrices", list(factors.shape))
        return factors
    if not isinstance(factors, (list, tuple)) or not factors:
        _fail(name, "be a tensor or a sequence of at least one", factors)
    for g, factor in enumerate(factors):
        checks.check_tensor(_NAME, f"{name}[{g}]", factor)
        if factor.dim() != 2 or factor.shape[rank_dim] < 1:
            _fail(f"{name}[{g}]", "be a matrix of rank >= 1", list(factor.shape))
        first = factors[0]
        if factor.shape[1 - rank_dim] != first.shape[1 - rank_dim]:
            sizes = [list(factor.shape) for factor in factors]
            _fail(name, "have one shape but for the rank", sizes)
        if factor.dtype != first.dtype or factor.device != first.device:
            got = f"{factor.dtype} on {factor.device}"
            _fail(f"{name}[{g}]", f"be {first.dtype} on {first.device} like the first", got)
    # As kernels multiply 16 ranks at once at least, and so that ranks of others change no bit.
    rank = -(-max(factor.shape[rank_dim] for factor in factors) // 16) * 16
    zero = factors[0].new_zeros(())
    padded = []
    for factor in factors:
        missing = list(factor.shape)
        missing[rank_dim] = rank - missing[rank_dim]
        whole = missing[rank_dim] == 0
        padded.append(factor if whole else torch.cat([factor, zero.expand(missing)], rank_dim))
    return torch.stack(padded)


def _check_weight(weight) -> None:
    checks.check_tensor(_NAME, "weight", weight)
    if weight.dim() not in (2, 3):
        _fail("weight", "have shape [N, K] or [E, N, K]", list(weight.shape))


def _check_factors(weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    n, k = weight.shape[-2:]
    count, rank = a.shape[:2]
    if a.shape[2] != k or count < 1 or rank < 1:
        _fail("lora_A", f"have shape [G, R, {k}] with G, R >= 1", list(a.shape))
    if b.shape != (count, n, rank):
        _fail("lora_B", f"have shape {[count, n, rank]}", list(b.shape))
    if bias is not None:
        checks.check_tensor(_NAME, "bias", bias)
        if bias.shape != weight.shape[:-1]:
            _fail("bias", f"have shape {list(weight.shape[:-1])}", list(bias.shape))
        if bias.dtype != weight.dtype:
            _fail("bias", f"have weight's dtype {weight.dtype}", bias.dtype)
    for name, operand in (("lora_A", a), ("lora_B", b), ("bias", bias)):
        if operand is not None and operand.device != weight.device:
            _fail(name, f"be on weight's device {weight.device}", operand.device)


def _check_routing(
    x: Tensor,
    weight: Tensor,
    count: int,
    ends: Tensor,
    groups: Tensor | None,
    index: Tensor | None,
) -> None:
    """ends, groups and index fit x, weight and count groups."""
    integers: list[tuple[str, Any, torch.dtype]] = [
        ("ends", ends, torch.int32),
        ("groups", groups, torch.int32),
        ("index", index, torch.int64),
    ]
    for name, tensor, dtype in integers:
        if tensor is None and name != "ends":
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.dim() != 1:
            got = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else tensor
            _fail(name, f"be a vector of {dtype}", got)
        if tensor.device != x.device:
            _fail(name, f"be on x's device {x.device}", tensor.device)
    segments = ends.shape[0]
    if groups is None and segments != count:
        _fail("ends", f"have an entry for each of {count} groups if groups is None", segments)
    if groups is not None and groups.shape[0] != segments:
        _fail("groups", f"have an entry for each of {segments} ends", groups.shape[0])
    if weight.dim() == 3 and (weight.shape[0] == 0 or segments % weight.shape[0]):
        _fail("ends", f"have a multiple of {weight.shape[0]} entries, one expert's each", segments)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    rows = x.shape[0] if index is None else index.shape[0]
    values = [0, *ends.tolist(), rows]
    if any(after < before for before, after in itertools.pairwise(values)):
        _fail("ends", f"ascend from 0 to at most the {rows} rows", ends.tolist())
    if groups is not None and groups.numel() and not -1 <= groups.min() <= groups.max() < count:
        _fail("groups", f"be -1, or the number of one of {count} groups", groups.tolist())
    if index is not None and index.numel() and not 0 <= index.min() <= index.max() < x.shape[0]:
        _fail("index", f"be rows of x, 0 to {x.shape[0] - 1}", [int(index.min()), int(index.max())])


def _spec(count: int, scaling, dropout_p) -> GroupedSpec:
    spec = GroupedSpec(_numbers("scaling", scaling, count), _numbers("dropout_p", dropout_p, count))
    for scaling in spec.scalings:
        checks.check_scaling(_NAME, scaling)
    for dropout_p in spec.dropout_ps:
        checks.check_dropout_p(_NAME, dropout_p)
    return spec


def _numbers(name: str, value, count: int) -> tuple[float, ...]:
    """One number for all groups, or one for each."""
    values = value if isinstance(value, (list, tuple)) else (value,)
    if len(values) not in (1, count):
        _fail(name, f"be a number, or have one for each of {count} groups", value)
    return tuple(values)


def _fail(name: str, expected: str, value) -> None:
    raise ValueError(f"{_NAME}: {name} must {expected}, got {value}")
