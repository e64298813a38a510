"""load_adapter takes the files of every tool, and says what it took them for."""

import copy
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM

from lora_kernels import load_adapter
from lora_kernels.adapters.formats import FORMATS
from lora_kernels.adapters.formats.adapter import Hints
from lora_kernels.adapters.formats.base import Base
from tests.adapters.formats import made

FILES = {"gguf": "a.gguf", "kohya": "a.safetensors", "loralib": "a.pt"}
# All that AdapterHub knows of a Llama, which has to do for everyone.
SIZES = {p: s for p, s in made.LINEARS.items() if p.endswith(("q_proj", "k_proj", "v_proj"))}
SIZES_OF = {"adapterhub": SIZES | {p: s for p, s in made.LINEARS.items() if "mlp.up" in p}}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = dict(hidden_size=made.WIDTH, intermediate_size=made.HIDDEN, num_hidden_layers=2)
    heads = dict(num_attention_heads=made.HEADS, num_key_value_heads=made.KV_HEADS)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=made.WORDS)).eval()


def written(name, adapter, folder, hints=made.HINTS):
    if name == "gguf":
        pytest.importorskip("gguf")
    path = folder / FILES.get(name, name)
    FORMATS[name].write(adapter, path, hints)
    return path


@torch.no_grad()
def outputs(model):
    return model(torch.arange(10).reshape(2, 5))[0]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_outputs_that_pefts_gives(name, llama, tmp_path, seed, caplog):
    adapter = made.adapter(SIZES_OF.get(name, SIZES))
    FORMATS["peft"].write(adapter, tmp_path / "expected", made.HINTS)
    path = written(name, adapter, tmp_path)
    with caplog.at_level(logging.INFO, "lora_kernels"):
        model = load_adapter(copy.deepcopy(llama), path)
    assert f"taken for the format of {name}" in caplog.text
    expected = outputs(load_adapter(copy.deepcopy(llama), tmp_path / "expected"))
    assert torch.equal(outputs(model), expected)
    assert (expected - outputs(llama)).abs().max() > 0.01


@pytest.mark.parametrize("name", ["mlx", "torchtune", "kohya"])
def test_a_model_without_its_head_takes_them_too(name, llama, tmp_path, seed):
    path = written(name, made.adapter(SIZES), tmp_path)
    whole = load_adapter(copy.deepcopy(llama), path)
    inner = load_adapter(copy.deepcopy(llama).model, path)
    assert torch.equal(outputs(inner), outputs(whole.model))


def test_an_adapted_model_takes_other_values(llama, tmp_path, seed):
    FORMATS["peft"].write(made.adapter(SIZES), tmp_path / "first", made.HINTS)
    path = written("torchtune", made.adapter(SIZES, alpha=1.0), tmp_path)
    model = load_adapter(load_adapter(copy.deepcopy(llama), tmp_path / "first"), path)
    assert torch.equal(outputs(model), outputs(load_adapter(copy.deepcopy(llama), path)))


def test_alpha_may_be_an_argument(llama, tmp_path, seed):
    path = written("kohya", made.adapter(SIZES), tmp_path)
    bare = tmp_path / "bare.safetensors"
    save_file({k: v for k, v in load_file(path).items() if not k.endswith("alpha")}, bare)
    with pytest.raises(ValueError, match=r"alpha: missing"):
        load_adapter(copy.deepcopy(llama), bare)
    model = load_adapter(copy.deepcopy(llama), bare, lora_alpha=6.0)
    assert torch.equal(outputs(model), outputs(load_adapter(copy.deepcopy(llama), path)))


def test_a_file_that_does_not_fit_changes_nothing(llama, tmp_path, seed):
    model = copy.deepcopy(llama)
    path = written("mlx", made.adapter({"model.layers.7.self_attn.q_proj": (16, 16)}), tmp_path)
    with pytest.raises(ValueError, match="matches no module"):
        load_adapter(model, path)
    wide = written("mlx", made.adapter({"model.layers.0.self_attn.q_proj": (8, 16)}), tmp_path)
    with pytest.raises(ValueError, match="must have 16 inputs"):
        load_adapter(model, wide)
    assert [type(m) for m in model.modules()] == [type(m) for m in llama.modules()]


def test_groups_of_a_gpt2_are_adapterhubs(tmp_path, seed):
    """loralib's layout of c_attn, over Hugging Face's Conv1D."""
    gpt2 = GPT2Model(
        GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=16)
    ).eval()
    a, b = torch.randn(4, 8), torch.randn(16, 2)
    (tmp_path / "a").mkdir()
    front = "h.0.attn.c_attn.loras.task."
    torch.save({f"{front}lora_A": a, f"{front}lora_B": b}, tmp_path / "a" / "pytorch_adapter.bin")
    config = '{"config": {"architecture": "lora", "r": 2, "alpha": 6, "attn_matrices": ["q", "v"]}}'
    (tmp_path / "a" / "adapter_config.json").write_text(config)
    dense = copy.deepcopy(gpt2)
    with torch.no_grad():
        weight = dense.h[0].attn.c_attn.weight  # [in, out]
        weight[:, :8] += 3.0 * (b[:8] @ a[:2]).T
        weight[:, 16:] += 3.0 * (b[8:] @ a[2:]).T
    torch.testing.assert_close(outputs(load_adapter(gpt2, tmp_path / "a")), outputs(dense))


def test_base_of_a_model_is_that_of_its_config(llama, tmp_path):
    llama.config.save_pretrained(tmp_path)
    one, other = Base.of(llama), Base.read(tmp_path)
    for name in ("model_type", "heads", "kv_heads", "head_dim"):
        assert getattr(one, name) == getattr(other, name) is not None
    assert "model.layers.0.self_attn.q_proj" in one.paths
    assert other.paths is None
    assert Base.of(torch.nn.Linear(2, 2)).heads is Hints().base.heads is None
