"""Run with diffusers: a tiny UNet, saved with an adapter of PEFT's options, or computing with one.

train FOLDER [OPTIONS AS JSON]: FOLDER becomes base/, theirs/ and y.safetensors.
run FOLDER ADAPTER Y: Y is what base/ computes with the adapter that diffusers reads.
peft FOLDER ADAPTER Y: the same, with PEFT's directory ADAPTER.
"""

import json
import sys

import peft
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

command, folder, *rest = sys.argv[1:]
torch.manual_seed(0)
x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)
if command == "train":
    blocks = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, down_block_types=blocks[0],
        up_block_types=blocks[1], cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    model.save_pretrained(f"{folder}/base")
    model.add_adapter(peft.LoraConfig(**json.loads(rest[0])))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.add_(torch.randn_like(value) * 0.1)
    model.save_lora_adapter(f"{folder}/theirs")
    y = f"{folder}/y.safetensors"
else:
    model = UNet2DConditionModel.from_pretrained(f"{folder}/base")
    adapter, y = rest
    if command == "peft":
        model = peft.PeftModel.from_pretrained(model, adapter)
    else:
        name = "pytorch_lora_weights.safetensors"
        model.load_lora_adapter(adapter, prefix=None, weight_name=name, use_safetensors=True)
with torch.no_grad():
    save_file({"y": model.eval()(x, 3, context).sample.contiguous()}, y)
