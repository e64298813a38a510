"""Elements further than 2^31 from the first, without the memory: operands in a sparse file."""

import subprocess
import sys

import pytest

# A wrong offset reads outside the file, so it ends a process of its own.
CODE = """
import os, sys
import torch
from tests.calls import solve
from lora_kernels.testing.problem import make_problem
from lora_kernels.testing.tolerance import assert_close

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

def far_apart(tensor, path):
    stride = 2**30 + 8
    size = (tensor.shape[0] - 1) * stride + tensor.shape[1]
    if device == "cuda":
        memory = torch.empty(size, dtype=tensor.dtype, device=device)
    else:
        memory = torch.from_file(path, shared=True, size=size, dtype=tensor.dtype)
    rows = memory.as_strided(tensor.shape, (stride, 1))
    return rows.copy_(tensor)

folder = sys.argv[1]
for operand in ("x", "w", "a", "b", "dy"):
    print(operand, flush=True)
    problem = make_problem(3, 8, 5, 3, device=device, dtype=torch.float16, dropout_p=0.3)
    exact, baseline = problem.solve(torch.float64), problem.solve()
    setattr(problem, operand, far_apart(getattr(problem, operand), os.path.join(folder, operand)))
    for result, value in solve(problem).items():
        assert_close(value, exact[result], baseline[result], f"{operand} far apart: {result}")
"""


@pytest.mark.parametrize("algorithm", ["fused", "addmm"], indirect=True)
def test_rows_2_to_the_30_apart(algorithm, tmp_path):
    done = subprocess.run([sys.executable, "-c", CODE, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, f"operands up to the last of: {done.stdout}\n{done.stderr}"
    assert done.stdout.split() == ["x", "w", "a", "b", "dy"]
