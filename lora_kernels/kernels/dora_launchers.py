"""The launchers of kernels with a magnitude, for the registry."""

from lora_kernels.kernels import expand, formulas, gemm_fwd, gemm_small_m, grad_b
from lora_kernels.kernels.launcher import Launcher, dropout_of, drops, one_layer
from lora_kernels.kernels.operands import copy_of

__all__ = ["EXPAND", "GEMM_FWD", "GEMM_SMALL_M", "GRAD_B"]

GEMM_FWD = (
    Launcher(
        "gemm_fwd_scaled",
        "m k n r",
        call=lambda o, c: (
            gemm_fwd.gemm_fwd(o.x, o.w, o.h, o.b, o.bias, o.spec, o.numerics, c, o.col_scale),
        ),
        formula=formulas.gemm_fwd_scaled,
        config_for=lambda o: gemm_fwd.config_for(o.x, o.w, o.r, o.spec, o.numerics),
        flops=lambda d: 2 * d.m * d.n * (d.k + d.r),
        moved=lambda d: (
            d.e * (d.m * d.k + d.n * d.k + d.m * d.n + d.n * d.r) + 4 * (d.m * d.r + d.n)
        ),
        supports=one_layer,
    ),
)

GEMM_SMALL_M = (
    Launcher(
        "gemm_small_m_scaled",
        "m k n r p",
        call=lambda o, c: gemm_small_m.gemm_small_m(
            o.x, o.w, o.a, o.b, o.bias, o.seed, o.spec, o.numerics, c, o.col_scale
        ),
        formula=formulas.gemm_small_m_scaled,
        config_for=lambda o: gemm_small_m.config_for(o.x, o.numerics),
        flops=lambda d: 2 * d.m * d.n * (d.k + d.r) + 2 * d.m * d.k * d.r,
        moved=lambda d: (
            d.e * (d.m * d.k + d.n * d.k + d.m * d.n + d.r * d.k + d.n * d.r)
            + 4 * (d.m * d.r + d.n)
        ),
        supports=lambda o: (
            one_layer(o) and gemm_small_m.supports(len(o.x), o.r, o.spec.dropout_p, o.numerics)
        ),
    ),
)

# They write to a copy of dy or x, which is made in the same time.
EXPAND = (
    Launcher(
        "expand_scale_y",
        "m n r",
        call=lambda o, c: (
            expand.expand_scale_y(
                copy_of(o.dy), o.h, o.b, o.bias, o.col_scale, o.spec, o.numerics, c
            ),
        ),
        formula=formulas.expand_scale_y,
        config_for=lambda o: expand.config_for(o.x.device, o.r, o.numerics),
        flops=lambda d: 2 * d.m * d.n * d.r,
        moved=lambda d: d.e * (4 * d.m * d.n + d.n * d.r) + 4 * (d.m * d.r + d.n),
        supports=one_layer,
    ),
    Launcher(
        "expand_split_y",
        "m n r",
        call=lambda o, c: expand.expand_split_y(
            copy_of(o.dy), o.h, o.b, o.bias, o.col_scale, o.spec, o.numerics, c
        ),
        formula=formulas.expand_split_y,
        config_for=lambda o: expand.config_for(o.x.device, o.r, o.numerics),
        flops=lambda d: 2 * d.m * d.n * d.r,
        moved=lambda d: d.e * (5 * d.m * d.n + d.n * d.r) + 4 * (d.m * d.r + d.n),
        supports=one_layer,
    ),
    Launcher(
        "expand_mask_dx",
        "m k r p",
        call=lambda o, c: (
            expand.expand_mask_dx(copy_of(o.x), o.dh, o.a, *dropout_of(o), o.numerics, c),
        ),
        formula=formulas.expand_mask_dx,
        config_for=lambda o: expand.config_for(o.x.device, len(o.a), o.numerics),
        flops=lambda d: 2 * d.m * d.k * d.r,
        moved=lambda d: d.e * (4 * d.m * d.k + d.r * d.k) + 4 * d.m * d.r,
        supports=drops,
    ),
)

GRAD_B = (
    Launcher(
        "grad_b_scaled",
        "m n r",
        call=lambda o, c: grad_b.grad_b(o.dy, o.b, o.h, o.spec, True, o.numerics, c, o.col_scale),
        formula=formulas.grad_b_scaled,
        config_for=lambda o: grad_b.config_for(o.dy.device, o.r, o.numerics),
        flops=lambda d: 4 * d.m * d.n * d.r,
        moved=lambda d: d.e * (d.m * d.n + 2 * d.n * d.r) + 8 * d.m * d.r + 4 * d.n,
        supports=one_layer,
    ),
)
