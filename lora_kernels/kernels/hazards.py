"""Registers that a WGMMA of Hopper still reads, and that the code after it writes: ``hazards``.

A WGMMA runs beside the code that follows it. If its left operand is in registers, as x is under a
dropout mask, these must stay as they are until a wait says that it is done. Compilers have got this
wrong, Triton before 3.7 in many loops. A hazard is timing, so that no test of results finds it for
sure.
Source: triton-lang/triton, issue 9433 and pull request 9514.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
import triton

from lora_kernels.dispatch.algorithm import capability_of, triton_version

__all__ = ["MENDED", "cuobjdump", "fault", "hazards"]

MENDED = (3, 7)  # Triton that copies the registers before each product

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_PRODUCT = re.compile(r"HGMMA\S* R\d+, (?:R(\d+)|gdesc)")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")
_JUMP = re.compile(r"BRA(?:\.\w+)* (?:`\(\S+\)|(0x[0-9a-f]+))")
_OPERATION = re.compile(r"(?:@!?U?P\w+\s+)?(\S+)\s*(?:U?P\w+,\s*)*R(\d+)\b")
# First operands that are read, or no register of the thread's own.
_NO_RESULT = (
    "ST", "RED", "BAR", "BRA", "HGMMA", "WARPGROUP", "DEPBAR", "LDGSTS", "LDGDEPBAR", "MEMBAR",
    "FENCE", "ISETP", "FSETP", "R2UR", "CCTL", "ATOM", "SYNCS", "UTMA",
)  # fmt: skip
_OPERAND = 4  # registers of a thread that hold its part of the left operand
_ROUNDS = 3  # of a loop, in which what is pending at its end meets its beginning


def fault(compiled: Iterable, device: torch.device) -> str | None:
    """What is wrong with the machine code of kernels that Triton has compiled for device, or None.

    Only what Triton before 3.7 makes for Hopper is read, which takes a tenth of a second a kernel.
    """
    if device.type != "cuda" or torch.version.hip or capability_of(device)[0] != 9:
        return None
    if triton_version() >= MENDED:
        return None
    for kernel in compiled:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            found = hazards(cuobjdump("-sass", file.name))
        if found:
            return (
                f"its machine code overwrites what a product still reads, in {len(found)} places: "
                f"install triton 3.7 or newer"
            )
    return None


def cuobjdump(*arguments: str) -> str:
    """What Triton's own cuobjdump says. Raises: OSError and CalledProcessError."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def hazards(code: str) -> list[str]:
    """The instructions of loops in machine code (SASS) that write what a WGMMA still reads."""
    lines = [(int(address, 16), text) for address, text in _LINE.findall(code)]
    found: dict[str, None] = {}
    for body in _loops(lines):
        if any(_PRODUCT.search(text) for _, text in body):
            found |= dict.fromkeys(_in(body))
    return list(found)


def _loops(lines: list[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    """The bodies of loops, each a few times over: from where a jump leads back, to the jump."""
    found = []
    for last, (address, text) in enumerate(lines):
        jump = _JUMP.search(text)
        if jump and jump[1] and int(jump[1], 16) < address:
            first = next(i for i, (at, _) in enumerate(lines) if at >= int(jump[1], 16))
            found.append(lines[first : last + 1] * _ROUNDS)
    return found


def _in(body: list[tuple[int, str]]) -> list[str]:
    found: list[str] = []
    committed: list[set[int]] = []  # by group of products, the registers that it reads
    reading: set[int] = set()
    for address, text in body:
        if product := _PRODUCT.search(text):
            if product[1]:
                first = int(product[1])
                reading |= set(range(first, first + _OPERAND))
            if "gsb0" in text:  # ends a group
                committed.append(reading)
                reading = set()
        elif wait := _WAIT.search(text):
            left = int(wait[1], 16)
            committed = committed[-left:] if left else []
        elif written := _written(text) & reading.union(*committed):
            found.append(f"{address:#06x} {text} writes {sorted(written)}")
    return found


def _written(text: str) -> set[int]:
    operation = _OPERATION.match(text)
    if operation is None or operation[1].startswith(_NO_RESULT):
        return set()
    name, first = operation[1], int(operation[2])
    count = 4 if ".128" in name or (name.startswith("LDSM") and name.endswith(".4")) else 1
    if ".64" in name or ".WIDE" in name or (name.startswith("LDSM") and name.endswith(".2")):
        count = 2
    return set(range(first, first + count))
