"""Run with LyCORIS: trains a LoRA of LyCORIS over a Llama, or computes with one.

train BASE ADAPTER LOGITS [dora], run BASE ADAPTER LOGITS.
"""

import sys
from pathlib import Path

import torch
from lycoris import create_lycoris, create_lycoris_from_weights
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

command, base, adapter, logits, *dora = sys.argv[1:]
torch.manual_seed(0)
model = LlamaForCausalLM.from_pretrained(base).eval()
ids = load_file(f"{base}/ids.safetensors")["ids"].long()
file = Path(adapter, "lora.safetensors")
if command == "run":
    network, _ = create_lycoris_from_weights(1.0, str(file), model)
    assert len(network.loras) * 3 <= len(load_file(file))
    network.apply_to()
    loaded = network.load_state_dict(load_file(file), strict=False)
    assert not loaded.unexpected_keys
else:
    network = create_lycoris(
        model, 1.0, linear_dim=4, linear_alpha=6.0, algo="locon", dora_wd=bool(dora), rs_lora=True
    )
    network.apply_to()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.mT, ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    file.parent.mkdir()
    network.save_weights(str(file), None, None)
with torch.no_grad():
    save_file({"logits": model(ids).logits.contiguous()}, logits)
