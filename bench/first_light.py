"""``python -m bench.first_light``: all that a GPU is asked the first time, in ten minutes.

Every part runs in processes of its own and is ended by its own clock. What it prints and finds is
written as it goes, so that an end at any moment leaves what there is until then:

* check: every kernel in every dtype against float64, twice;
* tests: the test suite, as far as it gets;
* speed: the frozen layer, both algorithms, PEFT and loralib at 4096x4096, with factors in bfloat16
  and in float32;
* tune: algorithms and tiles of Llama-3-8B's layers;
* sanitize: NVIDIA's compute-sanitizer over a small case of each kernel.

--dry-run does the same in little on a CPU, in Triton's interpreter.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_kernels.tuning import machine
from lora_kernels.tuning.options import listed

__all__ = ["PARTS", "Part", "main", "run"]

PYTHON = sys.executable
REPOSITORY = Path(__file__).parents[1]
CUT, SKIPPED = "cut by its clock", "skipped"
_GRACE = 5  # seconds to write what there is


@dataclass(frozen=True)
class Part:
    """A part: commands that share its seconds. {out} stands for the folder of results.

    tiny: what a dry run does instead. needs: a program that has to be there.
    """

    name: str
    seconds: float
    commands: tuple[tuple[str, ...], ...]
    tiny: tuple[tuple[str, ...], ...]
    needs: str | None = None


def _bench(*options: str) -> tuple[str, ...]:
    return (
        PYTHON, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", *options,
    )  # fmt: skip


_SPEED = (
    "--shapes=square", "-k=4096x4096", "--tokens=8192", "--ranks=16", "--dropout=0.1",
    "--mode=forward,backward", "--execution=graph,eager", "--bench-seconds=2",
    "--peers=loralib,peft,lora_kernels[fused],lora_kernels[addmm]",
)  # fmt: skip
_TINY_SPEED = ("--tokens=16", "-k=768x768", "--bench-seconds=0.01", "--peers=loralib")
_SANITIZE = """
import sys, torch
from lora_kernels.kernels.registry import LAUNCHERS
from lora_kernels.kernels.selfcheck import Variant, fault, key_of
device = torch.device(sys.argv[1])
wrong = 0
for name in list(LAUNCHERS)[: int(sys.argv[2])]:
    variant = Variant(name, small_m=16 * name.startswith("gemm_small_m"), r=8)
    variant = variant._replace(dtype=torch.float16, lora_dtype=torch.float16)
    reason = fault(variant, device) if key_of(variant, device) else "not taken"
    wrong += reason is not None
    print(name, reason or "right", flush=True)
sys.exit(bool(wrong))
"""
_XDIST = ("-n", str(min(12, os.cpu_count() or 1)), "--dist", "loadfile")
_CHECK = (PYTHON, "-m", "lora_kernels", "check", "--json")
_TUNE = (PYTHON, "-m", "lora_kernels", "tune")
_TESTS = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider")

PARTS = (
    Part(
        "check",
        60,
        ((*_CHECK, "--seconds=50"),),
        ((*_CHECK, "--kernels=shrink,expand_y", "--jobs=1"),),
    ),
    Part("tests", 150, ((*_TESTS, "tests", *_XDIST),), ((*_TESTS, "tests/test_spec.py"),)),
    Part(
        "speed",
        120,
        (
            _bench(*_SPEED, "--bench-results={out}/speed.json"),
            _bench(*_SPEED, "--factors=float32", "--bench-results={out}/speed-float32.json"),
        ),
        (
            _bench(*_TINY_SPEED, "--bench-results={out}/speed.json"),
            _bench(*_TINY_SPEED, "--factors=float32", "--bench-results={out}/speed-float32.json"),
        ),
    ),
    Part(
        "tune",
        150,
        ((*_TUNE, "--shapes=llama3-8b", "--tokens=512,8192", "--minutes=2"), (*_TUNE, "--show")),
        ((*_TUNE, "--minutes=0.01", "--jobs=1", "--dropout=0"), (*_TUNE, "--show")),
    ),
    Part(
        "sanitize",
        90,
        tuple(
            ("compute-sanitizer", "--tool", tool, "--error-exitcode=9", PYTHON, "-c", _SANITIZE,
             "cuda", "99")
            for tool in ("memcheck", "racecheck")
        ),
        ((PYTHON, "-c", _SANITIZE, "cpu", "2"),),
        needs="compute-sanitizer",
    ),
)  # fmt: skip


def run(
    parts: Sequence[Part], out: Path, dry: bool, write: Callable[[str], None] = print
) -> list[dict]:
    """Runs the parts one after the other; returns what summary.json says of each.

    Each command's output goes to a file of its own in out.
    """
    out.mkdir(parents=True, exist_ok=True)
    on = None if dry else machine.device_of_kernels()
    summary = {"machine": machine.describe(on.type if on else "cpu"), "parts": []}
    environment = {**os.environ, "LORA_KERNELS_CACHE": str(out / "cache")}
    if dry:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for part in parts:
        end = time.monotonic() + part.seconds
        for number, command in enumerate(part.tiny if dry else part.commands):
            log = out / f"{part.name}-{number}.log"
            command = [word.replace("{out}", str(out)) for word in command]
            start = time.monotonic()
            if part.needs and not dry and shutil.which(part.needs) is None:
                ended = f"{SKIPPED}: there is no {part.needs}"
            else:
                ended = _ended(command, log, end - start, environment)
            seconds = round(time.monotonic() - start, 1)
            row = {"part": part.name, "command": command, "ended": ended, "seconds": seconds}
            summary["parts"].append({**row, "log": log.name})
            (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
            write(f"{part.name:9} {seconds:6.1f} s  {ended}  {log}")
    return summary["parts"]


def _ended(command: Sequence[str], log: Path, seconds: float, environment: dict) -> str | int:
    """The exit code of a command; CUT if its time was over first."""
    if seconds <= 0:
        return CUT
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=REPOSITORY, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
            return CUT
        finally:  # what it has started would run on beside the next part
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every command of every part ended with 0, was cut or was skipped; else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.first_light",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--only", type=listed(str, names), default=names, metavar="LIST")
    parser.add_argument("--dry-run", action="store_true", help="in little, on a CPU")
    options = parser.parse_args(arguments)
    if not options.dry_run and machine.device_of_kernels() is None:
        parser.error(machine.NO_KERNELS + ", as by --dry-run")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running part ends, too
    chosen = [part for part in PARTS if part.name in options.only]
    parts = run(chosen, options.output.resolve(), options.dry_run)
    return int(any(row["ended"] not in (0, CUT) and isinstance(row["ended"], int) for row in parts))


if __name__ == "__main__":
    sys.exit(main())
