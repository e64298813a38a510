"""Run with MLX's packages: trains an adapter of mlx-lm, or computes with one.

train BASE ADAPTER LOGITS [dora], run BASE ADAPTER LOGITS.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

command, base, adapter, logits, *dora = sys.argv[1:]
base, adapter = Path(base), Path(adapter)
mx.random.seed(0)
config = json.loads((base / "config.json").read_text())
config |= {"rope_theta": 10000.0, "rope_scaling": None}
model = llama.Model(llama.ModelArgs.from_dict(config))
model.load_weights(str(base / "model.safetensors"))
model.freeze()
ids = mx.load(str(base / "ids.safetensors"))["ids"]
if command == "run":
    model = load_adapters(model, str(adapter))
else:
    numbers = {"rank": 4, "scale": 3.0, "dropout": 0.0}
    linear_to_lora_layers(model, 2, numbers, use_dora=bool(dora))

    def loss(model):
        return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="mean")

    optimizer, step = optim.Adam(1e-2), nn.value_and_grad(model, loss)
    for _ in range(5):
        optimizer.update(model, step(model)[1])
        mx.eval(model.parameters())
    adapter.mkdir()
    trained = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(adapter / "adapters.safetensors"), trained)
    kind = "dora" if dora else "lora"
    told = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": numbers}
    (adapter / "adapter_config.json").write_text(json.dumps(told))
model.eval()
mx.save_safetensors(logits, {"logits": model(ids)})
