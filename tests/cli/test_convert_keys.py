"""lora-kernels convert: keys with the names of wrappers."""

import copy
import re

import loralib
import pytest
import torch
from safetensors.torch import load_file

from lora_kernels import load_adapter
from tests.cli.test_convert import ALPHA, FACTORS, A, B, adapted, base_of, trained


def compiled_blocks(model):
    for name in ("qkv", "out"):
        setattr(model, name, torch.compile(getattr(model, name), backend="eager"))
    return model


def in_adapterhub(state):
    return {re.sub(r"\.(lora_[AB])", r".loras.task.\1", key): value for key, value in state.items()}


def under(front):
    return lambda state: {f"{front}{key}": value for key, value in state.items()}


def of_lightning(state):
    return {"state_dict": under("model.")(state), "pytorch-lightning_version": "2.6.0", "epoch": 1}


@pytest.mark.parametrize(
    ("wrap", "options", "told"),
    [
        (lambda state: {k.replace(".", "._orig_mod."): v for k, v in state.items()}, [], None),
        (lambda state: {f"_fsdp_wrapped_module.{k}": v for k, v in state.items()}, [], None),
        (in_adapterhub, [], ".loras.task"),
        (under("module._orig_mod."), [], "'module.'"),
        (under("base_model.model."), [], "'base_model.model.'"),
        (of_lightning, [], "'model.'"),
        (under("model."), ["--drop-prefix", "model"], "'model.'"),
    ],
)
def test_convert_takes_the_names_of_wrappers_off(convert, wrap, options, told, seed):
    model = trained(adapted())
    base, x = base_of(model).double(), torch.randn(5, 8).double()
    model.double()
    state = wrap(loralib.lora_state_dict(model))
    torch.save(state, "lora.pt")
    code, lines, err = convert("lora.pt", "peft", *ALPHA, "--enable-lora", "1,0,1", *options)
    assert (code, err) == (0, "")
    assert told is None or told in lines[-1]
    assert "_orig_mod" not in str(load_file("peft/adapter_model.safetensors").keys())
    expected = model.train()(x)
    torch.testing.assert_close(load_adapter(copy.deepcopy(base), "peft")(x), expected)
    torch.testing.assert_close(load_adapter(compiled_blocks(base), "peft")(x), expected)


def test_convert_tells_how_to_take_off_what_may_be_lightnings(convert, seed):
    torch.save({"model.out.lora_A": A, "model.out.lora_B": B}, "lora.pt")
    code, lines, _ = convert("lora.pt", "peft", *ALPHA)
    assert code == 0
    assert "--drop-prefix model." in lines[-1]
    assert "base_model.model.model.out.lora_A.weight" in load_file("peft/adapter_model.safetensors")


def test_convert_refuses_two_adapters_of_a_layer_and_a_prefix_that_is_not_there(refused):
    torch.save({f"q.loras.{n}.{k}": v for n in "ab" for k, v in
                (("lora_A", A), ("lora_B", B))}, "lora.pt")  # fmt: skip
    assert "q.loras.a.lora_A" in refused("lora.pt", "peft", *ALPHA)
    torch.save(FACTORS, "lora.pt")
    assert "--drop-prefix" in refused("lora.pt", "peft", *ALPHA, "--drop-prefix", "model")
