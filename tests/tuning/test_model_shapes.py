"""Shapes of layers out of a model's configuration, and out of a list."""

import pytest
from transformers import AutoConfig, GPT2Config, LlamaConfig

from lora_kernels.tuning.model_shapes import layers_of, parse_shapes
from lora_kernels.tuning.shapes import LLAMA_3_8B, Layer


def test_the_layers_of_a_llama_each_once(tmp_path):
    LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=3, vocab_size=50,
    ).save_pretrained(tmp_path)  # fmt: skip
    expected = {Layer(64, 64), Layer(64, 32), Layer(64, 96), Layer(96, 64)}
    found = layers_of(str(tmp_path))
    assert set(found) == expected
    assert len(found) == 4
    assert layers_of(str(tmp_path / "config.json")) == found


def test_layers_that_store_their_weight_the_other_way_round(tmp_path):
    GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50).save_pretrained(tmp_path)
    assert set(layers_of(str(tmp_path))) == {
        Layer(32, 96), Layer(32, 32), Layer(32, 128), Layer(128, 32)
    }  # fmt: skip


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model_type": "nothing"}'])
def test_a_configuration_that_is_none_is_one_line(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config") as raised:
        layers_of(str(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name", ["nothere", "owner/nothere", "./a/b", "a/b/c", "other/config.json"]
)
def test_what_no_hub_can_have_is_never_asked_for(name, tmp_path, monkeypatch):
    def asked(*_, **__):
        raise AssertionError

    monkeypatch.setattr(AutoConfig, "from_pretrained", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    with pytest.raises(ValueError, match=f"{name}: no such file or directory; a name on the Hub"):
        layers_of(name)


def test_a_name_goes_to_transformers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)
    monkeypatch.setattr(AutoConfig, "from_pretrained", {"owner/gpt2": config}.__getitem__)
    assert Layer(32, 96) in layers_of("owner/gpt2")


def test_lists_of_shapes():
    assert parse_shapes("48x40,40X48,48x40") == (Layer(48, 40), Layer(40, 48))
    assert parse_shapes("llama3-8b,4096x4096") == LLAMA_3_8B


@pytest.mark.parametrize("text", ["", "4", "4x", "x4", "0x4", "4x-1", "4x4x4", "llama", "4x4,,"])
def test_other_lists_name_the_part(text):
    with pytest.raises(ValueError, match="must be KxN, such as 4096x1024, or one of llama3-8b"):
        parse_shapes(text)
