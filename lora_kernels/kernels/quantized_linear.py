"""The update of lora_linear onto y, the product of a base layer whose weight is not dense.

Either algorithm is shrink and expand_add_y: the large product is the base layer's own. The backward
is that of linear.py, with the weight made dense for it.
"""

from torch import Tensor

from lora_kernels.kernels.expand import expand_add_y
from lora_kernels.kernels.launch import as_rows, on_device_of
from lora_kernels.kernels.numerics import numerics_of
from lora_kernels.kernels.shrink import shrink
from lora_kernels.spec import LoraSpec

__all__ = ["add_lora"]


def add_lora(
    algorithm: str, y: Tensor, x: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, spec: LoraSpec
) -> Tensor:
    """reference.quantized_linear.add_lora by algorithm "fused" or "addmm", which are one here.

    y may have another dtype than x, and any strides: if its rows are no matrix of unit stride, a
    copy gets the update and goes back.
    """
    x_rows, y_rows, a, b = as_rows(x), as_rows(y), as_rows(a), as_rows(b)
    with on_device_of(x):
        numerics = numerics_of(x, a, b, narrow=spec.narrow)
        h = shrink(x_rows, a, seed, spec.dropout_p, numerics)
        expand_add_y(y_rows, h, b, spec, numerics if spec.narrow else numerics_of(y, b))
    if y_rows.data_ptr() != y.data_ptr():
        y.copy_(y_rows.view(y.shape))
    return h
