"""Adapters and files as other tools have them, made by hand, and the model that they are for."""

import json
from dataclasses import replace

import torch
from safetensors.torch import save_file

from lora_kernels.adapters.formats.adapter import Adapter, AdapterLayer, BaseModule, Hints
from lora_kernels.adapters.formats.base import Base
from lora_kernels.model.targets import LayerSpec

HEADS, KV_HEADS, SIZE, WIDTH, HIDDEN, WORDS = 4, 2, 4, 16, 24, 30
CONFIG = {
    "model_type": "llama", "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "hidden_size": WIDTH, "vocab_size": WORDS,
}  # fmt: skip
BASE = Base("config.json", "llama", HEADS, KV_HEADS, SIZE)
HINTS = Hints(base=BASE)

# Path -> inputs and outputs.
LINEARS = {
    f"model.layers.{i}.{name}": sizes
    for i in (0, 1)
    for name, sizes in {
        "self_attn.q_proj": (WIDTH, HEADS * SIZE),
        "self_attn.k_proj": (WIDTH, KV_HEADS * SIZE),
        "self_attn.v_proj": (WIDTH, KV_HEADS * SIZE),
        "self_attn.o_proj": (HEADS * SIZE, WIDTH),
        "mlp.gate_proj": (WIDTH, HIDDEN),
        "mlp.up_proj": (WIDTH, HIDDEN),
        "mlp.down_proj": (HIDDEN, WIDTH),
    }.items()
}
EMBEDDING = {"model.embed_tokens": (WORDS, WIDTH)}


def adapter(
    sizes=LINEARS, r=2, alpha=6.0, *, dora=False, dtype=torch.float32, embedding=False, **spec
):
    """An Adapter with a layer for each path of sizes."""
    layers = {}
    for path, (inputs, outputs) in {**sizes, **(EMBEDDING if embedding else {})}.items():
        kind = "embedding" if path in EMBEDDING else "linear"
        a, b = torch.randn(r, inputs).to(dtype), torch.randn(outputs, r).to(dtype)
        magnitude = torch.rand(outputs).to(dtype) + 1 if dora else None
        numbers = LayerSpec(r, alpha, alpha / r, use_dora=dora, **spec)
        layers[path] = AdapterLayer(
            path, BaseModule(kind, inputs, outputs), numbers, a, b, magnitude
        )
    return Adapter(layers, {}, "none", [], sorted(layers))


def with_scaling(adapter, path, scaling):
    """adapter, with another scaling of one layer."""
    layer = adapter.layers[path]
    spec = replace(layer.spec, scaling=scaling, lora_alpha=scaling * layer.spec.r)
    return replace(adapter, layers={**adapter.layers, path: replace(layer, spec=spec)})


def with_rank(adapter, path, r):
    """adapter, with the first r rows of one layer's lora_A and as many columns of lora_B."""
    layer = adapter.layers[path]
    spec = replace(layer.spec, r=r, lora_alpha=layer.spec.scaling * r)
    smaller = replace(layer, spec=spec, lora_A=layer.lora_A[:r], lora_B=layer.lora_B[:, :r])
    return replace(adapter, layers={**adapter.layers, path: smaller})


def update(layer):
    """scaling·B·A of a layer, in float64."""
    return layer.lora_B.double() @ layer.lora_A.double() * layer.spec.scaling


def assert_same_layers(actual, expected):
    """The same layers, bit for bit."""
    assert set(actual.layers) == set(expected.layers)
    for path, layer in expected.layers.items():
        found = actual.layers[path]
        assert found.base == layer.base, path
        for name in ("r", "scaling", "lora_dropout", "splits", "use_dora"):
            assert getattr(found.spec, name) == getattr(layer.spec, name), (path, name)
        for one, other in (
            (found.lora_A, layer.lora_A), (found.lora_B, layer.lora_B),
            (found.magnitude, layer.magnitude),
        ):  # fmt: skip
            assert (one is None) == (other is None), path
            assert one is None or (one.dtype == other.dtype and torch.equal(one, other)), path


def assert_same_but_for_rounding(actual, expected):
    """The same update: lora_B, times the scaling, has been rounded once."""
    assert torch.equal(actual.lora_A, expected.lora_A)
    b, other = (layer.lora_B.double() * layer.spec.scaling for layer in (actual, expected))
    torch.testing.assert_close(b, other, rtol=torch.finfo(actual.lora_B.dtype).eps, atol=0)


def write_config(folder, config=CONFIG):
    """config.json of the base model, in a new folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def mlx(folder, tensors=None, **config):
    """A directory of mlx-lm with one linear 8 -> 6 of rank 2; its files."""
    folder.mkdir(exist_ok=True)
    if tensors is None:
        name = "model.layers.0.self_attn.q_proj"
        tensors = {f"{name}.lora_a": torch.randn(8, 2), f"{name}.lora_b": torch.randn(2, 6)}
    save_file(tensors, folder / "adapters.safetensors")
    numbers = {"rank": 2, "scale": 20.0, "dropout": 0.0}
    told = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": numbers, **config}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder
