"""Batches of gradients and second derivatives of PEFT's layers with the patch."""

import pytest
import torch
from torch.autograd.functional import hessian, jacobian

from lora_kernels import patch_peft
from tests.integrations.peft.test_guard import lora_layer
from tests.op_calls import Calls

BATCHES = {
    "jacobian": lambda f, x: jacobian(f, x, vectorize=True),
    "hessian": lambda f, x: hessian(lambda x: f(x).pow(3).sum(), x, vectorize=True),
    "is_grads_batched": lambda f, x: torch.autograd.grad(
        f(x), [*f.lora_A.parameters(), *f.lora_B.parameters()],
        torch.eye(12, dtype=x.dtype, device=x.device)[:, None].expand(12, 2, 12),
        is_grads_batched=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("of", BATCHES.values(), ids=BATCHES)
def test_batches_of_gradients(of, seed, device, unpatched):
    layer, x = lora_layer(device).double(), torch.randn(2, 16, dtype=torch.float64, device=device)
    expected = of(layer, x)
    patch_peft()
    with Calls() as calls:
        results = of(layer, x)
    assert calls.fused == 1
    torch.testing.assert_close(results, expected)
