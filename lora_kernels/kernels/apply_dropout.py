"""x_hat = mask ∘ x / (1 - p). One program owns BLOCK_M rows and BLOCK_K columns of x.

For a large product that sees the dropped-out x. Products of the rank draw the mask themselves.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels import dropout
from lora_kernels.kernels.config import SkinnyConfig, Tiles, When, select, target_of
from lora_kernels.kernels.dropout import keep_tile
from lora_kernels.kernels.launch import cdiv, launch, mask, matrix
from lora_kernels.kernels.tile import load_tile, store_tile

TILES = Tiles(
    interpreter=[(When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1))],
    sm_80=[(When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1))],
    sm_90=[(When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1))],
    sm_100=[(When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1))],
    hip=[(When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1))],
    other=[(When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1))],
)


@triton.jit(do_not_specialize=["M"])
def _apply_dropout_kernel(
    x, mask, x_hat,
    M, K, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_k = tl.cdiv(K, BLOCK_K)
    row = tl.cast(tl.program_id(0) // tiles_k, tl.int64) * BLOCK_M
    k = tl.program_id(0) % tiles_k * BLOCK_K
    tile = load_tile(x, row, k, M, K, BLOCK_M, BLOCK_K).to(tl.float32) * keep_scale
    keep = keep_tile(tl.load(mask.seed), mask.threshold, row, k, BLOCK_M, BLOCK_K)
    store_tile(x_hat, tl.where(keep, tile, 0.0), row, k, M, K)


def config_for(device: torch.device, dtype: torch.dtype) -> SkinnyConfig:
    """The entry of TILES that serves x in dtype."""
    return select(TILES, target_of(device), 8 * dtype.itemsize)


def apply_dropout(
    x: Tensor, seed: Tensor, dropout_p: float, config: SkinnyConfig | None = None
) -> Tensor:
    """x_hat in x's dtype, rounded once. Shapes: x [M, K], seed [1]; x has a unit inner stride."""
    m, k = x.shape
    config = config or config_for(x.device, x.dtype)
    x_hat = torch.empty((m, k), dtype=x.dtype, device=x.device)
    launch(
        _apply_dropout_kernel,
        (cdiv(m, config.BLOCK_ROWS) * cdiv(k, config.BLOCK_COLS),),
        x=matrix(x),
        mask=mask(seed, dropout_p),
        x_hat=matrix(x_hat),
        M=m,
        K=k,
        keep_scale=dropout.keep_scale(dropout_p),
        BLOCK_M=config.BLOCK_ROWS,
        BLOCK_K=config.BLOCK_COLS,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return x_hat
