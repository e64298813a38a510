"""The search for hazards, on machine code that is written for it and on Triton's own."""

import os
import subprocess
import sys
import textwrap
import types

import pytest
import torch

from lora_kernels.kernels import hazards as module
from lora_kernels.kernels import selfcheck
from lora_kernels.kernels.config import When
from lora_kernels.kernels.hazards import fault, hazards
from lora_kernels.kernels.selfcheck import Variant
from lora_kernels.tuning import candidates
from lora_kernels.tuning.shapes import Shape

CUDA = torch.device("cuda")
# A tile that is changed in registers before the product, in a loop.
MASKED = """
    import sys

    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lora_kernels.kernels.hazards import cuobjdump, hazards

    @triton.jit
    def masked(x, a, y, K, M: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr):
        m, k, n = tl.arange(0, M), tl.arange(0, STEP), tl.arange(0, N)
        acc = tl.zeros([M, N], tl.float32)
        for start in tl.range(0, K, STEP):
            x_tile = tl.load(x + m[:, None] * K + (start + k)[None, :])
            a_tile = tl.load(a + n[:, None] * K + (start + k)[None, :])
            acc = tl.dot(tl.where(x_tile > 0, x_tile, 0.0), a_tile.T, acc)
        tl.store(y + m[:, None] * N + n[None, :], acc)

    types = {"x": "*bf16", "a": "*bf16", "y": "*fp32", "K": "i32"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    source = ASTSource(masked, types, {"M": 128, "STEP": 64, "N": 16}, aligned)
    options = {"num_warps": 8, "num_stages": 3}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    open(sys.argv[1], "wb").write(made.asm["cubin"])
    print(len(hazards(cuobjdump("-sass", sys.argv[1]))), triton.__version__)
"""


@pytest.fixture
def hopper(monkeypatch):
    """An H100 with Triton 3.6."""
    monkeypatch.setattr(module, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(module, "triton_version", lambda: (3, 6, 0))
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.fixture
def compiled(monkeypatch):
    """A kernel whose machine code has a hazard."""
    monkeypatch.setattr(module, "cuobjdump", lambda *arguments: changed(_3=""))
    return [types.SimpleNamespace(asm={"cubin": b""})]


LOOP = [
    "LDS.128 R24, [R3]",
    "WARPGROUP.ARRIVE",
    "HGMMA.64x16x16.F32.BF16 R8, R24, gdesc[UR4], R8, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "@P0 BRA 0x0000",
]


def sass(lines):
    return "\n".join(f"        /*{16 * i:04x}*/    {line} ;" for i, line in enumerate(lines))


def changed(**lines):
    """The loop with other lines in the places of some; one of "" is left out."""
    found = list(LOOP)
    for name, line in lines.items():
        found[int(name[1:])] = line or "NOP"
    return sass(found)


@pytest.mark.parametrize(
    "code",
    [
        sass(LOOP),
        changed(_2="HGMMA.64x16x16.F32.BF16 R8, gdesc[UR8], gdesc[UR4], R8, gsb0", _3=""),
        changed(_0="LDS.128 R28, [R3]", _3=""),
        changed(_0="STS.128 [R3], R24", _3=""),
        changed(_0="ISETP.GE.AND P0, PT, R24, R5, PT", _3=""),
    ],
)
def test_code_that_waits_or_writes_elsewhere_has_none(code):
    assert hazards(code) == []


@pytest.mark.parametrize(
    ("code", "instruction"),
    [
        (changed(_3=""), "LDS.128 R24"),
        (changed(_3="WARPGROUP.DEPBAR.LE gsb0, 0x1"), "LDS.128 R24"),
        (changed(_3="IADD3 R27, R5, R6, RZ"), "IADD3 R27"),
        (changed(_3="@!P1 MOV R25, R6"), "MOV R25"),
        (changed(_3="IMAD.WIDE R26, R5, R6, R2"), "IMAD.WIDE R26"),
        (changed(_0="LDSM.16.M88.4 R21, [R3]", _3=""), "LDSM.16.M88.4 R21"),
    ],
)
def test_a_write_to_what_a_product_still_reads_is_found(code, instruction):
    assert any(instruction in found for found in hazards(code))


def test_triton_before_3_7_makes_some(tmp_path):
    """Without it the search finds nothing, whatever it looks for."""
    script, cubin = tmp_path / "masked.py", tmp_path / "masked.cubin"
    script.write_text(textwrap.dedent(MASKED))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, script, cubin], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    count, version = done.stdout.split()
    assert (int(count) > 0) == (tuple(map(int, version.split(".")[:2])) < (3, 7))


def test_a_hazard_is_a_fault_of_hopper_with_an_old_triton_alone(hopper, compiled, monkeypatch):
    said = fault(compiled, CUDA)
    assert said.startswith("its machine code overwrites what a product still reads, in 1 places")
    assert said.endswith("install triton 3.7 or newer")
    assert fault([], CUDA) is None
    assert fault(compiled, torch.device("cpu")) is None
    monkeypatch.setattr(module, "triton_version", lambda: (3, 7, 0))
    assert fault(compiled, CUDA) is None
    monkeypatch.setattr(module, "triton_version", lambda: (3, 6, 0))
    monkeypatch.setattr(module, "capability_of", lambda device: (10, 0))
    assert fault(compiled, CUDA) is None


def test_a_kernel_with_a_hazard_is_not_used(monkeypatch, device):
    launches = []
    monkeypatch.setattr(
        module, "fault", lambda compiled, device: launches.extend(compiled) or "overwritten"
    )
    assert selfcheck.fault(Variant("shrink", r=4), device) == "overwritten"
    assert len(launches) == 1
    shape = Shape(70, 24, 20, 4, 0.1, dtype=torch.float32, device=device.type)
    config = candidates.grid("shrink", shape, When())[0]
    with pytest.raises(selfcheck.WrongKernelError, match="overwritten"):
        candidates.try_out(("shrink", shape, config))
