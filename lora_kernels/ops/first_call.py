"""What happens once, before kernels compute a product of a new kind.

Tiles that were measured on this GPU come into the kernels' tables, and the kernels that will run
are checked against float64 on small operands of the same kind.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_kernels import environment
from lora_kernels.dispatch.algorithm import rows_of_small_m, tf32_allowed
from lora_kernels.dispatch.table import GemmShape
from lora_kernels.dispatch.tma import is_tma_compliant

__all__ = ["LAUNCHERS", "prepare"]

# The launchers of each op by algorithm, as the modules of kernels/ compose them.
LAUNCHERS: dict[str, dict[str, tuple[str, ...]]] = {
    "lora_linear_forward": {
        "fused": ("shrink", "gemm_fwd", "gemm_small_m"),
        "addmm": ("shrink", "expand_y"),
    },
    "lora_linear_backward": {
        "fused": ("grad_b", "gemm_bwd", "grad_a", "expand_dx", "expand_grad_a"),
        "addmm": ("grad_b", "expand_grad_a", "expand_dx", "grad_a"),
    },
    "lora_shared_linear_forward": {
        "fused": ("shrink", "gemm_fwd"),
        "addmm": ("shrink", "expand_y"),
    },
    "lora_shared_linear_backward": dict.fromkeys(
        ("fused", "addmm"), ("grad_b", "expand_dx", "grad_a")
    ),
    "lora_grouped_linear_forward": {
        "fused": ("grouped_shrink_h", "grouped_gemm_y"),
        "addmm": ("grouped_shrink_h", "grouped_expand_y", "grouped_gemm_y"),
    },
    "lora_grouped_linear_backward": {
        name: ("grouped_shrink_dh", *of_dx, "grouped_grad_a", "grouped_grad_b")
        for name, of_dx in (
            ("fused", ("grouped_gemm_dx",)),
            ("addmm", ("grouped_expand_dx", "grouped_gemm_dx")),
        )
    },
    "add_lora": dict.fromkeys(("fused", "addmm"), ("shrink", "expand_add_y")),
    "dense_4bit": dict.fromkeys(("fused", "addmm"), ("dequantize_4bit",)),
}
_DROPPED = ("apply_dropout", "expand_split_y")  # of DoRA with PEFT's dropout
LAUNCHERS["dora_forward"] = {
    "fused": ("weight_norm", "shrink", "gemm_fwd_scaled", "gemm_small_m_scaled", *_DROPPED),
    "addmm": ("weight_norm", "shrink", "expand_scale_y", *_DROPPED),
}
LAUNCHERS["dora_backward"] = {
    name: ("grad_b_scaled", "column_sums", "apply_dropout", "expand_mask_dx", *launchers[1:])
    for name, launchers in LAUNCHERS["lora_linear_backward"].items()
}
_prepared: set[tuple] = set()


def prepare(function: Callable, algorithm: str, shape: GemmShape, operands: tuple) -> None:
    """Once for each kind: the kernels of an algorithm that are about to run are checked.

    function: of reference/, which specifies what function(*operands) is.
    Raises: WrongKernelError if a kernel is wrong here; what compiling and launching raise.
    """
    named = dict(zip(_parameters(function), operands, strict=False))
    w, factor = _first(named, "w"), _first(named, "a", "b")
    lora_dtype, spec = shape.dtype if factor is None else factor.dtype, _first(named, "spec")
    kind = (
        function.__name__,
        algorithm,
        shape.device,
        tf32_allowed(),
        # The fields of a Variant from here on.
        shape.dtype,
        lora_dtype,
        shape.r,
        shape.dropout,
        rows_of_small_m(shape.m, shape.dropout),
        is_tma_compliant(*(t for t in (_first(named, "x", "dy"), w) if isinstance(t, Tensor))),
        isinstance(w, Tensor) and w.stride(-1) != 1,
        lora_dtype != shape.dtype and getattr(spec, "narrow", False),
        spec.splits.enabled if hasattr(spec, "splits") else (True,),
    )
    if kind in _prepared:
        return
    from lora_kernels.kernels import measured_tiles, selfcheck

    environment.notice("LORA_KERNELS_CHECK")
    measured_tiles.use(shape.device)
    kernel: list[Any] = [*kind[4:]]
    selfcheck.first_use(
        [selfcheck.Variant(launcher, *kernel) for launcher in LAUNCHERS[kind[0]][algorithm]],
        shape.device,
    )
    if shape.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        _prepared.add(kind)


@functools.cache
def _parameters(function: Callable) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _first(named: Mapping[str, Any], *names: str) -> Any:
    """The first of these operands that is not None, or of a list of them, ws or bs, its first."""
    for name in names:
        found = named.get(name)
        if found is None:
            found = next(iter(named.get(f"{name}s") or ()), None)
        if found is not None:
            return found
    return None
