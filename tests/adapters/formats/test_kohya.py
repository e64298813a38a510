"""kohya's and LyCORIS' file: alpha of every layer, Tucker's three factors, flat names."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_kernels import load_adapter
from lora_kernels.adapters.formats import locate
from lora_kernels.adapters.formats.adapter import Hints
from lora_kernels.adapters.formats.base import Base
from lora_kernels.adapters.formats.kohya import read, write
from lora_kernels.cli import main
from tests.adapters.formats import made
from tests.adapters.formats.environments import run
from tests.adapters.formats.tools.lycoris_net import Net
from tests.adapters.nets import assert_same

TO_Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def layer(name, down, up, alpha=6.0, **more):
    return {
        f"{name}.lora_down.weight": torch.randn(*down),
        f"{name}.lora_up.weight": torch.randn(*up),
        f"{name}.alpha": torch.tensor(alpha),
        **{f"{name}.{key}": value for key, value in more.items()},
    }


def saved(path, tensors, hints=Hints()):  # noqa: B008
    save_file(tensors, path)
    name, file = locate(path)
    assert name == "kohya"
    return read(file, hints)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", TO_Q),
        ("lora_unet_mid_block_resnets_1_time_emb_proj", "mid_block.resnets.1.time_emb_proj"),
        ("lora_unet_up_blocks_0_upsamplers_0_conv", "up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj",
         "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"),
        ("lora_te_text_model_encoder_layers_11_mlp_fc1", "text_model.encoder.layers.11.mlp.fc1"),
        ("lycoris_model_layers_0_self_attn_q_proj", "model.layers.0.self_attn.q_proj"),
        ("lycoris_my_odd_layer", "my_odd_layer"),
    ],
)  # fmt: skip
def test_paths_are_guessed_from_known_names_and_told(tmp_path, seed, name, path):
    adapter = saved(tmp_path / "a.safetensors", layer(name, (2, 8), (6, 2)))
    assert list(adapter.layers) == [path]
    assert adapter.layers[path].spec.scaling == 3.0
    assert any("guessed" in note or "kept" in note for note in adapter.notes)


def test_the_base_tells_the_paths(tmp_path, seed):
    base = Base("base", paths=["my_odd.layer", "other"])
    tensors = layer("lycoris_my_odd_layer", (2, 8), (6, 2))
    adapter = saved(tmp_path / "a.safetensors", tensors, Hints(base=base))
    assert list(adapter.layers) == ["my_odd.layer"]
    assert not adapter.notes
    for paths, why in ((["other"], "no module"), (["my_odd.layer", "my.odd_layer"], "two modules")):
        hints = Hints(base=replace(base, paths=paths))
        with pytest.raises(ValueError, match=f"lycoris_my_odd_layer: {why} of base"):
            read(tmp_path / "a.safetensors", hints)


def test_tuckers_three_factors_become_two(tmp_path, seed):
    mid = torch.randn(2, 2, 3, 3)
    tensors = layer("lycoris_conv_in", (2, 5, 1, 1), (6, 2, 1, 1), **{"lora_mid.weight": mid})
    adapter = saved(tmp_path / "a.safetensors", tensors)
    (found,) = adapter.layers.values()
    down, up = (tensors[f"lycoris_conv_in.lora_{x}.weight"].double() for x in ("down", "up"))
    expected = torch.einsum("or,rskl,si->oikl", up[..., 0, 0], mid.double(), down[..., 0, 0])
    assert found.lora_A.shape == (2, 5, 3, 3)
    actual = torch.einsum("or,rikl->oikl", found.lora_B[..., 0, 0].double(), found.lora_A.double())
    # The product mid·down is stored in float32: its values near one keep six digits.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert any("Tucker" in note for note in adapter.notes)


def test_alpha_of_rs_lora_is_the_true_one(tmp_path, seed):
    """LyCORIS writes alpha·sqrt(r), so that alpha / r of the file is the scaling."""
    tensors = layer("lycoris_conv_in", (4, 8), (6, 4), alpha=2.0 * 4**0.5)
    (found,) = saved(tmp_path / "a.safetensors", tensors).layers.values()
    assert found.spec.scaling == 2.0 / 4**0.5


@pytest.mark.parametrize(
    "options", [{}, {"dora": True}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}], ids=str
)
def test_what_was_written_is_read_bit_for_bit(tmp_path, seed, options):
    adapter = made.with_scaling(made.adapter(**options), "model.layers.0.mlp.up_proj", 0.5)
    lines = write(adapter, tmp_path / "a.safetensors", Hints())
    assert len(lines) == 1
    made.assert_same_layers(read(tmp_path / "a.safetensors", Hints()), adapter)


def test_components_have_kohyas_prefixes(tmp_path, seed):
    for paths, names in (
        ([f"unet.{TO_Q}", "text_encoder.text_model.encoder.layers.0.mlp.fc1"],
         {"lora_unet_" + TO_Q.replace(".", "_"), "lora_te_text_model_encoder_layers_0_mlp_fc1"}),
        (["text_encoder.text_model.encoder.layers.0.mlp.fc1",
          "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"],
         {f"lora_te{i}_text_model_encoder_layers_0_mlp_fc1" for i in (1, 2)}),
        ([TO_Q], {"lora_unet_" + TO_Q.replace(".", "_")}),
    ):  # fmt: skip
        adapter = made.adapter(dict.fromkeys(paths, (8, 6)))
        file = tmp_path / f"{len(names)}{len(paths[0])}.safetensors"
        write(adapter, file, Hints())
        assert {key.partition(".")[0] for key in load_file(file)} == names
        made.assert_same_layers(read(file, Hints()), adapter)


@pytest.mark.parametrize("name", ["hada_w1_a", "lokr_w1", "oft_blocks", "diff"])
def test_what_is_no_lora_is_refused(tmp_path, seed, name):
    with pytest.raises(ValueError, match=rf"lycoris_a\.{name}: LoHa"):
        saved(tmp_path / "a.safetensors", {f"lycoris_a.{name}": torch.randn(2, 2)})


@pytest.mark.formats
@pytest.mark.parametrize("tucker", [False, True])
def test_convolutions_of_lycoris_give_its_outputs_here(tmp_path, seed, tucker):
    x = torch.randn(2, 3, 8, 8)
    save_file({"x": x}, tmp_path / "x.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in ("net", "locon", "x", "y")]
    run("lycoris", "lycoris_net.py", *files, *["tucker"] * tucker)
    base, expected = Net().eval(), load_file(files[3])["y"]
    base.load_state_dict(load_file(files[0]))
    with torch.no_grad():
        assert (base(x) - expected).abs().max() > 0.01
        assert_same(load_adapter(copy.deepcopy(base), files[1])(x), expected, torch.float32)
    assert main(["convert", str(files[1]), str(tmp_path / "peft")]) == 0
    with torch.no_grad():
        ours = load_adapter(copy.deepcopy(base), tmp_path / "peft")(x)
    assert_same(ours, expected, torch.float32)
    again = tmp_path / "again.safetensors"
    assert main(["convert", str(tmp_path / "peft"), str(again), "--to", "kohya"]) == 0
    if not tucker:  # whose factors are others
        theirs, back = (
            {re.sub("^(lycoris|lora_unet)_", "", key): value for key, value in load_file(f).items()}
            for f in (files[1], again)
        )
        assert set(back) == set(theirs)
        assert all(torch.equal(value, back[key]) for key, value in theirs.items())
