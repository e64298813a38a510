"""The grid: what is measured, cell by cell."""

from dataclasses import dataclass

import torch

from tests.formula import Problem, make_problem

__all__ = ["LINEAR", "MERGED_LINEAR", "Cell"]

MODES = ("forward", "forward+backward")
DROPOUT = (0.0, 0.1)


@dataclass(frozen=True)
class Cell:
    """One layer at one shape: x [m, k] -> y [m, n], in groups of equal size where there are any."""

    m: int
    k: int
    n: int
    r: int
    dropout_p: float
    mode: str
    enable_lora: tuple[bool, ...] = (True,)
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        groups = "".join("01"[on] for on in self.enable_lora)
        layer = f"merged{groups}" if len(self.enable_lora) > 1 else "linear"
        return (
            f"{layer} {self.k}x{self.n} m{self.m} r{self.r} p{self.dropout_p:g} "
            f"{self.dtype_name} {self.device} {self.mode}"
        )

    def problem(self) -> Problem:
        """Random operands of this cell, the same in every run."""
        torch.manual_seed(0)
        size = self.n // len(self.enable_lora)
        return make_problem(
            self.m, self.k, self.n, self.r, device=self.device, dtype=self.dtype,
            dropout_p=self.dropout_p, groups=[(size, on) for on in self.enable_lora],
        )  # fmt: skip


LINEAR = [
    Cell(m=512, k=size, n=size, r=8, dropout_p=p, mode=mode)
    for size in (768, 2048)
    for p in DROPOUT
    for mode in MODES
]
# GPT-2 medium's c_attn: query and value of query, key and value.
MERGED_LINEAR = [
    Cell(m=512, k=1024, n=3072, r=8, dropout_p=p, mode=mode, enable_lora=(True, False, True))
    for p in DROPOUT
    for mode in MODES
]
