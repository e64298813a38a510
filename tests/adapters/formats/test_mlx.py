"""MLX's directory: the files that mlx-lm 0.32 writes, and what is written for it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lora_kernels.adapters.formats import locate
from lora_kernels.adapters.formats.adapter import Hints
from lora_kernels.adapters.formats.mlx import read, write
from tests.adapters.formats import made

Q = "model.layers.0.self_attn.q_proj"


def read_directory(folder, hints=made.HINTS):
    name, file = locate(folder)
    assert name == "mlx"
    return read(file, hints)


def test_factors_are_transposed_and_the_scale_multiplies_as_it_is(tmp_path, seed):
    (layer,) = read_directory(made.mlx(tmp_path / "mlx")).layers.values()
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert torch.equal(layer.lora_A, tensors[f"{Q}.lora_a"].T)
    assert torch.equal(layer.lora_B, tensors[f"{Q}.lora_b"].T)
    assert (layer.base.kind, layer.base.inputs, layer.base.outputs) == ("linear", 8, 6)
    assert (layer.spec.scaling, layer.spec.lora_alpha, layer.spec.r) == (20.0, 40, 2)


@pytest.mark.parametrize("name", ["model.embed_tokens", "transformer.wte"])
def test_embeddings_are_told_by_their_names(tmp_path, seed, name):
    tensors = {f"{name}.lora_a": torch.randn(11, 2), f"{name}.lora_b": torch.randn(2, 6)}
    (layer,) = read_directory(made.mlx(tmp_path / "mlx", tensors)).layers.values()
    assert (layer.base.kind, layer.base.inputs, layer.base.outputs) == ("embedding", 11, 6)
    assert torch.equal(layer.lora_A, tensors[f"{name}.lora_a"].T)


def test_an_embedding_of_another_name_needs_a_hint(tmp_path, seed):
    tensors = {"words.lora_a": torch.randn(11, 2), "words.lora_b": torch.randn(2, 6)}
    made.mlx(tmp_path / "mlx", tensors)
    (layer,) = read_directory(tmp_path / "mlx", Hints(embedding=("words",))).layers.values()
    assert layer.base.kind == "embedding"


@pytest.mark.parametrize(
    "options",
    [
        {}, {"dora": True}, {"embedding": True}, {"dtype": torch.bfloat16}, {"lora_dropout": 0.25},
        {"alpha": 5.0, "r": 3}, {"alpha": 0.1, "r": 7},
    ],
    ids=str,
)  # fmt: skip
def test_what_was_written_is_read_bit_for_bit(tmp_path, seed, options):
    adapter = made.adapter(**options)
    assert len(write(adapter, tmp_path / "mlx", made.HINTS)) == 1
    again = read_directory(tmp_path / "mlx")
    made.assert_same_layers(again, adapter)
    assert all(
        layer.spec.lora_dropout == adapter.layers[path].spec.lora_dropout
        for path, layer in again.layers.items()
    )


def test_the_config_lists_whole_paths_of_no_block(tmp_path, seed):
    """So mlx-lm adapts exactly these modules, whichever blocks they are in."""
    write(made.adapter(), tmp_path / "mlx", made.HINTS)
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert config["num_layers"] == 0
    assert config["lora_parameters"] == {
        "rank": 2, "scale": 3.0, "dropout": 0.0, "keys": list(made.LINEARS)
    }  # fmt: skip


@pytest.mark.parametrize(("scaling", "how"), [(6.0, "exactly"), (0.7, "rounded once")])
def test_another_scaling_is_put_into_lora_b_and_told(tmp_path, seed, scaling, how):
    adapter = made.with_scaling(made.adapter(), Q, scaling)
    lines = write(adapter, tmp_path / "mlx", made.HINTS)
    assert any(line.startswith("remark: the scaling of") and how in line for line in lines)
    layer = read_directory(tmp_path / "mlx").layers[Q]
    assert layer.spec.scaling == 3.0
    made.assert_same_but_for_rounding(layer, adapter.layers[Q])


def test_smaller_ranks_are_padded_and_told(tmp_path, seed):
    adapter = made.with_rank(made.adapter(r=3), Q, 1)
    lines = write(adapter, tmp_path / "mlx", made.HINTS)
    assert any("zeros make the rank 3" in line and Q in line for line in lines)
    layer = read_directory(tmp_path / "mlx").layers[Q]
    assert layer.spec.r == 3
    assert torch.equal(made.update(layer), made.update(adapter.layers[Q]))


def test_wrappers_leave_no_trace(tmp_path, seed):
    name = "_orig_mod.layers.0._checkpoint_wrapped_module.q_proj"
    tensors = {f"{name}.lora_a": torch.randn(8, 2), f"{name}.lora_b": torch.randn(2, 6)}
    assert list(read_directory(made.mlx(tmp_path / "mlx", tensors)).layers) == ["layers.0.q_proj"]
