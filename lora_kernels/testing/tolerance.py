"""The one rule of what is close: the error against float64 is bounded by same-dtype PyTorch's."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["assert_close", "assert_close_together", "require"]


def assert_close(actual: Tensor, reference64: Tensor, baseline: Tensor, what: str = "") -> None:
    """rms_err <= 1.25·rms_torch + 4·eps·rms(ref) and max_err <= 2·max_torch + 4·eps·max|ref|.

    reference64: the result in float64; baseline: plain PyTorch's in actual's dtype.
    """
    require(actual.dtype == baseline.dtype, f"{what} dtype {actual.dtype}, not {baseline.dtype}")
    shapes = actual.shape, reference64.shape, baseline.shape
    require(len(set(shapes)) == 1, f"{what} shape {actual.shape}, not {reference64.shape}")
    require(reference64.dtype == torch.float64, f"{what} reference in {reference64.dtype}")
    if actual.numel() == 0:
        return
    eps = torch.finfo(actual.dtype).eps
    error = (actual.double() - reference64).abs()
    allowed = (baseline.double() - reference64).abs()
    rms, worst = _rms(error), error.max().item()
    rms_bound = 1.25 * _rms(allowed) + 4 * eps * _rms(reference64)
    max_bound = 2 * allowed.max().item() + 4 * eps * reference64.abs().max().item()
    require(rms <= rms_bound, f"{what} rms error {rms:.3e} > {rms_bound:.3e}")
    require(worst <= max_bound, f"{what} max error {worst:.3e} > {max_bound:.3e}")


def require(holds: bool, message: str) -> None:
    """An assert that python -O leaves in place: users' GPUs are checked by it.

    Raises: AssertionError.
    """
    if not holds:
        raise AssertionError(message)


def assert_close_together(triples: Sequence[tuple[Tensor, Tensor, Tensor]], what: str = "") -> None:
    """assert_close of several small results of one dtype, (actual, reference64, baseline) each.

    They are judged together, each scaled to be near one: the largest error of a baseline of few
    elements may be small by luck.
    """
    parts = []
    for triple in triples:
        size = _rms(triple[1]) if triple[1].numel() else 0.0
        scale = 2.0 ** -round(math.log2(size)) if size > 0 else 1.0  # a power: without rounding
        parts.append([tensor.flatten() * scale for tensor in triple])
    actual, reference64, baseline = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    assert_close(actual, reference64, baseline, what)


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()
