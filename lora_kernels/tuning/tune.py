"""``python -m lora_kernels.tuning.tune``: the best configuration of each kernel, and its table's.

Every candidate is compiled and launched in processes of their own, checked against float64 by the
one rule of the tests, and timed, all of a shape interleaved. What is best over the shapes of an
entry of a table is timed once more, against that entry alone. Without a GPU it runs in Triton's
interpreter (TRITON_INTERPRET=1), where times mean nothing.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_kernels.kernels.registry import LAUNCHERS
from lora_kernels.tuning import cases, machine, rows, shapes, workers
from lora_kernels.tuning.options import count, duration, listed, probability
from lora_kernels.tuning.shapes import Layer, Shape
from lora_kernels.tuning.verdicts import Verdict, confirm

__all__ = ["main"]


@dataclass(frozen=True)
class Defaults:
    """What is tuned on a device unless asked otherwise."""

    layers: tuple[Layer, ...]
    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    seconds: float
    limit: int | None


DEFAULTS = {
    "cuda": Defaults(shapes.LLAMA_3_8B, (8192,), (16,), seconds=1.0, limit=None),
    "cpu": Defaults((Layer(48, 40),), (32,), (4,), seconds=0.0, limit=3),
}
DROPOUT = (0.1,)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what each table is to say; 1 if of some entry nothing ran at all its shapes."""
    parser = _parser()
    options = parser.parse_args(arguments)
    found_on = machine.device_of_kernels()
    if found_on is None:
        parser.error(machine.NO_KERNELS)
    device = found_on.type
    default = DEFAULTS[device]
    seconds = default.seconds if options.seconds is None else options.seconds
    found = cases.cases(options.kernels, _shapes(device, options), options.limit or default.limit)
    if not found:
        parser.error(f"{', '.join(options.kernels)} take none of these shapes")

    start = time.perf_counter()
    count_of_all = sum(len(case.configs) for case in found)
    jobs = options.jobs or workers.most_jobs()
    print(f"{count_of_all} launches in {jobs} processes", flush=True)
    failed = cases.try_out(found, jobs)
    print(f"{sum(map(len, failed.values()))} fail, {time.perf_counter() - start:.0f} s", flush=True)

    environment, complete = machine.describe(device), True
    kept: list[dict] = []
    verdicts: list[Verdict] = []

    def keep(measured: Sequence[Mapping]) -> None:
        kept.extend({**environment, **row} for row in measured)
        if options.output:  # after each case: what is measured stays, whatever comes
            rows.save(kept, options.output)

    for group in cases.by_entry(found):
        samples = []
        for case in group:
            measured, times = cases.measure(case, case.configs, failed[case], seconds)
            keep(measured)
            print(cases.report(case, measured, case.configs), flush=True)
            samples.append(times)
        measured, verdict = confirm(group, samples, seconds)
        keep(measured)
        if verdict:
            verdicts.append(verdict)
        else:
            complete = False
            print(f"{group[0].entry}: nothing was timed at all shapes")
    print(f"\ntables that are beaten: {sum(verdict.faster for verdict in verdicts)}")
    for verdict in sorted(verdicts, key=lambda verdict: not verdict.faster):
        print(verdict)
    print(f"{time.perf_counter() - start:.0f} s")
    return 0 if complete else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lora_kernels.tuning.tune",
        description=__doc__.partition("\n\n")[0],
        epilog="Lists are comma-separated.",
    )
    lists = {
        "--kernels": (listed(str, LAUNCHERS), list(LAUNCHERS), f"of {', '.join(LAUNCHERS)}"),
        "--shapes": (
            listed(str, shapes.SETS),
            [],
            f"sets of layers, of {', '.join(shapes.SETS)}; merged ones are left out",
        ),
        "--tokens": (listed(count), [], "numbers of tokens M"),
        "--ranks": (listed(count), [], "ranks r"),
        "--dropout": (listed(probability), DROPOUT, "dropout probabilities p"),
    }
    for name, (kind, default, text) in lists.items():
        parser.add_argument(name, type=kind, default=default, metavar="LIST", help=text)
    parser.add_argument("--limit", type=count, metavar="N", help="most candidates of a shape")
    parser.add_argument(
        "--seconds", type=duration, metavar="S", help="time to spend on a kernel at a shape"
    )
    parser.add_argument(
        "--jobs",
        type=count,
        metavar="N",
        help="processes that compile; 1 is this one, which does not survive a candidate that dies",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to write the rows")
    return parser


def _shapes(device: str, options: argparse.Namespace) -> list[Shape]:
    default = DEFAULTS[device]
    layers = [layer for name in options.shapes for layer in shapes.SETS[name]] or default.layers
    chosen = itertools.product(
        [layer for layer in layers if len(layer.enable_lora) == 1],
        options.tokens or default.tokens,
        options.ranks or default.ranks,
        options.dropout,
    )
    return [
        Shape(m, layer.k, layer.n, r, p, dtype=shapes.DTYPES[device], device=device)
        for layer, m, r, p in chosen
    ]


if __name__ == "__main__":
    sys.exit(main())
