"""The ahead-of-time gate: ``python -m tests.kernels.gate TARGET`` needs no GPU.

Every kernel, in the configurations that the tables can pick for the target, has to compile without
a spill, within the target's shared memory, with matrix instructions for every 16-bit or TF32 dot.
Prints a line per compilation and exits with 1 if one is at fault. Without --all: a representative
of each kernel.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch

from bench import standin
from lora_kernels.kernels.operands import Operands
from lora_kernels.kernels.registry import KERNELS
from lora_kernels.testing.problem import make_problem
from tests.kernels import aot


class Case(NamedTuple):
    """A layer whose kernels are compiled: where its operands lie decides about configurations."""

    dtype: torch.dtype = torch.bfloat16
    lora_dtype: torch.dtype = torch.bfloat16
    tf32: bool = False
    m: int = 8192
    aligned: bool = True
    fan_in_fan_out: bool = False
    r: int = 16
    dropout_p: float = 0.1
    merged: bool = False
    narrow: bool = False

    def __str__(self) -> str:
        short = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
        words = [short[self.dtype], f"m{self.m}", f"r{self.r}", f"p{self.dropout_p:g}"]
        if self.lora_dtype != self.dtype:
            words[0] += f"/{short[self.lora_dtype]}"
        flags = ("tf32", "fan_in_fan_out", "merged", "narrow")
        words += [name for name in flags if getattr(self, name)]
        return " ".join(words + ["unaligned"] * (not self.aligned))


# The kernels that lora_linear launches.
LINEAR = (
    "shrink", "gemm_fwd", "gemm_small_m", "expand", "expand_grad_a", "grad_b", "gemm_bwd", "grad_a",
)  # fmt: skip
REPRESENTATIVES = (
    Case(),
    Case(dropout_p=0.0, fan_in_fan_out=True),
    Case(aligned=False),
    Case(m=16, merged=True),
    Case(m=64, dropout_p=0.0),
    Case(dtype=torch.float16, lora_dtype=torch.float16),
    Case(dtype=torch.float16, lora_dtype=torch.float32, r=64),
    Case(lora_dtype=torch.float32, r=64),
    Case(lora_dtype=torch.float32),
    Case(lora_dtype=torch.float32, r=64, narrow=True),
    Case(dtype=torch.float32, lora_dtype=torch.float32, r=64),
)


def every_case() -> Iterator[Case]:
    """All that decides about a configuration, crossed; groups, which seldom do, once a rank."""
    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    dtypes = [(bf16, bf16, False), (f16, f16, False), (f32, f32, False), (f32, f32, True)]
    dtypes += [(bf16, f32, False), (bf16, f32, True), (f16, f32, False)]
    # Rows, and whether descriptors fit.
    lying = [(8192, True), (8192, False), (64, True), (16, True)]
    ranks = [16, 64, 256]
    for (dtype, lora_dtype, tf32), r in itertools.product(dtypes, ranks):
        yield Case(dtype, lora_dtype, tf32, r=r, merged=True)
        for (m, aligned), transposed, p in itertools.product(lying, [False, True], [0.1, 0.0]):
            if dtype != f32 or aligned:
                yield Case(dtype, lora_dtype, tf32, m, aligned, transposed, r, p)


def operands(case: Case, layers: int = 1) -> Operands:
    """Operands of this case that take no memory."""
    k = 4096 if case.aligned else 4095
    groups = [(2048, True), (1024, False), (1024, True)] if case.merged else None
    problem = make_problem(
        case.m, k, 4096, case.r, device="meta", dtype=case.dtype, lora_dtype=case.lora_dtype,
        dropout_p=case.dropout_p, groups=groups,
    )  # fmt: skip
    if case.fan_in_fan_out:
        problem.w = problem.w.new_empty(k, 4096).T
    problem.spec = dataclasses.replace(problem.spec, narrow=case.narrow)
    return Operands(problem, layers)


def compile_layer(case: Case, kernels: Collection[str] = KERNELS) -> None:
    """Launches all launchers of the kernels on operands of this case, shared by layers too."""
    torch.backends.cuda.matmul.allow_tf32 = case.tf32
    o, shared = operands(case), operands(case._replace(merged=False), layers=3)
    for launcher in itertools.chain(*(KERNELS[name].launchers for name in kernels)):
        if launcher.supports(o):
            launcher(o)
        if launcher.layers and case.merged:
            launcher(shared)


def run(
    target: str,
    cases: tuple[Case, ...],
    kernels: Collection[str] = KERNELS,
    write: Callable[[str], None] = print,
    launch: bool = False,
) -> int:
    """Compiles the cases, writes the table, and returns the number of faults.

    launch: what is compiled is launched, too, over a stand-in for NVIDIA's driver, which checks
    grids, shared memory and tensor maps.
    """
    seen: dict[str, set] = {name: set() for name in KERNELS}
    count = faults = 0
    write(f"{target:8} {'kernel':18} {'registers':>9} {'shared':>7} {'spills':>6} {'matrix':>6}")
    with aot.compiling_for(target), standin.running_on(target) if launch else nullcontext():
        for case in cases:
            try:
                compile_layer(case, kernels)
            except Exception as error:
                faults += 1
                write(f"{target:8} {case}: {type(error).__name__}: {error}  <-- does not compile")
            for name, kernel in KERNELS.items():
                for report in aot.reports(kernel.function, seen[name]):
                    count += 1
                    found = report.faults(target)
                    faults += bool(found)
                    write(
                        f"{target:8} {name:18} {report.registers:9} "
                        f"{report.shared:7} {report.spills:6} {report.matrix_instructions:6}  "
                        f"{case}" + ("  <-- " + ", ".join(found) if found else "")
                    )
    write(f"{target:8} {count} compilations, {faults} faults")
    return faults


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=aot.TARGETS)
    parser.add_argument("--all", action="store_true")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    chosen.add_argument(
        "--linear", action="store_const", const=LINEAR, dest="kernels", help="those of lora_linear"
    )
    parser.add_argument("--launch", action="store_true", help="over the stand-in driver as well")
    options = parser.parse_args(arguments)
    launch, reason = options.launch and options.target.startswith("sm_"), standin.why_not()
    if launch and reason is not None:
        print(f"{options.target:8} nothing is launched: {reason}")
    cases = tuple(every_case()) if options.all else REPRESENTATIVES
    launch = launch and reason is None
    return min(run(options.target, cases, options.kernels, launch=launch), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
