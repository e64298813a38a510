"""Run with torchtune's packages: trains an adapter of torchtune, or computes with one.

train BASE ADAPTER LOGITS [dora], run BASE ADAPTER LOGITS [dora].
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama2 import lora_llama2
from torchtune.modules.peft import get_adapter_params, set_trainable_params

command, base, adapter, logits, *dora = sys.argv[1:]
base, adapter = Path(base), Path(adapter)
torch.manual_seed(0)
config = json.loads((base / "config.json").read_text())
heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
rank, alpha = 4, 12.0
if command == "run":
    numbers = json.loads((adapter / "adapter_config.json").read_text())
    rank, alpha = numbers["r"], numbers["lora_alpha"]
model = lora_llama2(
    ["q_proj", "k_proj", "v_proj", "output_proj"], True, True,
    vocab_size=config["vocab_size"], num_layers=config["num_hidden_layers"], num_heads=heads,
    num_kv_heads=kv_heads, embed_dim=config["hidden_size"], max_seq_len=64,
    intermediate_dim=config["intermediate_size"], norm_eps=config["rms_norm_eps"],
    lora_rank=rank, lora_alpha=alpha, use_dora=bool(dora),
)  # fmt: skip
weights = hf_to_tune(load_file(base / "model.safetensors"), heads, kv_heads, config["hidden_size"])
missing, unexpected = model.load_state_dict(weights, strict=False)
assert not unexpected
if dora:
    for module in model.modules():
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
ids = load_file(base / "ids.safetensors")["ids"].long()
if command == "run":
    state = torch.load(adapter / "adapter_model.pt", weights_only=True)
    assert set(state) == set(get_adapter_params(model))
    model.load_state_dict(state, strict=False)
else:
    set_trainable_params(model, get_adapter_params(model))
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 1e-2)
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapter.mkdir()
    state = {name: value.detach() for name, value in get_adapter_params(model).items()}
    torch.save(state, adapter / "adapter_model.pt")
    told = {"r": rank, "lora_alpha": alpha, "peft_type": "LORA", "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(told))
with torch.no_grad():
    save_file({"logits": model(ids).contiguous()}, logits)
