"""What is known of a base model: by its config, its weights, or the model itself."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_kernels.adapters.formats.base import UNKNOWN, Base
from tests.adapters.formats import made


def written(folder, **config):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "q", "k"),
    [
        ({"num_attention_heads": 4, "hidden_size": 32}, (4, 8), (4, 8)),
        ({"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}, (4, 8), (2, 8)),
        ({"num_attention_heads": 4, "hidden_size": 32, "head_dim": 16}, (4, 16), (4, 16)),
        ({"text_config": {"num_attention_heads": 2, "head_dim": 6}, "head_dim": 1}, (2, 6), (2, 6)),
        ({"num_attention_heads": 4}, None, None),
        ({}, None, None),
    ],
)
def test_heads_are_those_of_the_config(tmp_path, config, q, k):
    base = Base.read(written(tmp_path, **config))
    assert (base.heads_of("q_proj"), base.heads_of("k_proj")) == (q, k)
    assert base == Base.read(tmp_path / "config.json")


def test_paths_are_those_of_the_weights(tmp_path):
    written(tmp_path)
    save_file({"a.weight": torch.ones(1), "b.c.bias": torch.ones(1)}, tmp_path / "x.safetensors")
    assert Base.read(tmp_path).paths == ["a", "b.c"]
    index = {"weight_map": {"d.weight": "model-1.safetensors", "e.f.weight": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Base.read(tmp_path).paths == ["d", "e.f"]


@pytest.mark.parametrize("header", [b"5", b"[1]", b"null"])
def test_weights_whose_header_is_no_object_are_named(tmp_path, header):
    written(tmp_path)
    content = len(header).to_bytes(8, "little") + header + b" "
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors: header: must be a JSON object"):
        Base.read(tmp_path)


@pytest.mark.parametrize("embedding", ["model.embed_tokens", "transformer.wte"])
def test_a_head_that_is_tied_has_no_weights_but_a_path(tmp_path, embedding):
    written(tmp_path)
    save_file({f"{embedding}.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    assert Base.read(tmp_path).paths == ["lm_head", embedding]


def test_paths_of_a_model_have_no_wrappers():
    model = nn.Sequential(torch.compile(nn.Linear(2, 2)))
    assert list(Base.of(model).paths) == ["0"]


def test_what_is_no_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Base.read(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: num_attention_heads: must be"):
        Base.read(written(tmp_path, num_attention_heads=0))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: must hold a JSON object"):
        Base.read(tmp_path)
    assert UNKNOWN.heads_of("q_proj") is None
    assert made.BASE.heads_of("k_proj") == (made.KV_HEADS, made.SIZE)
