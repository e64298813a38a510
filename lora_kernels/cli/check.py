"""lora-kernels check: every kernel on this machine's GPU, against float64."""

import argparse
import json

from lora_kernels.checks import dtype_name
from lora_kernels.cli.errors import UsageError, of_gpu
from lora_kernels.dispatch import cache
from lora_kernels.tuning import check as checks
from lora_kernels.tuning import machine

__all__ = ["main"]

_NOT_REACHED = 3  # 2 is a wrong argument's


def main(options: argparse.Namespace) -> int:
    """Prints what is right and what is not: 0 if all is right; 1 if something is wrong; 3 if
    nothing is, as far as there was time.

    Raises: UsageError if there is neither a GPU that answers nor the interpreter.
    """
    with of_gpu("check"):
        device = machine.device_of_kernels()
        if device is None:
            raise UsageError(f"check: {machine.NO_KERNELS}")
        its = cache.machine(device)
        checked = checks.check(device.type, options.kernels, options.jobs, options.seconds)
    if options.json:
        print(json.dumps({"machine": its, "checked": [_as_json(each) for each in checked]}))
    else:
        print(f"{its['gpu']}, torch {its['torch']}, triton {its['triton']}: each kernel twice, "
              "against float64", checks.as_text(checked), sep="\n")  # fmt: skip
    if checks.wrong(checked):
        return 1
    return _NOT_REACHED if checks.not_reached(checked) else 0


def _as_json(each: checks.Checked) -> dict:
    fields = each.variant._asdict()
    dtypes = {name: dtype_name(fields[name]) for name in ("dtype", "lora_dtype")}
    return {**fields, **dtypes, "reason": each.reason}
