#!/usr/bin/env bash
# torchtune 0.6.1, peft 0.21.2, torch 2.13.0: torchtune's export of DoRA adapters for PEFT.
#
# Behaviour: torchtune keeps the rows of q_proj and k_proj in another order than Hugging Face, because
# its rotary embedding turns neighbouring rows. tune_to_peft_adapter_weights, which its recipes call
# when they save, puts the rows of lora_B into Hugging Face's order, but not those of DoRA's magnitude,
# which belong to the same outputs. PEFT loads the file without a word, and scales each row of q and k
# by the magnitude of another row. v_proj and the MLP are right. The file adapter_model.pt beside it,
# in torchtune's own names, is right, too.
#
# Seen, for 4 heads of 8: 24 of 32 magnitudes of q_proj belong to another row than lora_B's; with
# magnitudes between 0.5 and 1.5 the effective weight is off by about 40 %.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 torchao==0.16.0 torchtune==0.6.1 numpy==2.3.5
cat > "$folder/find.py" <<'PY'
import torch
from torchtune.models.convert_weights import tune_to_peft_adapter_weights

HEADS, SIZE, R = 4, 8, 2
rows = torch.arange(HEADS * SIZE).float()  # each row of q_proj says where torchtune has it
name = "layers.0.attn.{}.{}"
state = {}
for layer in ("q_proj", "v_proj"):
    state |= {
        name.format(layer, "lora_a.weight"): torch.randn(R, HEADS * SIZE),
        name.format(layer, "lora_b.weight"): rows[:, None].repeat(1, R),
        name.format(layer, "magnitude"): rows.clone(),
    }
out = tune_to_peft_adapter_weights(state, num_heads=HEADS, num_kv_heads=HEADS, dim=HEADS * SIZE)
for layer, expected in (("q_proj", 24), ("v_proj", 0)):
    front = f"base_model.model.model.layers.0.self_attn.{layer}"
    b = out[f"{front}.lora_B.weight"][:, 0]
    magnitude = out[f"{front}.lora_magnitude_vector"]
    wrong = int((b != magnitude).sum())
    print(f"{layer}: {wrong} of {len(b)} magnitudes belong to another row than lora_B's")
    assert wrong == expected
w, m = torch.randn(HEADS * SIZE, HEADS * SIZE), torch.rand(HEADS * SIZE) + 0.5
order = out["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][:, 0].long()
unit = w / w.norm(dim=1, keepdim=True)
right, made = m[order][:, None] * unit, m[:, None] * unit
error = ((made - right).norm() / right.norm()).item()
print(f"effective weight of q_proj off by {error:.0%}")
assert error > 0.2
PY
"$folder/venv/bin/python" "$folder/find.py"
