#!/usr/bin/env bash
# bitsandbytes 0.50.2, torch 2.13.0 (CPU with AVX512), Linear4bit.
#
# Behaviour: a 4-bit weight is quantised in blocks of 64 numbers that run over the rows one after the
# other, so if in_features is no multiple of 64, a block lies in two rows. The CPU's dequantisation for
# AVX512 takes the scale of block number row * (in_features / 64), in whole numbers, if in_features is a
# multiple of 16, and so the scales of other rows: the weight and every output are wrong, without an
# error. For other widths (72, 88, ...) a slower path is right. Only the CPU is affected.
#
# Seen, relative error of the dense weight against the one that was quantised, NF4:
#   in_features 48: 0.68, 96: 0.64; 64: 0.09, 72: 0.10, 128: 0.09
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 bitsandbytes==0.50.2
cat > "$folder/find.py" <<'PY'
import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit

if not torch.cpu.get_capabilities().get("avx512_f"):
    raise SystemExit("this CPU has no AVX512, so it takes another path")


def error(columns):
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(columns, 64, bias=False, quant_type="nf4")
    w = torch.randn(64, columns) * torch.rand(64, 1).add(0.1)  # rows of unlike size, as in models
    layer.weight = bnb.nn.Params4bit(w.clone(), requires_grad=False, quant_type="nf4", module=layer)
    layer.to("cpu")
    dense = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    x = torch.randn(8, columns)
    assert torch.allclose(layer(x), x @ dense.T, atol=1e-4)  # the layer multiplies by the same
    return ((dense - w).norm() / w.norm()).item()


for columns, wrong in ((48, True), (96, True), (64, False), (72, False), (128, False)):
    found = error(columns)
    print(f"in_features {columns}: relative error {found:.2f}")
    assert found > 0.2 if wrong else found < 0.12
PY
"$folder/venv/bin/python" "$folder/find.py"
