"""The ops behind lora_grouped_linear: what PyTorch asks of a custom op."""

import pytest
import torch

from lora_kernels.spec import Needs
from lora_kernels.testing.grouped_problem import make_grouped_problem

FORWARD = torch.ops.lora_kernels.lora_grouped_linear_forward.default
BACKWARD = torch.ops.lora_kernels.lora_grouped_linear_backward.default
CASES = {
    "adapters": {"groups": (1, -1, 0), "sources": 4, "dropout_ps": (0.3, 0.0)},
    "experts": {"experts": 3, "behind": 2},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_grouped_linear_passes_opcheck(case, dtype, seed, device):
    problem = make_grouped_problem(
        (3, 0, 4), 8, 6, 2, device=device, dtype=dtype, bias=True, **case
    )
    routing = (problem.ends, problem.groups, problem.index, problem.seeds)
    numbers = (list(problem.spec.scalings), list(problem.spec.dropout_ps))
    x, w, a, b = problem.x, problem.w, problem.a, problem.b
    arguments = (x, w, a, b, problem.bias, *routing, *numbers)
    torch.library.opcheck(FORWARD, arguments)
    _, h = FORWARD(*arguments)
    for needs in (Needs(*[True] * 5), Needs(x=True, b=True), Needs(a=True, bias=True)):
        arguments = (problem.dy, x, h, w, a, b, *routing, len(x), *numbers, list(needs))
        torch.library.opcheck(BACKWARD, arguments)


@pytest.mark.parametrize("algorithm", ["fused", "addmm"], indirect=True)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_kernels_give_what_tracing_expects(case, algorithm, seed, device):
    """Shapes, dtypes and strides, and the same numbers in two runs."""
    problem = make_grouped_problem((3, 0, 4), 8, 6, 2, device=device, bias=True, **case)
    routing = (problem.ends, problem.groups, problem.index, problem.seeds)
    numbers = (list(problem.spec.scalings), list(problem.spec.dropout_ps))
    x, w, a, b = problem.x, problem.w, problem.a, problem.b
    arguments = (x, w, a, b, problem.bias, *routing, *numbers)
    only = {"test_utils": ["test_faketensor"]}
    torch.library.opcheck(FORWARD, arguments, **only)
    _, h = FORWARD(*arguments)
    arguments = (problem.dy, x, h, w, a, b, *routing, len(x), *numbers, [True] * 5)
    torch.library.opcheck(BACKWARD, arguments, **only)
    for one, other in zip(BACKWARD(*arguments), BACKWARD(*arguments), strict=True):
        assert torch.equal(one, other)
