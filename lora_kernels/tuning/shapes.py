"""What is measured: shapes of a layer, and the layers of known models."""

from dataclasses import dataclass

import torch

from lora_kernels.checks import dtype_name
from lora_kernels.testing.problem import Problem, make_problem

__all__ = ["DTYPES", "GPT2_MEDIUM", "LLAMA_3_8B", "LLAMA_QKV", "SETS", "Layer", "Shape"]

# What a device computes in, unless asked otherwise.
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


@dataclass(frozen=True)
class Layer:
    """[K, N] of a layer, and its groups of columns if it has several.

    enable_lora: which groups have an update. out_splits: their sizes; None makes them equal.
    """

    k: int
    n: int
    enable_lora: tuple[bool, ...] = (True,)
    out_splits: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Shape:
    """One layer at one number of tokens and one rank: x [m, k] -> y [m, n].

    factors: the dtype of lora_A and lora_B; None is that of the layer.
    """

    m: int
    k: int
    n: int
    r: int
    dropout_p: float
    enable_lora: tuple[bool, ...] = (True,)
    out_splits: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    factors: torch.dtype | None = None

    @property
    def merged(self) -> bool:
        """Whether the layer has several groups."""
        return len(self.enable_lora) > 1

    @property
    def dtype_name(self) -> str:
        """The dtype as rows have it."""
        return dtype_name(self.dtype)

    def problem(self) -> Problem:
        """Random operands of this shape, the same in every run; drawn where they are needed."""
        torch.manual_seed(0)
        count = len(self.enable_lora)
        sizes = self.out_splits or (self.n // count,) * count
        with torch.device(self.device):
            return make_problem(
                self.m,
                self.k,
                self.n,
                self.r,
                device=self.device,
                dtype=self.dtype,
                lora_dtype=self.factors,
                dropout_p=self.dropout_p,
                groups=list(zip(sizes, self.enable_lora, strict=True)),
            )


QUERY_AND_VALUE = (True, False, True)
LLAMA_3_8B = (Layer(4096, 4096), Layer(4096, 1024), Layer(4096, 14336), Layer(14336, 4096))
# Grouped-query attention, which loralib's equal groups cannot serve, and as many heads for all.
LLAMA_QKV = (
    Layer(4096, 6144, QUERY_AND_VALUE, (4096, 1024, 1024)),
    Layer(4096, 12288, QUERY_AND_VALUE),
)
GPT2_MEDIUM = (Layer(1024, 3072), Layer(1024, 3072, QUERY_AND_VALUE))
SQUARE = tuple(Layer(size, size) for size in (2048, 4096, 8192))
SETS = {
    "llama3-8b": (*LLAMA_3_8B, *LLAMA_QKV),
    "gpt2-medium": GPT2_MEDIUM,
    "square": SQUARE,
    "decode": (*LLAMA_3_8B, Layer(8192, 8192)),
    "all": (*SQUARE, *LLAMA_3_8B[1:], Layer(5120, 13824), *GPT2_MEDIUM, *LLAMA_QKV),
}
