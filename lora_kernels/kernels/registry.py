"""The kernels and their launchers: an entry for each, which leads to everything about it.

The tests, the ahead-of-time gate, tuning and bench/ go through these entries. bench/ counts
launches by them, and computes which share of the machine's ceilings a kernel reaches.
"""

from lora_kernels.kernels import (
    apply_dropout,
    column_sums,
    dequantize,
    dora_launchers,
    expand,
    expand_grad_a,
    formulas,
    gemm_bwd,
    gemm_fwd,
    gemm_small_m,
    grad_a,
    grad_b,
    grouped_expand,
    grouped_gemm,
    grouped_grad,
    grouped_launchers,
    grouped_reduce,
    grouped_shrink,
    shrink,
    split_k_reduce,
    split_terms,
    weight_norm,
)
from lora_kernels.kernels.config import Config, When, target_of
from lora_kernels.kernels.launcher import Dims, Kernel, Launcher, dropout_of, drops, one_layer
from lora_kernels.kernels.operands import Operands, copy_of

__all__ = ["KERNELS", "LAUNCHERS", "Dims", "Kernel", "Launcher", "entry_for", "kernel_of"]

GROUPS = 4  # of Operands.grouped

KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("shrink", shrink._shrink_kernel, shrink.TILES, (
            Launcher(
                "shrink", "m k r p",
                call=lambda o, c: (shrink.shrink(o.x, o.a, *dropout_of(o), o.numerics, c),),
                formula=formulas.shrink,
                config_for=lambda o: shrink.config_for(o.x.device, o.a.shape[-2], o.numerics),
                flops=lambda d: 2 * d.m * d.k * d.r,
                moved=lambda d: d.e * (d.m * d.k + d.r * d.k) + 4 * d.m * d.r,
                layers=True,
            ),
        )),
        Kernel("gemm_fwd", gemm_fwd._gemm_fwd_kernel, gemm_fwd.TILES, (
            Launcher(
                "gemm_fwd", "m k n r",
                call=lambda o, c: (
                    gemm_fwd.gemm_fwd(o.x, o.w, o.h, o.b, o.bias, o.spec, o.numerics, c),
                ),
                formula=formulas.gemm_fwd,
                config_for=lambda o: gemm_fwd.config_for(o.x, o.w, o.r, o.spec, o.numerics),
                flops=lambda d: 2 * d.m * d.n * (d.k + d.r),
                moved=lambda d: (
                    d.e * (d.m * d.k + d.n * d.k + d.m * d.n + d.n * d.r) + 4 * d.m * d.r
                ),
            ),
            *dora_launchers.GEMM_FWD,
        )),
        Kernel("gemm_small_m", gemm_small_m._gemm_small_m_kernel, gemm_small_m.TILES, (
            Launcher(
                "gemm_small_m", "m k n r p",
                call=lambda o, c: gemm_small_m.gemm_small_m(
                    o.x, o.w, o.a, o.b, o.bias, o.seed, o.spec, o.numerics, c
                ),
                formula=formulas.gemm_small_m,
                config_for=lambda o: gemm_small_m.config_for(o.x, o.numerics),
                flops=lambda d: 2 * d.m * d.n * (d.k + d.r) + 2 * d.m * d.k * d.r,
                moved=lambda d: (
                    d.e * (d.m * d.k + d.n * d.k + d.m * d.n + d.r * d.k + d.n * d.r)
                    + 4 * d.m * d.r
                ),
                supports=lambda o: gemm_small_m.supports(
                    len(o.x), o.r, o.spec.dropout_p, o.numerics
                ),
            ),
            *dora_launchers.GEMM_SMALL_M,
        )),
        Kernel("expand", expand._expand_kernel, expand.TILES, (
            Launcher(
                "expand_y", "m n r",
                call=lambda o, c: (
                    expand.expand_y(o.h, o.b, o.bias, o.spec, o.x.dtype, o.numerics, c),
                ),
                formula=formulas.expand_y,
                config_for=lambda o: expand.config_for(o.x.device, o.r, o.numerics),
                flops=lambda d: 2 * d.m * d.n * d.r,
                moved=lambda d: d.e * (d.m * d.n + d.n * d.r) + 4 * d.m * d.r,
            ),
            Launcher(
                "expand_dx", "m k r p",
                call=lambda o, c: (
                    expand.expand_dx(o.dh, o.a, *dropout_of(o), o.x.dtype, o.numerics, c),
                ),
                formula=formulas.expand_dx,
                config_for=lambda o: expand.config_for(o.x.device, o.a.shape[-2], o.numerics),
                flops=lambda d: 2 * d.m * d.k * d.r,
                moved=lambda d: d.e * (d.m * d.k + d.r * d.k) + 4 * d.m * d.r,
                layers=True,
            ),
            # It adds to a copy of dy, which is made in the same time.
            Launcher(
                "expand_add_y", "m n r",
                call=lambda o, c: (
                    expand.expand_add_y(copy_of(o.dy), o.h, o.b, o.spec, o.numerics, c),
                ),
                formula=formulas.expand_add_y,
                config_for=lambda o: expand.config_for(o.x.device, o.r, o.numerics),
                flops=lambda d: 2 * d.m * d.n * d.r,
                moved=lambda d: d.e * (4 * d.m * d.n + d.n * d.r) + 4 * d.m * d.r,
            ),
            *dora_launchers.EXPAND,
        )),
        Kernel("expand_grad_a", expand_grad_a._expand_grad_a_kernel, expand_grad_a.TILES, (
            Launcher(
                "expand_grad_a", "m k r p",
                call=lambda o, c: expand_grad_a.expand_grad_a(
                    o.dh, o.a, o.x, *dropout_of(o), o.numerics, c
                ),
                formula=lambda o, dtype: formulas.expand_dx(o, dtype) + formulas.grad_a(o, dtype),
                config_for=lambda o: expand_grad_a.config_for(o.x.device, len(o.a), o.numerics),
                flops=lambda d: 4 * d.m * d.k * d.r,
                moved=lambda d: 2 * d.e * (d.m * d.k + d.r * d.k) + 4 * d.m * d.r,
                supports=lambda o: expand_grad_a.supports(len(o.a), o.numerics, o.x.device),
            ),
        )),
        Kernel("grad_b", grad_b._grad_b_kernel, grad_b.TILES, (
            Launcher(
                "grad_b", "m n r",
                call=lambda o, c: grad_b.grad_b(o.dy, o.b, o.h, o.spec, True, o.numerics, c),
                formula=formulas.grad_b,
                config_for=lambda o: grad_b.config_for(o.dy.device, o.r, o.numerics),
                flops=lambda d: 4 * d.m * d.n * d.r,
                moved=lambda d: d.e * (d.m * d.n + 2 * d.n * d.r) + 8 * d.m * d.r,
            ),
            *dora_launchers.GRAD_B,
        )),
        Kernel("gemm_bwd", gemm_bwd._gemm_bwd_kernel, gemm_bwd.TILES, (
            Launcher(
                "gemm_bwd", "m k n r p",
                call=lambda o, c: (
                    gemm_bwd.gemm_bwd(o.dy, o.w, o.dh, o.a, *dropout_of(o), o.numerics, c),
                ),
                formula=formulas.gemm_bwd,
                config_for=lambda o: gemm_bwd.config_for(o.dy, o.w, len(o.a), o.numerics),
                flops=lambda d: 2 * d.m * d.k * (d.n + d.r),
                moved=lambda d: (
                    d.e * (d.m * d.n + d.n * d.k + d.m * d.k + d.r * d.k) + 4 * d.m * d.r
                ),
            ),
        )),
        Kernel("grad_a", grad_a._grad_a_kernel, grad_a.TILES, (
            Launcher(
                "grad_a", "m k r p",
                call=lambda o, c: (
                    grad_a.grad_a(o.dh, o.x, *dropout_of(o), o.a.dtype, o.numerics, c),
                ),
                formula=formulas.grad_a,
                config_for=lambda o: grad_a.config_for(o.x.device, len(o.a), o.numerics),
                flops=lambda d: 2 * d.m * d.k * d.r,
                moved=lambda d: d.e * (d.m * d.k + d.r * d.k) + 4 * d.m * d.r,
                layers=True,
            ),
        )),
        Kernel("apply_dropout", apply_dropout._apply_dropout_kernel, apply_dropout.TILES, (
            Launcher(
                "apply_dropout", "m k p",
                call=lambda o, c: (apply_dropout.apply_dropout(o.x, *dropout_of(o), c),),
                formula=formulas.apply_dropout,
                config_for=lambda o: apply_dropout.config_for(o.x.device, o.x.dtype),
                flops=lambda d: d.m * d.k,
                moved=lambda d: 2 * d.e * d.m * d.k,
                supports=drops,
            ),
        )),
        Kernel("column_sums", column_sums._column_sums_kernel, column_sums.TILES, (
            Launcher(
                "column_sums", "m n",
                call=lambda o, c: (column_sums.column_sums(o.dy, o.kept, o.bias, c),),
                formula=formulas.column_sums,
                config_for=lambda o: column_sums.config_for(o.dy.device, o.dy.dtype),
                flops=lambda d: 2 * d.m * d.n,
                moved=lambda d: 2 * d.e * d.m * d.n + 4 * d.n,
                supports=one_layer,
            ),
        )),
        Kernel("dequantize", dequantize._dequantize_kernel, dequantize.TILES, (
            Launcher(
                "dequantize_4bit", "k n",
                call=lambda o, c: (dequantize.dequantize_4bit(
                    *o.four_bit[:5], o.w.dtype, o.four_bit.nested, c
                ),),
                formula=formulas.dequantize_4bit,
                config_for=lambda o: dequantize.config_for(o.w.device, o.w.dtype),
                flops=lambda d: d.n * d.k,
                moved=lambda d: d.n * d.k * (2 * d.e + 1) // 2 + d.n * d.k // 64,
            ),
        )),
        Kernel("weight_norm", weight_norm._weight_norm_kernel, weight_norm.TILES, (
            Launcher(
                "weight_norm", "k n r",
                call=lambda o, c: (
                    weight_norm.weight_norm(o.w, o.a, o.b, o.spec.scaling, o.numerics, c),
                ),
                formula=formulas.weight_norm,
                config_for=lambda o: weight_norm.config_for(o.w.device, o.r, o.numerics),
                flops=lambda d: 2 * d.n * d.k * (d.r + 2),
                moved=lambda d: d.e * (d.n * d.k + d.r * d.k + d.n * d.r) + 4 * d.n,
                supports=one_layer,
            ),
        )),
        Kernel("split_k_reduce", split_k_reduce._split_k_reduce_kernel, None),
        Kernel("split_terms", split_terms._split_terms_kernel, None),
        Kernel("grouped_shrink", grouped_shrink._grouped_shrink_kernel, grouped_shrink.TILES, (
            Launcher(
                "grouped_shrink_h", "m k r p",
                call=lambda o, c: grouped_launchers.shrink_h(o.grouped, c),
                formula=lambda o, dtype: formulas.grouped_shrink_h(o.grouped, dtype),
                config_for=lambda o: grouped_shrink.config_for(o.x.device, o.r, o.numerics),
                flops=lambda d: 2 * d.m * d.k * d.r,
                moved=lambda d: d.e * (d.m * d.k + GROUPS * d.r * d.k) + 4 * d.m * d.r,
                supports=one_layer,
            ),
            Launcher(
                "grouped_shrink_dh", "m n r",
                call=lambda o, c: grouped_launchers.shrink_dh(o.grouped, c),
                formula=lambda o, dtype: formulas.grouped_shrink_dh(o.grouped, dtype),
                config_for=lambda o: grouped_shrink.config_for(o.x.device, o.r, o.numerics),
                flops=lambda d: 2 * d.m * d.n * d.r,
                moved=lambda d: d.e * (d.m * d.n + GROUPS * d.r * d.n) + 4 * d.m * d.r,
                supports=one_layer,
            ),
        )),
        Kernel("grouped_gemm", grouped_gemm._grouped_gemm_kernel, grouped_gemm.TILES, (
            Launcher(
                "grouped_gemm_y", "m k n r",
                call=lambda o, c: grouped_launchers.gemm_y(o.grouped, c),
                formula=lambda o, dtype: formulas.grouped_gemm_y(o.grouped, dtype),
                config_for=lambda o: grouped_gemm.config_for(o.x.device, o.r, o.numerics),
                flops=lambda d: 2 * d.m * d.n * (d.k + d.r),
                moved=lambda d: (
                    d.e * (d.m * d.k + d.n * d.k + d.m * d.n + GROUPS * d.n * d.r)
                    + 4 * d.m * d.r
                ),
                supports=one_layer,
            ),
            Launcher(
                "grouped_gemm_dx", "m k n r p",
                call=lambda o, c: grouped_launchers.gemm_dx(o.grouped, c),
                formula=lambda o, dtype: formulas.grouped_gemm_dx(o.grouped, dtype),
                config_for=lambda o: grouped_gemm.config_for(o.x.device, o.r, o.numerics),
                flops=lambda d: 2 * d.m * d.k * (d.n + d.r),
                moved=lambda d: (
                    d.e * (d.m * d.n + d.n * d.k + d.m * d.k + GROUPS * d.r * d.k)
                    + 4 * d.m * d.r
                ),
                supports=one_layer,
            ),
        )),
        # They add to a copy of y or dx, which is made in the same time.
        Kernel("grouped_expand", grouped_expand._grouped_expand_kernel, grouped_expand.TILES, (
            Launcher(
                "grouped_expand_y", "m n r",
                call=lambda o, c: grouped_launchers.expand_y(o.grouped, c),
                formula=lambda o, dtype: formulas.grouped_expand_y(o.grouped, dtype),
                config_for=lambda o: grouped_expand.config_for(o.x.device, o.r, o.numerics),
                flops=lambda d: 2 * d.m * d.n * d.r,
                moved=lambda d: d.e * (4 * d.m * d.n + GROUPS * d.n * d.r) + 4 * d.m * d.r,
                supports=one_layer,
            ),
            Launcher(
                "grouped_expand_dx", "m k r p",
                call=lambda o, c: grouped_launchers.expand_dx(o.grouped, c),
                formula=lambda o, dtype: formulas.grouped_expand_dx(o.grouped, dtype),
                config_for=lambda o: grouped_expand.config_for(o.x.device, o.r, o.numerics),
                flops=lambda d: 2 * d.m * d.k * d.r,
                moved=lambda d: d.e * (4 * d.m * d.k + GROUPS * d.r * d.k) + 4 * d.m * d.r,
                supports=one_layer,
            ),
        )),
        Kernel("grouped_grad", grouped_grad._grouped_grad_kernel, grouped_grad.TILES, (
            Launcher(
                "grouped_grad_a", "m k r p",
                call=lambda o, c: grouped_launchers.grad_a(o.grouped, c),
                formula=lambda o, dtype: formulas.grouped_grad_a(o.grouped, dtype),
                config_for=lambda o: grouped_grad.config_for(o.x.device, o.r, o.numerics),
                flops=lambda d: 2 * d.m * d.k * d.r,
                moved=lambda d: d.e * (d.m * d.k + GROUPS * d.r * d.k) + 4 * d.m * d.r,
                supports=one_layer,
            ),
            Launcher(
                "grouped_grad_b", "m n r",
                call=lambda o, c: grouped_launchers.grad_b(o.grouped, c),
                formula=lambda o, dtype: formulas.grouped_grad_b(o.grouped, dtype),
                config_for=lambda o: grouped_grad.config_for(o.x.device, o.r, o.numerics),
                flops=lambda d: 2 * d.m * d.n * d.r,
                moved=lambda d: d.e * (d.m * d.n + GROUPS * d.n * d.r) + 4 * d.m * d.r,
                supports=one_layer,
            ),
        )),
        Kernel("grouped_reduce", grouped_reduce._grouped_reduce_kernel, None),
    )
}  # fmt: skip

LAUNCHERS = {
    launcher.name: launcher for kernel in KERNELS.values() for launcher in kernel.launchers
}


def kernel_of(launcher: str) -> Kernel:
    """The kernel that the launcher of this name launches."""
    return next(
        kernel
        for kernel in KERNELS.values()
        if any(each.name == launcher for each in kernel.launchers)
    )


def entry_for(launcher: str, o: Operands) -> tuple[When, Config]:
    """The entry of its kernel's tiles that the launcher of this name takes for Operands."""
    config = LAUNCHERS[launcher].config_for(o)
    entries = kernel_of(launcher).tiles[target_of(o.x.device)]
    # Tiles of two entries may be equal, but they are not the same object.
    return next(entry for entry in entries if entry[1] is config)
