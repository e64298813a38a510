"""``pytest -m formats``: tools read what convert wrote for them, and convert reads what they wrote.

Each tool runs in an environment of its own, with pinned versions. A tiny Llama with grouped-query
attention goes through all of them that have one.
"""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lora_kernels import load_adapter
from lora_kernels.cli import main
from tests.adapters.formats.environments import run
from tests.adapters.nets import assert_same, randomise

pytestmark = pytest.mark.formats

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
# Format, environment, script, its modules, and whether it has DoRA.
TOOLS = {
    "mlx": ("mlx", "mlx_llama.py", ALL[:-1], True),
    "torchtune": ("torchtune", "torchtune_llama.py", ALL, True),
    "litgpt": ("litgpt", "litgpt_llama.py", ALL, False),
    "adapterhub": ("adapters", "adapterhub_llama.py", ALL[:3] + ALL[5:7], False),
    "kohya": ("lycoris", "lycoris_llama.py", ALL, True),
}
CASES = [(name, dora) for name, tool in TOOLS.items() for dora in (False, True)[: 1 + tool[3]]]


@pytest.fixture
def base(tmp_path, seed):
    """A tiny Llama in a directory, with the ids that all compute with."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(**sizes, **heads, rms_norm_eps=1e-5, tie_word_embeddings=False)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    ids = torch.randint(0, 64, (2, 10), dtype=torch.int32)
    save_file({"ids": ids}, tmp_path / "base" / "ids.safetensors")
    return model


def path_for(name, folder):
    """Where convert is to write for a tool: a directory, or the file in one."""
    return folder / "lora.safetensors" if name == "kohya" else folder


def convert(*arguments):
    assert main(["convert", *map(str, arguments)]) == 0


def logits(model, folder):
    with torch.no_grad():
        return model(load_file(folder / "base" / "ids.safetensors")["ids"].long()).logits


def same_tensors(one, other, but=()):
    one, other = (read(file) for file in (one, other))
    one = {key: value for key, value in one.items() if not (but and key.endswith(but))}
    assert set(one) == set(other)
    for key, value in one.items():
        assert value.dtype == other[key].dtype
        assert torch.equal(value, other[key]), key


def read(directory):
    endings = (".safetensors", ".pt", ".lora", ".bin")
    (file,) = (f for f in directory.iterdir() if f.suffix in endings)
    if file.suffix == ".safetensors":
        return load_file(file)
    state = torch.load(file, weights_only=True)
    return state.get("model", state)


@pytest.mark.parametrize(("name", "dora"), CASES)
def test_an_adapter_that_a_tool_trained_gives_its_outputs_here(name, dora, base, tmp_path):
    tool, script, _, _ = TOOLS[name]
    flags = ["dora"] * dora
    run(
        tool,
        script,
        "train",
        tmp_path / "base",
        tmp_path / "theirs",
        tmp_path / "y.safetensors",
        *flags,
    )
    convert(tmp_path / "theirs", tmp_path / "peft", "--base", tmp_path / "base")
    expected = load_file(tmp_path / "y.safetensors")["logits"]
    assert (logits(base, tmp_path) - expected).abs().max() > 0.01  # it has learnt something
    model = load_adapter(copy.deepcopy(base), tmp_path / "peft").eval()
    assert_same(logits(model, tmp_path), expected, torch.float32)
    direct = load_adapter(copy.deepcopy(base), tmp_path / "theirs").eval()
    assert torch.equal(logits(direct, tmp_path), logits(model, tmp_path))
    in_peft = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft").eval()
    assert_same(logits(in_peft, tmp_path), expected, torch.float32)
    back = ["--to", name, "--base", tmp_path / "base"]
    convert(tmp_path / "peft", path_for(name, tmp_path / "again"), *back)
    same_tensors(tmp_path / "theirs", tmp_path / "again")


@pytest.mark.parametrize(("name", "dora"), CASES)
def test_a_tool_computes_what_peft_computes_with_the_same_adapter(name, dora, base, tmp_path):
    tool, script, modules, _ = TOOLS[name]
    options = peft.LoraConfig(r=4, lora_alpha=6, target_modules=modules, use_dora=dora)
    model = randomise(peft.get_peft_model(copy.deepcopy(base), options)).eval()
    model.save_pretrained(tmp_path / "peft")
    to = ["--base", tmp_path / "base"]
    convert(tmp_path / "peft", path_for(name, tmp_path / "theirs"), "--to", name, *to)
    flags = ["dora"] * dora
    run(
        tool,
        script,
        "run",
        tmp_path / "base",
        tmp_path / "theirs",
        tmp_path / "y.safetensors",
        *flags,
    )
    actual = load_file(tmp_path / "y.safetensors")["logits"]
    assert_same(actual, logits(model, tmp_path), torch.float32)
    convert(tmp_path / "theirs", tmp_path / "again", *to)
    same_tensors(tmp_path / "peft", tmp_path / "again", but="base_layer.weight")
