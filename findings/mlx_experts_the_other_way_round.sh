#!/usr/bin/env bash
# mlx 0.32.4 (CPU), mlx-lm 0.32.2: factors of LoRA in MLX's adapters.safetensors.
#
# Behaviour: a linear has lora_a [in, r] and lora_b [r, out], and an embedding lora_a [num, r] and
# lora_b [r, dim]: all transposed against PEFT. The experts of a mixture (LoRASwitchLinear), in the
# same file under the same names, are not: lora_a [E, r, in] and lora_b [E, out, r]. A converter that
# transposes the last two dimensions of every lora_a is wrong for experts, and if r, in and out agree,
# no shape tells. The scale multiplies the update as it is: there is no alpha, and no division by r.
#
# Seen: shapes (64, 4) and (4, 32) of a linear 64 -> 32 of rank 4, (8, 4, 64) and (8, 32, 4) of eight
# experts; the formulas with these shapes give the layers' outputs to 1e-5.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "mlx[cpu]==0.32.4" mlx-lm==0.32.2
cat > "$folder/find.py" <<'PY'
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

mx.random.seed(0)
linear, experts = nn.Linear(64, 32, bias=False), SwitchLinear(64, 32, 8, bias=False)
one = LoRALinear.from_base(linear, r=4, scale=3.0)
many = LoRASwitchLinear.from_base(experts, r=4, scale=3.0)
one.lora_b, many.lora_b = mx.random.normal((4, 32)), mx.random.normal((8, 32, 4))
print("linear:", one.lora_a.shape, one.lora_b.shape)
print("experts:", many.lora_a.shape, many.lora_b.shape)
assert (one.lora_a.shape, one.lora_b.shape) == ((64, 4), (4, 32))
assert (many.lora_a.shape, many.lora_b.shape) == ((8, 4, 64), (8, 32, 4))
x = mx.random.normal((5, 64))
y = x @ linear.weight.T + 3.0 * (x @ one.lora_a) @ one.lora_b
assert mx.abs(one(x) - y).max() < 1e-4
index = mx.array([[2], [5], [0], [7], [2]])
weight = experts.weight + 3.0 * many.lora_b @ many.lora_a  # [E, out, in]
y = (weight[index[:, 0]] @ x[..., None])[..., 0]
assert mx.abs(many(x[:, None, None, :], index).reshape(5, 32) - y).max() < 1e-4
print("both formulas hold")
PY
"$folder/venv/bin/python" "$folder/find.py"
