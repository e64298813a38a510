"""PEFT's variants that are lora_linear over other operands, and which operands those are.

lora_B.bias (lora_bias=True) adds to the bias. MiCA is LoRA whose lora_B does not train. KaSA scales
the columns of lora_B. BD-LoRA's lora_B in blocks is that of lora_merged_linear, its lora_A in
blocks a dense one with zeros. Without dropout several adapters are one, with their factors side by
side. The gradients flow to PEFT's parameters through what makes the operands of them.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels import functional
from lora_kernels.checks import autocast_dtype
from lora_kernels.foreign import ForeignModule
from lora_kernels.integrations.peft.guard import (
    LINEAR,
    Beyond,
    Fold,
    NotFused,
    Operands,
    not_plain_tensor,
    operands_of,
    parameter,
)
from lora_kernels.integrations.peft.source import digest
from lora_kernels.quantization import FrozenWeight

__all__ = ["Folded", "compute_folded", "folded_of", "register"]


class Folded(NamedTuple):
    """What a layer computes: the operands, and what lora_linear does not take as one of them.

    shift: [N], added to every row of y. groups: b is in so many blocks, each for its own rows of a.
    words: what is folded, for report().
    """

    operands: Operands
    shift: Tensor | None
    groups: int
    words: tuple[str, ...]


class _Variant(NamedTuple):
    """What is known of the class of a variant."""

    forward: Callable
    fold: Fold
    words: str | None


_MODULE = "peft.tuners.lora.variants"
# sha256 of the source of each class's forward in the versions that this is written for.
_KNOWN_FORWARDS = {
    # 0.19.0 to 0.21.2
    "BdLoraLinearVariant": "5cefb0ad91c5d93fb6c376440c11ec506f0567fafa5945243c903f3804432ebb",
    "BlockDiagonalLinear": "fc244bba08d818f856201c3df7fbb12c2d5911660092910fa6d79a4d8b7543b5",
    # 0.20.0 to 0.21.2
    "MiCALinearVariant": "1d35e22943bfa2aa88f51a73e9d8ac0b8650e56f764d23df29e235f093e10e63",
    # 0.21.0 to 0.21.2
    "KasaLinearVariant": "43f12f874c5daee0a8039677c1c3ada86e4cdd30f95adbbdf870f5026c4d3615",
}
_variants: dict[type, _Variant] = {}
_blocks: dict[type[nn.Module], Callable] = {}  # the class of a factor in blocks, and its forward


def register() -> None:
    """Looks up the variants that this version of PEFT has; one of another source is unknown."""
    _variants.clear()
    _blocks.clear()
    try:
        module = importlib.import_module(_MODULE)
    except ModuleNotFoundError:  # before 0.16
        module = None
    for name, known in _KNOWN_FORWARDS.items():
        kind = getattr(module, name, None)
        if kind is None or digest(kind.forward) != known:
            continue
        if issubclass(kind, nn.Module):
            _blocks[kind] = kind.forward
        else:
            _variants[kind] = _Variant(kind.forward, *_FOLDS[name])


def folded_of(layer: ForeignModule) -> Folded | NotFused:
    """What a PEFT LoRA layer that is no plain one computes now, or why PEFT's own forward runs."""
    held = layer._modules["lora_A"]._modules
    names = [name for name in layer.active_adapters if name in held]
    if not names or getattr(layer, "lora_variant", None) is None:
        plain = operands_of(layer)
        return plain if isinstance(plain, NotFused) else Folded(plain, None, 1, ())
    found = []
    for name in names:
        one = _alone(layer, name)
        if isinstance(one, NotFused):
            return one
        found.append(one)
    return found[0] if len(found) == 1 else _joined(found)


def compute_folded(x: Tensor, folded: Folded) -> Tensor:
    """The layer's output. Shapes: x [..., K] -> [..., N]."""
    operands, shift, groups, _ = folded
    weight, a, b, bias, scaling, dropout_p = operands[:6]
    if isinstance(scaling, Tensor):
        b, scaling = b * scaling, 1.0  # its value stays on the device
    # Next to a bias in 16 bits a small shift would be rounded off, and the same for all rows.
    late = isinstance(weight, FrozenWeight) or (autocast_dtype(x) or weight.dtype).itemsize < 4
    if shift is not None and not late:
        bias = shift.to(weight.dtype) if bias is None else bias + shift.to(weight.dtype)
    numbers: dict[str, Any] = {"scaling": scaling, "dropout_p": dropout_p}
    if groups == 1 or isinstance(weight, FrozenWeight):  # which _alone takes with one group only
        y = functional.lora_linear(x, weight, a, b, bias, **numbers)
    else:
        enable_lora = [True] * groups
        y = functional.lora_merged_linear(x, weight, a, b, bias, enable_lora=enable_lora, **numbers)
    return _AddRow.apply(y, shift) if shift is not None and late else y


class _AddRow(torch.autograd.Function):
    """y + row in y's dtype; the gradient of row is summed in row's, which may be wider."""

    @staticmethod
    def forward(ctx, y, row):
        ctx.dtype = row.dtype
        return y + row.to(y.dtype)

    @staticmethod
    def backward(ctx, dy):
        drow = None
        if ctx.needs_input_grad[1]:
            drow = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=ctx.dtype)
        return dy, drow


def _alone(layer: ForeignModule, name: str) -> Folded | NotFused:
    """One adapter."""
    variant = layer.lora_variant.get(name)
    fold: Fold = _as_they_are
    linears, groups = LINEAR, 1
    words: list[str] = []
    if variant is not None:
        known = _variants.get(type(variant))
        if known is None or "forward" in vars(variant):
            plain = operands_of(layer, name)
            unknown = NotFused(f"its adapter is a {type(variant).__name__}")
            return plain if isinstance(plain, NotFused) else unknown
        if type(variant).forward is not known.forward:
            return NotFused(f"{type(variant).__name__}.forward has been replaced")
        fold = known.fold
        words += [known.words] if known.words else []
    lora_a, lora_b = (layer._modules[kind]._modules[name] for kind in ("lora_A", "lora_B"))
    if fold is _from_blocks:
        linears = LINEAR | _blocks
        groups = lora_b.nblocks if type(lora_b) in _blocks else 1
        words += ["lora_A in blocks"] if type(lora_a) in _blocks else []
        words += ["lora_B in blocks"] if type(lora_b) in _blocks else []
    operands = operands_of(layer, name, Beyond(linears, fold, groups))
    if isinstance(operands, NotFused):
        return operands
    if groups > 1 and isinstance(operands.weight, FrozenWeight):
        return NotFused(f"its weight is frozen as {operands.weight.kind}, and lora_B in blocks")
    if getattr(lora_a, "bias", None) is not None:
        return NotFused("lora_A has a bias")
    shift = getattr(lora_b, "bias", None)
    if shift is not None:
        problem = _unfit_shift(shift, operands)
        if problem:
            return problem
        shift = shift * operands.scaling
        words.append("lora_B.bias added to the bias")
    return Folded(operands, shift, groups, tuple(words))


def _unfit_shift(bias: Any, operands: Operands) -> NotFused | None:
    name, b = "lora_B.bias", operands.b
    problem = not_plain_tensor(bias, name, 1)
    if problem:
        return problem
    if (bias.shape[0], bias.dtype, bias.device) != (b.shape[0], b.dtype, b.device):
        return NotFused(
            f"{name} is {bias.dtype} {list(bias.shape)} on {bias.device}, which does not fit lora_B"
        )
    return None


def _joined(found: Sequence[Folded]) -> Folded | NotFused:
    """Several adapters as one."""
    count, several = len(found), [one.operands for one in found]
    first = several[0]
    if any(one.dropout_p for one in several):
        return NotFused(f"{count} of its adapters are active, and each has a dropout mask")
    if any(one.groups > 1 for one in found):
        return NotFused(f"{count} of its adapters are active, one of them with lora_B in blocks")
    if any(one.a.dtype != first.a.dtype for one in several):
        return NotFused("its adapters have several dtypes")
    scaling, bs = first.scaling, [one.b for one in several]
    if isinstance(scaling, Tensor) or any(
        isinstance(one.scaling, Tensor) or one.scaling != scaling for one in several
    ):
        scaling, bs = 1.0, [one.b * one.scaling for one in several]
    shifts = [one.shift for one in found if one.shift is not None]
    operands = first._replace(
        a=torch.cat([one.a for one in several]), b=torch.cat(bs, 1), scaling=scaling
    )
    words = dict.fromkeys(word for one in found for word in one.words)
    shift = functools.reduce(torch.add, shifts) if shifts else None
    return Folded(operands, shift, 1, (f"{count} adapters in one", *words))


# ---- what the factors of a variant come to ----


def _as_they_are(layer: ForeignModule, name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a, b


def _from_blocks(
    layer: ForeignModule, name: str, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor] | NotFused:
    lora_a = layer._modules["lora_A"]._modules[name]
    if type(lora_a) not in _blocks:
        return a, b
    if a.shape[0] % lora_a.nblocks:
        return NotFused(f"lora_A {list(a.shape)} is not {lora_a.nblocks} blocks")
    return torch.block_diag(*a.chunk(lora_a.nblocks)), b


def _with_diagonal(
    layer: ForeignModule, name: str, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor] | NotFused:
    if name in (getattr(layer, "_lora_kasa_truncation_deferred", None) or ()):
        return NotFused("its adapter's first forward is to truncate the base weight (KaSA)")
    diagonal = parameter(layer._modules["lora_diag"], name)
    problem = not_plain_tensor(diagonal, "lora_diag", 1)
    if problem:
        return problem
    if (diagonal.shape[0], diagonal.dtype, diagonal.device) != (b.shape[1], b.dtype, b.device):
        return NotFused(
            f"lora_diag is {diagonal.dtype} {list(diagonal.shape)} on {diagonal.device}, which "
            f"does not fit lora_B"
        )
    return a, b * diagonal


_FOLDS = {
    "BdLoraLinearVariant": (_from_blocks, None),
    "MiCALinearVariant": (_as_they_are, "MiCA"),
    "KasaLinearVariant": (_with_diagonal, "KaSA, its diagonal in lora_B"),
}
