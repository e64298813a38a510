"""Runs every check of this folder on the ranks of a torchrun; writes what they found.

python -m torch.distributed.run --nproc-per-node 2 -m lora_kernels run \
    -m tests.distributed.worker RESULTS.json
"""

import datetime
import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed import (
    dora_checks,
    example_checks,
    experts_checks,
    multi_checks,
    own_checks,
    peft_checks,
)

CHECKS = {
    **own_checks.CHECKS,
    **dora_checks.CHECKS,
    **experts_checks.CHECKS,
    **multi_checks.CHECKS,
    **peft_checks.CHECKS,
    **example_checks.CHECKS,
}


def outcome(check, directory: Path) -> str:
    """ "passed", or the traceback of what a check raised."""
    torch.manual_seed(0)
    try:
        check(directory)
    except Exception:
        return traceback.format_exc()
    return "passed"


def main(results: Path) -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    torch.set_num_threads(1)
    found = {}
    for name, check in CHECKS.items():
        directory = results.parent / str(len(found))
        directory.mkdir(exist_ok=True)
        found[name] = [""] * dist.get_world_size()
        dist.all_gather_object(found[name], outcome(check, directory))
    if dist.get_rank() == 0:
        results.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
