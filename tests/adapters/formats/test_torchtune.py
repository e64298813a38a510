"""torchtune's adapter_model.pt: rows of q_proj and k_proj, of lora_b and of the magnitude."""

import json
from dataclasses import replace

import pytest
import torch

from lora_kernels.adapters.formats import locate
from lora_kernels.adapters.formats.adapter import Hints
from lora_kernels.adapters.formats.torchtune import read, write
from tests.adapters.formats import made

Q, K, V = (f"model.layers.1.self_attn.{name}_proj" for name in "qkv")


def to_hugging_face(t, heads):
    """torchtune's own _permute_lora_matrix."""
    rank = t.shape[-1]
    head_dim = t.shape[0] // heads
    return t.view(heads, head_dim // 2, 2, rank).transpose(1, 2).reshape(head_dim * heads, rank)


def read_directory(folder, hints=made.HINTS):
    name, file = locate(folder)
    assert name == "torchtune"
    return read(file, hints)


@pytest.mark.parametrize("dora", [False, True])
def test_rows_are_those_that_torchtune_converts(tmp_path, seed, dora):
    adapter = made.adapter(dora=dora)
    assert len(write(adapter, tmp_path / "tune", made.HINTS)) == 1
    state = torch.load(tmp_path / "tune" / "adapter_model.pt", weights_only=True)
    for path, heads in ((Q, made.HEADS), (K, made.KV_HEADS)):
        name = path.removeprefix("model.").replace("self_attn", "attn")
        layer = adapter.layers[path]
        assert torch.equal(state[f"{name}.lora_a.weight"], layer.lora_A)
        assert torch.equal(to_hugging_face(state[f"{name}.lora_b.weight"], heads), layer.lora_B)
        if dora:
            rows = to_hugging_face(state[f"{name}.magnitude"][:, None], heads)[:, 0]
            assert torch.equal(rows, layer.magnitude)
    assert torch.equal(state["layers.1.attn.v_proj.lora_b.weight"], adapter.layers[V].lora_B)
    assert state["layers.0.mlp.w3.lora_a.weight"].shape == (2, made.WIDTH)
    made.assert_same_layers(read_directory(tmp_path / "tune"), adapter)


def test_rows_of_qwen2_stay(tmp_path, seed):
    adapter, hints = made.adapter(), Hints(base=replace(made.BASE, model_type="qwen2"))
    write(adapter, tmp_path / "tune", hints)
    state = torch.load(tmp_path / "tune" / "adapter_model.pt", weights_only=True)
    assert torch.equal(state["layers.1.attn.q_proj.lora_b.weight"], adapter.layers[Q].lora_B)
    made.assert_same_layers(read_directory(tmp_path / "tune", hints), adapter)


def test_models_that_torchtune_has_not_are_named(tmp_path, seed):
    hints = Hints(base=replace(made.BASE, model_type="bert"))
    with pytest.raises(
        ValueError, match=r"config\.json: model_type: 'bert' is none of torchtune's"
    ):
        write(made.adapter(), tmp_path / "tune", hints)


def test_without_q_and_k_no_base_is_needed(tmp_path, seed):
    adapter = made.adapter({V: made.LINEARS[V], "lm_head": (made.WIDTH, made.WORDS)})
    write(adapter, tmp_path / "tune", Hints())
    made.assert_same_layers(read_directory(tmp_path / "tune", Hints()), adapter)


def test_alpha_is_beside_the_file_or_a_hint(tmp_path, seed):
    adapter = made.adapter(alpha=5.0)
    write(adapter, tmp_path / "tune", made.HINTS)
    config = tmp_path / "tune" / "adapter_config.json"
    assert json.loads(config.read_text())["lora_alpha"] == 5
    config.unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.pt: .* --lora-alpha"):
        read_directory(tmp_path / "tune")
    again = read_directory(tmp_path / "tune", replace(made.HINTS, lora_alpha=5.0))
    made.assert_same_layers(again, adapter)


def test_base_that_does_not_fit_is_named(tmp_path, seed):
    write(made.adapter(), tmp_path / "tune", made.HINTS)
    hints = Hints(base=replace(made.BASE, heads=8))
    with pytest.raises(ValueError, match=r"q_proj: has 16 outputs, and config\.json says 8 heads"):
        read_directory(tmp_path / "tune", hints)
    with pytest.raises(ValueError, match=r"q_proj: .* give --base"):
        read_directory(tmp_path / "tune", Hints())
