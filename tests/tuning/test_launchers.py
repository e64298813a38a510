"""What the launchers take, and what their tables have for it."""

import dataclasses

import pytest
import torch

from lora_kernels.tuning import launchers
from lora_kernels.tuning.launchers import LAUNCHERS, Gemm, Skinny
from lora_kernels.tuning.shapes import Shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = Shape(80, 48, 40, 3, 0.25, dtype=torch.float16, device=DEVICE)


@pytest.mark.parametrize("m", [16, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAUNCHERS)
def test_table_entry_is_what_the_launcher_takes(name, dtype, m, monkeypatch):
    launcher = LAUNCHERS[name]
    shapes = [(16, 32), (32, 16), (32, 32), (64, 32), (32, 64), (64, 64)]
    if launcher.dots:
        entries = {e: Skinny(*shapes[i], 4, 1) for i, e in enumerate(("narrow", "wide"))}
    else:
        names = ("float32", "few_rows", "pointer", "tma", "up_to_16", "up_to_64")
        entries = {e: Gemm(*shapes[i], 16, 4, 1) for i, e in enumerate(names)}
    o = launchers.operands(dataclasses.replace(SHAPE, m=m, dtype=dtype))
    target = launchers.target_of(o.x.device)
    monkeypatch.setitem(launcher.module.CONFIGS, target, entries)
    launched = []
    monkeypatch.setattr(launcher.module, "launch", lambda *args, **meta: launched.append(meta))
    launchers.run(name, o, None)

    entry, config = launchers.table_entry(name, o)
    assert entries[entry] == config
    blocks = [v for what, v in launched[0].items() if what in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
    assert blocks == [v for what, v in vars(config).items() if what.startswith("BLOCK_")]
