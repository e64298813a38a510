"""The one rule of what is close: the error against float64 is bounded by same-dtype PyTorch's."""

import torch
from torch import Tensor

__all__ = ["assert_close"]


def assert_close(actual: Tensor, reference64: Tensor, baseline: Tensor, what: str = "") -> None:
    """rms_err <= 1.25·rms_torch + 4·eps·rms(ref) and max_err <= 2·max_torch + 4·eps·max|ref|.

    reference64: the result in float64; baseline: plain PyTorch's in actual's dtype.
    """
    assert actual.dtype == baseline.dtype, f"{what} dtype {actual.dtype}, not {baseline.dtype}"
    assert actual.shape == reference64.shape == baseline.shape, f"{what} shape {actual.shape}"
    assert reference64.dtype == torch.float64
    if actual.numel() == 0:
        return
    eps = torch.finfo(actual.dtype).eps
    error = (actual.double() - reference64).abs()
    allowed = (baseline.double() - reference64).abs()
    rms_bound = 1.25 * _rms(allowed) + 4 * eps * _rms(reference64)
    max_bound = 2 * allowed.max().item() + 4 * eps * reference64.abs().max().item()
    assert _rms(error) <= rms_bound, f"{what} rms error {_rms(error):.3e} > {rms_bound:.3e}"
    worst = error.max().item()
    assert worst <= max_bound, f"{what} max error {worst:.3e} > {max_bound:.3e}"


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()
