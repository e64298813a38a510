#!/usr/bin/env bash
# bitsandbytes 0.50.2, torch 2.13.0 (CPU), Linear4bit.
#
# Behaviour: on a CPU with AVX512-BF16, the first forward in eval mode packs the 4-bit weight anew, in
# place, for a kernel. The weight and its quant_state stay where they were and look as usual, but
# bitsandbytes' own dequantize_4bit(), which PEFT merges by, does not know the packed order: it returns
# a matrix of the right shape with wrong numbers, and no error. state_dict() unpacks in place, and what
# comes back is another weight: without double quantisation the scales stay transposed, so each belongs
# to another block; with it they are quantised a second time. A layer that has been evaluated once and
# is then saved or merged holds other weights than before.
# Packing is called by hand here, as that forward calls it, so that any CPU shows it.
#
# Seen, relative to the weight before: dequantize_4bit() after packing 1.44, with and without double
# quantisation; the weight after state_dict() 0.44 without it and 0.0028 with it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 bitsandbytes==0.50.2
cat > "$folder/find.py" <<'PY'
import bitsandbytes as bnb
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu as pack
from bitsandbytes.functional import dequantize_4bit


def layer(nested):
    torch.manual_seed(0)
    made = bnb.nn.Linear4bit(256, 128, bias=False, compress_statistics=nested, quant_type="nf4")
    rows = torch.randn(128, 256) * torch.rand(128, 1).exp()  # rows of unlike size, as in models
    made.weight = bnb.nn.Params4bit(
        rows.bfloat16(), requires_grad=False, compress_statistics=nested, quant_type="nf4",
        module=made,
    )
    return made.to("cpu")


def dense(made):
    return dequantize_4bit(made.weight.data, made.weight.quant_state).float()


def off(tensor, of):
    return ((tensor - of).norm() / of.norm()).item()


for nested in (False, True):
    made = layer(nested)
    before = dense(made)
    made.weight.data, made.weight.quant_state = pack(made.weight.data, made.weight.quant_state)
    made.quant_state = made.weight.quant_state
    packed = off(dense(made), before)
    made.state_dict()
    saved = off(dense(made), before)
    print(f"double quantisation {nested}: packed {packed:.4f}, after state_dict() {saved:.4f}")
    assert packed > 1
    assert (0.0005 < saved < 0.02) if nested else saved > 0.1
PY
"$folder/venv/bin/python" "$folder/find.py"
