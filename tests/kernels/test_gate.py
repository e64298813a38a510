"""The ahead-of-time gate, in processes that do not interpret kernels."""

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest

from lora_kernels.dispatch.algorithm import BLACKWELL
from tests.kernels.aot import TARGETS, TESTED

# Named by triton 3.9 as what it has always done; without it every process warns.
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}


TRITON = tuple(map(int, re.findall(r"\d+", importlib.metadata.version("triton"))[:3]))
# Those on which no GPU runs the kernels with this Triton need not compile.
USED = [target for target in TESTED if target != "sm_100" or TRITON >= BLACKWELL]


# Over the stand-in for the driver, too; and, for want of time, the kernels of lora_linear alone.
OPTIONS = {"sm_90": ["--launch"], "sm_80": ["--linear"], "gfx942": ["--linear"]}


def gate(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.kernels.gate", *arguments],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def running(request):
    """The gate's processes on the representatives, all targets that are asked for at once."""
    name = test_representatives_compile_without_spills.__name__
    tests = [item for item in request.session.items if getattr(item, "originalname", "") == name]
    processes = {
        target: gate(target, *OPTIONS.get(target, ()))
        for target in {test.callspec.params["target"] for test in tests}
    }
    yield processes
    for process in processes.values():
        process.kill()


def check(process):
    table, _ = process.communicate()
    print(table)
    assert not [line for line in table.splitlines() if "<--" in line]
    assert process.returncode == 0
    assert "0 faults" in table.splitlines()[-1]


@pytest.mark.parametrize("target", USED)
def test_representatives_compile_without_spills(running, target):
    check(running[target])


@pytest.mark.gate
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_compiles_without_spills(target):
    check(gate(target, "--all", "--launch"))


RECOMPILATION = """
import torch
from lora_kernels.kernels import dora, linear
from lora_kernels.kernels.registry import KERNELS
from lora_kernels.spec import DoraNeeds, DoraSpec, LoraSpec, Needs, OutputSplits
from tests.kernels import aot

def layer(m, n, k, scaling, dropout_p):
    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")
    x, w, a, b, dy = meta(m, k), meta(n, k), meta(16, k), meta(n, 16), meta(m, n)
    seed, spec = meta(1, dtype=torch.int64), LoraSpec(scaling, dropout_p, OutputSplits.whole(n))
    _, h = linear.lora_linear_forward(ALGORITHM, x, w, a, b, None, seed, spec)
    needs = Needs(x=True, a=True, b=True)
    linear.lora_linear_backward(ALGORITHM, dy, x, h, w, a, b, seed, spec, needs)
    operands, spec = (meta(n), seed), DoraSpec(scaling, dropout_p, OutputSplits.whole(n))
    _, h, norm, c = dora.dora_forward(ALGORITHM, x, w, a, b, None, *operands, spec)
    needs = DoraNeeds(x=True, a=True, b=True, magnitude=True)
    operands = (*operands, norm, c)
    dora.dora_backward(ALGORITHM, dy, x, h, w, a, b, None, *operands, spec, needs)

def compilations():
    return [len(kernel.function.device_caches[0][0]) for kernel in KERNELS.values()]

with aot.compiling_for("sm_90"):
    layer(8192, 4096, 2048, 2.0, 0.1)
    first = compilations()
    for m, n, k, scaling, dropout_p in [
        (8191, 4096, 2048, 2.0, 0.1), (65, 1024, 4096, 0.5, 0.2), (100000, 14336, 512, 1.0, 0.3),
    ]:
        layer(m, n, k, scaling, dropout_p)
        assert compilations() == first, (m, n, k, first, compilations())
"""


@pytest.mark.parametrize("name", ["fused", "addmm"])
def test_other_sizes_and_scalings_compile_nothing(name):
    code = f"ALGORITHM = {name!r}\n{RECOMPILATION}"
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_fault_is_found():
    """A configuration that the gate must refuse: far too large for registers."""
    code = """
import sys
from lora_kernels.kernels import gemm_fwd
from lora_kernels.kernels.config import GemmConfig, When
from tests.kernels import gate
too_large = GemmConfig(256, 256, 32, num_warps=4, num_stages=2)
gemm_fwd.TILES["sm_80"][-1] = (When(), too_large)
sys.exit(min(gate.run("sm_80", (gate.Case(),), ["gemm_fwd"]), 1))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    faults = [line for line in done.stdout.splitlines() if "<--" in line]
    assert len(faults) == 2  # with a scale of columns, too
    assert all("gemm_fwd" in fault and "spills" in fault for fault in faults)
