"""A model of the limit: what the frozen layer must cost, and what each way of adding LoRA adds.

Forward + backward of one frozen linear is two products of 2·M·K·N FLOPs, each as long as its
arithmetic or its traffic takes, whichever is longer:

    product(extra FLOPs, extra bytes) =
        max((2·M·K·N + extra FLOPs) / flops, (e·(M·K + K·N + M·N) + extra bytes) / bandwidth)

A scheme hides work inside the products and adds exposed passes, at the bandwidth, and launches:

    time(scheme) = product(forward) + product(backward)
                 + (e·(x_passes·M·K + y_passes·M·N)
                    + h_bytes·M·r + factor_bytes·r·(K + N)) / bandwidth
                 + launches·launch

with e bytes an element. x_passes, y_passes and what is hidden follow from what a scheme reads and
writes. launches, h_bytes and factor_bytes (traffic of h and dh, of the factors and their gradients)
are fitted to the table of modelled ratios in tests/bench/test_roofline.py; with them all its 90
numbers come out to the two decimals that it prints.
"""

from dataclasses import dataclass

__all__ = [
    "H200",
    "KERNELS",
    "SCHEMES",
    "WORK",
    "Part",
    "Scheme",
    "floor",
    "kernel_work",
    "ratio",
    "seconds",
]


@dataclass(frozen=True)
class Part:
    """What a machine reaches: FLOP/s of a large product, bytes/s of a copy, seconds a launch."""

    flops: float
    bandwidth: float
    launch: float


H200 = Part(flops=790e12, bandwidth=4.3e12, launch=2e-6)


@dataclass(frozen=True)
class Scheme:
    """What a way of adding LoRA costs beyond the two products of the frozen layer.

    fused: the rank-r product is done inside both products. hidden_x_passes: passes over (M, K)
    inside the backward product. inside: everything is, and only the factors are read besides.
    """

    x_passes: float
    y_passes: float
    launches: int
    h_bytes: float
    factor_bytes: float
    fused: bool = False
    hidden_x_passes: float = 0.0
    inside: bool = False


SCHEMES = {
    # All of LoRA inside the two products: the limit.
    "perfect": Scheme(0, 0, launches=0, h_bytes=0, factor_bytes=5, inside=True),
    # x for h and for da, dy for dh and db; the rest in the epilogues. Mask drawn again.
    "split": Scheme(2, 1, launches=3, h_bytes=4, factor_bytes=6, fused=True),
    # As split, but y and dx are filled before the products accumulate onto them.
    "sandwich": Scheme(3, 2, launches=5, h_bytes=4, factor_bytes=6),
    # Stores x_hat and a mask of a byte, which the backward product reads.
    "lorafusion": Scheme(
        4.5, 1, launches=5, h_bytes=16, factor_bytes=5, fused=True, hidden_x_passes=0.5
    ),
    # No dropout; h is computed again in the backward.
    "unsloth": Scheme(5, 5, launches=8, h_bytes=4, factor_bytes=1),
    # Every operator on its own, dropout included.
    "peft": Scheme(11, 10, launches=12, h_bytes=4, factor_bytes=2),
}


def floor(m: int, k: int, n: int, part: Part = H200, element: int = 2) -> float:
    """Seconds of forward + backward of the frozen layer."""
    return 2 * _product(m, k, n, part, element)


def seconds(
    scheme: str, m: int, k: int, n: int, r: int, part: Part = H200, element: int = 2
) -> float:
    """Modelled seconds of forward + backward with LoRA of rank r."""
    s = SCHEMES[scheme]
    into_y, into_x = 2 * m * r * n, 2 * m * r * k  # FLOPs of h·bᵀ and of dh·a
    if s.inside:
        # Besides those: h; dh, db, da.
        return _product(m, k, n, part, element, into_y + into_x, 2 * r * (k + n)) + _product(
            m, k, n, part, element, 2 * (into_y + into_x), s.factor_bytes * r * (k + n)
        )
    forward = _product(m, k, n, part, element, into_y * s.fused)
    hidden = element * s.hidden_x_passes * m * k
    backward = _product(m, k, n, part, element, into_x * s.fused, hidden)
    passes = element * (s.x_passes * m * k + s.y_passes * m * n)
    small = s.h_bytes * m * r + s.factor_bytes * r * (k + n)
    return forward + backward + (passes + small) / part.bandwidth + s.launches * part.launch


def ratio(
    scheme: str, m: int, k: int, n: int, r: int, part: Part = H200, element: int = 2
) -> float:
    """Modelled LoRA tax: time with LoRA over time of the frozen layer, forward + backward."""
    return seconds(scheme, m, k, n, r, part, element) / floor(m, k, n, part, element)


def _product(m, k, n, part: Part, element: int, flops: float = 0, moved: float = 0) -> float:
    arithmetic = (2 * m * k * n + flops) / part.flops
    traffic = (element * (m * k + k * n + m * n) + moved) / part.bandwidth
    return max(arithmetic, traffic)


# FLOPs and bytes of each launcher of this package. Factors and their gradients have e bytes an
# element as x has, h and dh four.
WORK = {
    "down": lambda m, k, n, r, e: (2 * m * k * r, e * (m * k + r * k) + 4 * m * r),
    "forward": lambda m, k, n, r, e: (
        2 * m * n * (k + r),
        e * (m * k + n * k + m * n + n * r) + 4 * m * r,
    ),
    "few_rows": lambda m, k, n, r, e: (
        2 * m * n * (k + r) + 2 * m * k * r,
        e * (m * k + n * k + m * n + r * k + n * r) + 4 * m * r,
    ),
    "fill_y": lambda m, k, n, r, e: (2 * m * n * r, e * (m * n + n * r) + 4 * m * r),
    "fill_dx": lambda m, k, n, r, e: (2 * m * k * r, e * (m * k + r * k) + 4 * m * r),
    "dy_pass": lambda m, k, n, r, e: (4 * m * n * r, e * (m * n + 2 * n * r) + 8 * m * r),
    "dx": lambda m, k, n, r, e: (
        2 * m * k * (n + r),
        e * (m * n + n * k + m * k + r * k) + 4 * m * r,
    ),
    "da": lambda m, k, n, r, e: (2 * m * k * r, e * (m * k + r * k) + 4 * m * r),
}
# What launches the kernels in one step, forward + backward, by what their names hold.
KERNELS = {
    "_down_kernel": ("down",),
    "_forward_kernel": ("forward",),
    "_few_rows_kernel": ("few_rows",),
    "_fill_kernel": ("fill_y", "fill_dx"),
    "_dy_pass_kernel": ("dy_pass",),
    "_dx_kernel": ("dx",),
    "_da_kernel": ("da",),
}


def kernel_work(
    name: str, m: int, k: int, n: int, r: int, element: int
) -> tuple[float, float] | None:
    """FLOPs and bytes in one step of the kernel of this name, None where it is not known."""
    for known, launchers in KERNELS.items():
        if known in name:
            flops, moved = zip(*(WORK[one](m, k, n, r, element) for one in launchers), strict=True)
            return sum(flops), sum(moved)
    return None
