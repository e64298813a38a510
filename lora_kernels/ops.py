"""torch.library ops: CUDA -> kernels by plan, CPU -> reference, fake -> shapes.

Two ops serve LoRALinear (one group) and LoRAMergedLinear (several), two more layers that share
their input. They carry no autograd formula of their own; functional.py's autograd Function is built
from them. plan.py says which of kernels/ and reference.py a call goes to; the kernels, and triton
with them, are imported by the first.
"""

import functools
from collections.abc import Sequence

import torch

from lora_kernels import plan, reference

__all__ = [
    "lora_linear_backward", "lora_linear_forward",
    "lora_shared_linear_backward", "lora_shared_linear_forward",
]  # fmt: skip

_library = torch.library.Library("lora_kernels", "DEF")
_library.define(
    "lora_linear_forward(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, Tensor? seed, "
    "float scaling, float dropout_p, SymInt[] out_splits, bool[] enable_lora) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor? h, Tensor? w, Tensor? a, Tensor? b, "
    "Tensor? seed, float scaling, float dropout_p, SymInt[] out_splits, bool[] enable_lora, "
    "bool[] needs) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "lora_shared_linear_forward(Tensor x, Tensor[] ws, Tensor a, Tensor[] bs, Tensor?[] biases, "
    "Tensor? seeds, float[] scalings, float dropout_p) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "lora_shared_linear_backward(Tensor[] dys, Tensor? x, Tensor? h, Tensor[] ws, Tensor a, "
    "Tensor[] bs, Tensor? seeds, float[] scalings, float dropout_p, bool[] needs) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


def _forward(x, w, a, b, bias, seed, scaling, dropout_p, *groups):
    (n, k), r = w.shape, b.shape[1]
    product = plan.Product(
        m=x.numel() // max(1, k), n=n, k=k, r=r, dtype=x.dtype, device=x.device,
        dropout=dropout_p > 0, aligned=plan.aligned(x, w),
    )  # fmt: skip
    args = (x, w, a, b, bias, seed, scaling, dropout_p, *groups)
    return _run("lora_linear_forward", product, args)


def _backward(dy, x, h, w, a, b, seed, scaling, dropout_p, *groups_and_needs):
    n = dy.shape[-1]
    wide = next((operand for operand in (x, w, a) if operand is not None), None)
    product = plan.Product(
        m=dy.numel() // max(1, n), n=n, k=1 if wide is None else wide.shape[-1],
        r=1 if b is None else b.shape[1], dtype=dy.dtype, device=dy.device,
        dropout=dropout_p > 0, aligned=plan.aligned(dy, w), backward=True,
    )  # fmt: skip
    args = (dy, x, h, w, a, b, seed, scaling, dropout_p, *groups_and_needs)
    return _run("lora_linear_backward", product, args)


def _shared_forward(x, ws, a, bs, *rest):
    dropout_p = rest[-1]
    product = plan.Product(
        m=x.numel() // max(1, x.shape[-1]), n=sum(w.shape[0] for w in ws), k=x.shape[-1],
        r=a.shape[1], dtype=x.dtype, device=x.device, dropout=dropout_p > 0,
        aligned=plan.aligned(x, *ws),
    )  # fmt: skip
    return _run("lora_shared_linear_forward", product, (x, ws, a, bs, *rest), (x, a, *bs))


def _shared_backward(dys, x, h, ws, a, bs, *rest):
    dy, dropout_p = dys[0], rest[-2]
    product = plan.Product(
        m=dy.numel() // max(1, dy.shape[-1]), n=sum(w.shape[0] for w in ws), k=a.shape[2],
        r=a.shape[1], dtype=dy.dtype, device=dy.device, dropout=dropout_p > 0,
        aligned=plan.aligned(*dys, *ws), backward=True,
    )  # fmt: skip
    args = (dys, x, h, ws, a, bs, *rest)
    return _run("lora_shared_linear_backward", product, args, (dy, a, *bs))


def _run(name: str, product: plan.Product, args: tuple, tensors: Sequence | None = None):
    """tensors: those that decide which kernels are compiled; None is all of args."""
    chosen = plan.choose(product)
    if chosen.name == "reference":
        return getattr(reference, name)(*args)

    def by_plan(chosen: str):
        if chosen == "reference":
            return getattr(reference, name)(*args)
        from lora_kernels.kernels import linear, shared_linear

        return getattr(shared_linear if "shared" in name else linear, name)(chosen, *args)

    def what() -> tuple:
        used = args if tensors is None else tensors
        dtypes = dict.fromkeys(t.dtype for t in used if isinstance(t, torch.Tensor))
        few = ("few rows",) if product.m <= plan.FEW_ROWS else ()  # they have kernels of their own
        return (name, *few, product.device, *dtypes)

    return plan.run(chosen, what, by_plan)


def _without_autocast(op):
    """Operands arrive in the dtypes they are to be used in; an ambient autocast changes nothing."""

    @functools.wraps(op)
    def wrapper(first, *args):
        device_type = (first if isinstance(first, torch.Tensor) else first[0]).device.type
        if not torch.is_autocast_enabled(device_type):
            return op(first, *args)
        with torch.autocast(device_type, enabled=False):
            return op(first, *args)

    return wrapper


for _name, _op in (
    ("lora_linear_forward", _forward),
    ("lora_linear_backward", _backward),
    ("lora_shared_linear_forward", _shared_forward),
    ("lora_shared_linear_backward", _shared_backward),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _without_autocast(_op), _key)


@torch.library.register_fake("lora_kernels::lora_linear_forward", lib=_library)
def _lora_linear_forward_fake(x, w, a, b, bias, seed, scaling, dropout_p, out_splits, enable_lora):
    y = x.new_empty((*x.shape[:-1], w.shape[0]))
    m = x.numel() // x.shape[-1]
    h = x.new_empty((m, a.shape[0]), dtype=reference.accumulate_dtype(x.dtype))
    return y, h


@torch.library.register_fake("lora_kernels::lora_linear_backward", lib=_library)
def _lora_linear_backward_fake(
    dy, x, h, w, a, b, seed, scaling, dropout_p, out_splits, enable_lora, needs
):
    needs_x, needs_w, needs_a, needs_b, needs_bias = needs
    grads = []
    if needs_x:
        grads.append(dy.new_empty((*dy.shape[:-1], w.shape[1])))
    if needs_w:
        grads.append(dy.new_empty((dy.shape[-1], x.shape[-1])))
    if needs_a:
        grads.append(a.new_empty(a.shape))
    if needs_b:
        grads.append(b.new_empty(b.shape))
    if needs_bias:
        grads.append(dy.new_empty((dy.shape[-1],)))
    return grads


@torch.library.register_fake("lora_kernels::lora_shared_linear_forward", lib=_library)
def _lora_shared_linear_forward_fake(x, ws, a, bs, biases, seeds, scalings, dropout_p):
    ys = [x.new_empty((*x.shape[:-1], w.shape[0])) for w in ws]
    shape = (len(ws), x.numel() // x.shape[-1], a.shape[1])
    return [*ys, x.new_empty(shape, dtype=reference.accumulate_dtype(x.dtype))]


@torch.library.register_fake("lora_kernels::lora_shared_linear_backward", lib=_library)
def _lora_shared_linear_backward_fake(dys, x, h, ws, a, bs, seeds, scalings, dropout_p, needs):
    needs_x, needs_w, needs_a, needs_b, needs_bias = needs
    grads = []
    if needs_x:
        grads.append(dys[0].new_empty((*dys[0].shape[:-1], a.shape[2])))
    if needs_w:
        grads += [dy.new_empty((dy.shape[-1], a.shape[2])) for dy in dys]
    if needs_a:
        grads.append(a.new_empty(a.shape))
    if needs_b:
        grads += [b.new_empty(b.shape) for b in bs]
    if needs_bias:
        grads += [dy.new_empty((dy.shape[-1],)) for dy in dys]
    return grads


lora_linear_forward = torch.ops.lora_kernels.lora_linear_forward.default
lora_linear_backward = torch.ops.lora_kernels.lora_linear_backward.default
lora_shared_linear_forward = torch.ops.lora_kernels.lora_shared_linear_forward.default
lora_shared_linear_backward = torch.ops.lora_kernels.lora_shared_linear_backward.default
