"""lora_linear and lora_merged_linear: checks, autocast, the dropout seed, the autograd Function."""

import inspect
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels import ops, reference

__all__ = [
    "check_input",
    "equal_splits",
    "lora_forward",
    "lora_linear",
    "lora_merged_linear",
    "prepared",
    "seeds_for",
]

_LARGEST = sys.float_info.max
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x·weightᵀ + bias + scaling·(dropout(x)·lora_Aᵀ)·lora_Bᵀ.

    Shapes: x [..., K], weight [N, K] (any strides: pass ``w.T`` for one stored [K, N]),
    lora_A [R, K], lora_B [N, R], bias [N] -> y [..., N].
    Dtypes: float32, float16, bfloat16, float64; x, weight and bias share one, the adapters may
    have another (float32 over a 16-bit base). Gradients come back in the dtype of their operand.
    dropout_p in [0, 1) acts on x in front of lora_A alone, always (a layer passes 0 in eval). The
    mask is a pure function of (seed, row, column), see philox.py. seed: int64 tensor of one
    element on x's device; None draws one from PyTorch's generator of that device, and under
    torch.distributed one that no other rank draws.
    Raises: TypeError where an operand is no dense floating-point tensor; ValueError where shapes,
    dtypes, devices or values do not fit.
    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1.
    """
    return lora_forward(
        "lora_linear",
        x,
        weight,
        lora_A,
        lora_B,
        bias,
        scaling,
        dropout_p,
        seed,
        None,
        (True,),
    )


def lora_merged_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    enable_lora: Sequence[bool],
    out_splits: Sequence[int] | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x·weightᵀ + bias, and for each enabled group g of columns + scaling·h_g·lora_B_gᵀ.

    The columns of y fall into len(enable_lora) groups, of equal size or of the sizes in out_splits
    (query, key, value of grouped-query attention: ``out_splits=(4096, 1024, 1024)``). The g-th
    enabled group has rows [g·r, (g+1)·r) of lora_A, its own block of rows of lora_B, and
    h_g = dropout(x)·lora_A_gᵀ; all groups see the same dropout mask.

    Shapes: x [..., K], weight [N, K], lora_A [E·r, K], lora_B [sum of the enabled splits, r],
    bias [N] -> y [..., N], with E = number of enabled groups, at least one.
    Dtypes, dropout_p, seed, errors: as lora_linear.
    Source: Hu et al. 2021, arXiv 2106.09685, section 4.2; loralib's MergedLinear.
    """
    name = "lora_merged_linear"
    for argument, value in (("enable_lora", enable_lora), ("out_splits", out_splits)):
        if not isinstance(value, (list, tuple)) and not (
            argument == "out_splits" and value is None
        ):
            raise TypeError(f"{name}: {argument} must be a list or tuple, got {value!r}")
    if not any(enable_lora):
        raise ValueError(f"{name}: enable_lora must enable a group, got {list(enable_lora)}")
    if out_splits is None and isinstance(weight, Tensor) and weight.dim() == 2:
        out_splits = equal_splits(weight.shape[0], enable_lora, name)
    return lora_forward(
        name,
        x,
        weight,
        lora_A,
        lora_B,
        bias,
        scaling,
        dropout_p,
        seed,
        out_splits,
        enable_lora,
    )


def equal_splits(out_features: int, enable_lora: Sequence[bool], layer: str) -> list[int]:
    """out_features in len(enable_lora) equal parts, or a ValueError that names both."""
    count = len(enable_lora)
    if count == 0 or out_features % count:
        raise ValueError(
            f"{layer}: the length of enable_lora must divide out_features={out_features}, "
            f"got enable_lora={list(enable_lora)}"
        )
    return [out_features // count] * count


def lora_forward(
    layer: str | nn.Module,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    out_splits: Sequence[int] | None,
    enable_lora: Sequence[bool],
) -> Tensor:
    """The common path of both functions and of the layers, which name themselves in errors."""
    x, weight, bias, out_splits = prepared(
        layer, x, weight, a, b, bias, scaling, dropout_p, out_splits, enable_lora
    )
    seed = seeds_for(layer, x, dropout_p, seed)
    y, _ = _LoRALinear.apply(
        x, weight, a, b, bias, seed, scaling, dropout_p, out_splits, enable_lora
    )
    return y


def prepared(
    layer: str | nn.Module,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    out_splits: Sequence[int] | None,
    enable_lora: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor | None, Sequence[int]]:
    """x, weight, bias and out_splits as the op takes them, or an error that names the layer."""
    check_tensor(layer, "weight", weight)
    if weight.dim() != 2:
        raise ValueError(
            f"{layer_name(layer)}: weight must have shape [N, K], got {list(weight.shape)}"
        )
    check_shape(layer, x, weight)
    check_tensor(layer, "lora_A", a)
    check_tensor(layer, "lora_B", b)
    if bias is not None:
        check_tensor(layer, "bias", bias)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if out_splits is None:
        out_splits = (weight.shape[0],)
    _check_fit(layer, x, weight, a, b, bias, out_splits, enable_lora)
    for name, value in (("dropout_p", dropout_p), ("scaling", scaling)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{layer_name(layer)}: {name} must be a number, got {value!r}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{layer_name(layer)}: dropout_p must be in [0, 1), got {dropout_p!r}")
    if not -_LARGEST <= scaling <= _LARGEST:
        raise ValueError(f"{layer_name(layer)}: scaling must be finite, got {scaling!r}")
    return x, weight, bias, out_splits


class _LoRALinear(torch.autograd.Function):
    """Saves x, h, the seed and the parameters, and of these only what the backward will read."""

    @staticmethod
    def forward(x, w, a, b, bias, seed, scaling, dropout_p, out_splits, enable_lora):
        return ops.lora_linear_forward(
            x, w, a, b, bias, seed, scaling, dropout_p, out_splits, enable_lora
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, a, b, _, seed, *ctx.constants = inputs
        _, h = output
        ctx.mark_non_differentiable(h)
        ctx.set_materialize_grads(False)
        needs_x, needs_w, needs_a, needs_b, _ = ctx.needs_input_grad[:5]
        ctx.save_for_backward(
            x if needs_w or needs_a else None,
            h if needs_b else None,
            w if needs_x else None,
            a if needs_x or needs_a else None,
            b if needs_x or needs_a or needs_b else None,
            seed if needs_x or needs_a else None,
        )

    @staticmethod
    def backward(ctx, dy, _):
        needs = list(ctx.needs_input_grad[:5])
        if dy is None or not any(needs):
            return (None,) * 10
        args = (dy, *ctx.saved_tensors, *ctx.constants, needs)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = iter(_LoRALinearBackward.apply(*args))
        else:
            grads = iter(ops.lora_linear_backward(*args))
        return (*(next(grads) if needed else None for needed in needs), *(None,) * 5)


class _Positional(inspect.Signature):
    """A signature whose bind() takes the arguments as they come.

    Function.apply binds its arguments to forward's signature in every call. Here they always are
    complete and positional, and the general bind() would cost as much as a small product.
    """

    class Bound(NamedTuple):
        args: tuple
        kwargs: dict

        def apply_defaults(self) -> None:
            """There are none to apply."""

    def bind(self, *args):
        return self.Bound(args, {})


_LoRALinear.forward.__signature__ = _Positional.from_callable(_LoRALinear.forward)


class _LoRALinearBackward(torch.autograd.Function):
    """The backward as a function of its operands, for create_graph=True.

    Its own derivative is that of the reference, in plain PyTorch, with h written out as a function
    of x and a.
    """

    @staticmethod
    def forward(
        dy, x, h, w, a, b, seed, scaling, dropout_p, out_splits, enable_lora, needs
    ):  # fmt: skip
        return tuple(
            ops.lora_linear_backward(
                dy, x, h, w, a, b, seed, scaling, dropout_p, out_splits, enable_lora, needs
            )
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, x, h, w, a, b, seed, *ctx.constants = inputs
        ctx.save_for_backward(dy, x, h, w, a, b, seed)

    @staticmethod
    def backward(ctx, *grads):
        dy, x, saved_h, w, a, b, seed = ctx.saved_tensors
        scaling, dropout_p, out_splits, enable_lora, needs = ctx.constants
        needs_x, _, _, needs_b, _ = needs
        if needs_x and needs_b and x is None:
            raise RuntimeError(
                "lora_linear: double backward through x and lora_B needs lora_A to require a "
                "gradient too; without it x is not saved"
            )
        operands = {"dy": dy, "x": x, "w": w, "a": a, "b": b}
        present = [name for name, operand in operands.items() if operand is not None]

        def backward(*tensors):
            given = {
                **dict.fromkeys(operands),
                **dict(zip(present, tensors, strict=True)),
            }
            h = saved_h  # a constant, but where x or a have gradients: then both are here
            if needs_b and x is not None and a is not None:
                h = reference.low_rank_input(given["x"], given["a"], seed, dropout_p)
            return tuple(
                reference.lora_linear_backward(
                    given["dy"], given["x"], h, given["w"], given["a"], given["b"], seed,
                    scaling, dropout_p, out_splits, enable_lora, needs,
                )
            )  # fmt: skip

        _, vjp = torch.func.vjp(backward, *(operands[name] for name in present))
        by_name = dict(zip(present, vjp(grads), strict=True))
        ordered = [by_name.get(name) for name in ("dy", "x", None, "w", "a", "b")]
        return (*ordered, *(None,) * 6)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would have x, weight and bias be; the adapters stay as they are."""
    device_type = x.device.type
    if device_type == "meta" or x.dtype == torch.float64:
        return None
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def layer_name(layer: str | nn.Module) -> str:
    return layer if isinstance(layer, str) else f"{type(layer).__name__}({layer.extra_repr()})"


def check_tensor(layer: str | nn.Module, name: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{layer_name(layer)}: {name} must be a torch.Tensor, got {type(value).__name__}"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"{layer_name(layer)}: {name} must be dense, got {value.layout}")
    if value.dtype not in _DTYPES:
        raise TypeError(
            f"{layer_name(layer)}: {name} must be float32, float16, bfloat16 or float64, "
            f"got {value.dtype}"
        )


def check_shape(layer: str | nn.Module, x, weight: Tensor) -> None:
    """x is dense, floating-point and [..., K] for weight [N, K], or an error names the layer."""
    check_tensor(layer, "x", x)
    in_features = weight.shape[1]
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"{layer_name(layer)}: x must have shape [..., {in_features}], got {list(x.shape)}"
        )


def check_input(layer: nn.Module, x, weight: Tensor) -> None:
    """x fits a plain product with weight [N, K], or an error names the layer."""
    check_shape(layer, x, weight)
    if x.device != weight.device:
        raise ValueError(
            f"{layer_name(layer)}: x must be on weight's device {weight.device}, got {x.device}"
        )
    if x.dtype != weight.dtype and autocast_dtype(x) is None:
        raise ValueError(
            f"{layer_name(layer)}: x must have weight's dtype {weight.dtype}, got {x.dtype}"
        )


def _check_fit(layer, x, weight, a, b, bias, out_splits, enable_lora) -> None:
    def fail(name, expected, value):
        raise ValueError(f"{layer_name(layer)}: {name} must {expected}, got {value}")

    n, k = weight.shape
    sizes_fit = len(out_splits) == len(enable_lora) and not any(
        isinstance(size, float) or size < 1 for size in out_splits
    )
    if not sizes_fit or sum(out_splits) != n:
        fail(
            "out_splits",
            f"be {len(enable_lora)} sizes >= 1 that sum to {n}",
            list(out_splits),
        )
    if b.dim() != 2 or b.shape[1] < 1:
        fail("lora_B", "have shape [rows, r] with r >= 1", list(b.shape))
    b_rows = sum(size for size, on in zip(out_splits, enable_lora, strict=True) if on)
    rank = b.shape[1] * sum(enable_lora)
    if b.shape[0] != b_rows:
        fail("lora_B", f"have {b_rows} rows", list(b.shape))
    if a.dim() != 2 or a.shape[0] != rank or a.shape[1] != k:
        fail("lora_A", f"have shape [{rank}, {k}]", list(a.shape))
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != n):
        fail("bias", f"have shape [{n}]", list(bias.shape))
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is not None and operand.dtype != x.dtype:
            fail(name, f"have x's dtype {x.dtype}", operand.dtype)
    for name, operand in (
        ("weight", weight),
        ("lora_A", a),
        ("lora_B", b),
        ("bias", bias),
    ):
        if operand is not None and operand.device != x.device:
            fail(name, f"be on x's device {x.device}", operand.device)


def _draw_seeds(count: int, device: torch.device) -> Tensor:
    """Seeds from PyTorch's generator; under torch.distributed, out of this rank's share of int64.

    Ranks to which set_seed(42) gave one state of the generator draw the same numbers, and
    nn.Dropout drops the same elements on all of them. Seeds out of disjoint ranges give every rank
    a mask of its own. The rank only moves the bounds of the draw: checkpoint recompute, CUDA graph
    capture and torch.compile see the one operation that they see in a single process.

    Ranks that compute the same activations twice over, as tensor parallelism does around what it
    shards, need one mask: draw seed there, equal on all of them, and pass it.
    """
    rank, ranks = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share = 2**64 // ranks
    low = -(2**63) + rank * share
    return torch.randint(low, low + share - 1, (count,), dtype=torch.int64, device=device)


def seeds_for(
    layer: str | nn.Module, x: Tensor, dropout_p: float, seed: Tensor | None, count: int = 1
) -> Tensor | None:
    """seed where it is one of count masks, drawn where it is None; None without dropout."""
    if dropout_p == 0.0:
        return None
    if seed is None:
        return _draw_seeds(count, x.device)
    if not isinstance(seed, Tensor):
        raise TypeError(
            f"{layer_name(layer)}: seed must be a torch.Tensor, got {type(seed).__name__}"
        )
    if seed.dtype != torch.int64 or seed.numel() != count or seed.device != x.device:
        elements = "one element" if count == 1 else f"{count} elements"
        raise ValueError(
            f"{layer_name(layer)}: seed must be an int64 tensor of {elements} on {x.device}, got "
            f"{seed.dtype} {list(seed.shape)} on {seed.device}"
        )
    return seed.reshape(count)
