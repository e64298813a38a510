#!/usr/bin/env bash
# convert_lora_to_gguf.py of the llama.cpp in llama-cpp-python 0.3.36, gguf 0.19.0, peft 0.21.2.
#
# Behaviour: llama.cpp's converter of PEFT's adapters reads lora_alpha from adapter_config.json and
# nothing else of its numbers. llama.cpp divides it by the rank of each layer. So with use_rslora, where
# PEFT divides by the root of the rank, and with alpha_pattern, the GGUF holds another scaling than was
# trained: no error, no warning, and nothing in the file tells. rank_pattern is right.
#
# Seen: lora_alpha 16, r 4. PEFT's scaling with use_rslora is 8, the GGUF's 4. With alpha_pattern 32 for
# v_proj PEFT's is 8 there, the GGUF's 4. All three files are the same bit for bit.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 peft==0.21.2 transformers==5.23.0 gguf==0.19.0 \
    numpy==2.3.5 sentencepiece
"$folder/venv/bin/pip" download --quiet --no-deps --no-binary llama-cpp-python --dest "$folder" \
    llama-cpp-python==0.3.36
tar -xzf "$folder"/llama_cpp_python-0.3.36.tar.gz -C "$folder"
cat > "$folder/find.py" <<'PY'
import hashlib
import subprocess
import sys
from pathlib import Path

import peft
import torch
from gguf import GGUFReader
from transformers import LlamaConfig, LlamaForCausalLM

folder = Path(sys.argv[1])
(script,) = folder.glob("*/vendor/llama.cpp/convert_lora_to_gguf.py")
heads = dict(num_attention_heads=4, num_key_value_heads=2)
config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=64, **heads)
config.architectures = ["LlamaForCausalLM"]
config.save_pretrained(folder / "base")
found = {}
for name, options in {
    "plain": {}, "use_rslora": {"use_rslora": True}, "alpha_pattern": {"alpha_pattern": {"v_proj": 32}}
}.items():
    torch.manual_seed(0)
    options |= dict(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(LlamaForCausalLM(config), peft.LoraConfig(**options))
    scaling = model.base_model.model.model.layers[0].self_attn.v_proj.scaling["default"]
    model.save_pretrained(folder / name)
    command = [sys.executable, script, folder / name, "--base", folder / "base"]
    done = subprocess.run([*command, "--outfile", folder / f"{name}.gguf"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARN" not in done.stderr + done.stdout
    reader = GGUFReader(folder / f"{name}.gguf")
    alpha = reader.fields["adapter.lora.alpha"].contents()
    data = b"".join(tensor.data.tobytes() for tensor in reader.tensors)
    found[name] = scaling, alpha / 4, hashlib.sha256(data).hexdigest()
    print(f"{name}: scaling of v_proj in PEFT {scaling:g}, in llama.cpp {alpha / 4:g}")
assert {name: numbers[:2] for name, numbers in found.items()} == {
    "plain": (4, 4), "use_rslora": (8, 4), "alpha_pattern": (8, 4)
}
assert len({digest for *_, digest in found.values()}) == 1
PY
"$folder/venv/bin/python" "$folder/find.py" "$folder"
