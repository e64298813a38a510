"""Run with litgpt's packages: trains an adapter of litgpt, or computes with one.

train BASE ADAPTER LOGITS, run BASE ADAPTER LOGITS.
"""

import json
import sys
from pathlib import Path

import torch
from litgpt.lora import GPT, Config, lora_filter, mark_only_lora_as_trainable
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from safetensors.torch import load_file, save_file

command, base, adapter, logits = sys.argv[1:]
base, adapter = Path(base), Path(adapter)
torch.manual_seed(0)
config = json.loads((base / "config.json").read_text())
numbers = {
    "lora_r": 4, "lora_alpha": 12, "lora_dropout": 0.0, "lora_query": True, "lora_key": False,
    "lora_value": True, "lora_projection": True, "lora_mlp": True, "lora_head": True,
}  # fmt: skip
if command == "run":
    lines = (adapter / "hyperparameters.yaml").read_text().splitlines()
    told = dict(line.split(": ") for line in lines)
    numbers = {name: json.loads(told[name]) for name in numbers}
config = Config(
    n_layer=config["num_hidden_layers"], n_head=config["num_attention_heads"],
    n_query_groups=config["num_key_value_heads"], n_embd=config["hidden_size"],
    intermediate_size=config["intermediate_size"], norm_eps=config["rms_norm_eps"],
    vocab_size=config["vocab_size"], padded_vocab_size=config["vocab_size"], block_size=64,
    rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
    mlp_class_name="LLaMAMLP", **numbers,
)  # fmt: skip
model = GPT(config)
weights = {}
copy_weights_hf_llama(config, {}, weights, load_file(base / "model.safetensors"))
model.load_state_dict(weights, strict=False)
mark_only_lora_as_trainable(model)
ids = load_file(base / "ids.safetensors")["ids"].long()
if command == "run":
    state = torch.load(adapter / "lit_model.pth.lora", weights_only=True)["model"]
    assert set(state) == {name for name, value in model.state_dict().items() if "lora_" in name}
    model.load_state_dict(state, strict=False)
else:
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 1e-2)
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapter.mkdir()
    state = {k: v for k, v in model.state_dict().items() if lora_filter(k, v)}
    torch.save({"model": state}, adapter / "lit_model.pth.lora")
    text = "".join(f"{name}: {str(value).lower()}\n" for name, value in numbers.items())
    (adapter / "hyperparameters.yaml").write_text(text)
model.eval()
with torch.no_grad():
    save_file({"logits": model(ids).contiguous()}, logits)
