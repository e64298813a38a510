"""The ops behind lora_linear with a magnitude: what PyTorch asks of a custom op."""

import inspect

import pytest
import torch

from lora_kernels.ops.dora import DoraLinear
from lora_kernels.spec import DoraNeeds
from lora_kernels.testing.dora_problem import make_dora_problem

FORWARD = torch.ops.lora_kernels.dora_forward.default
BACKWARD = torch.ops.lora_kernels.dora_backward.default


@pytest.mark.parametrize("algorithm", ["reference", "fused"], indirect=True)
@pytest.mark.parametrize(("dropout_p", "low_rank_only"), [(0.0, False), (0.3, False), (0.3, True)])
def test_dora_passes_opcheck(dropout_p, low_rank_only, seed, device):
    p = make_dora_problem(
        (2, 3), 8, 24, 2, device=device, lora_dtype=torch.float64, dropout_p=dropout_p
    )
    constants = (p.scaling, dropout_p, low_rank_only)
    operands = (p.x, p.w, p.a, p.b, p.bias, p.magnitude, p.seed)
    torch.library.opcheck(FORWARD, (*operands, *constants))
    y, h, norm, *c = FORWARD(*operands, *constants)
    assert len(c) == (dropout_p > 0 and not low_rank_only)
    for needs in (DoraNeeds(*[True] * 6), DoraNeeds(x=True, b=True), DoraNeeds(magnitude=True)):
        args = (p.dy, p.x, h, p.w, p.a, p.b, p.bias, p.magnitude, p.seed, norm, *(c or [y]))
        torch.library.opcheck(BACKWARD, (*args, *constants, list(needs)))


def test_dora_binds_its_arguments_positionally():
    signature = inspect.signature(DoraLinear.forward)
    names = ["x", "w", "a", "b", "bias", "magnitude", "seed", "spec"]
    assert list(signature.parameters) == names
