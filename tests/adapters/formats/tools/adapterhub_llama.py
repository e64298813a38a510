"""Run with AdapterHub's packages: trains an adapter of adapters, or computes with one.

train BASE ADAPTER LOGITS, run BASE ADAPTER LOGITS.
"""

import sys

import adapters
import torch
from adapters import LoRAConfig
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

command, base, adapter, logits = sys.argv[1:]
torch.manual_seed(0)
model = LlamaForCausalLM.from_pretrained(base)
adapters.init(model)
ids = load_file(f"{base}/ids.safetensors")["ids"].long()
if command == "run":
    name = model.load_adapter(adapter, with_head=False)
    model.set_active_adapters(name)
else:
    places = {"intermediate_lora": True, "output_lora": True, "attn_matrices": ["q", "k", "v"]}
    model.add_adapter("adapter", config=LoRAConfig(r=4, alpha=12, **places))
    model.train_adapter("adapter")
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 1e-2)
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.mT, ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_adapter(adapter, "adapter", with_head=False)
model.eval()
with torch.no_grad():
    save_file({"logits": model(ids).logits.contiguous()}, logits)
