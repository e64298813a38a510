"""Keys of files without what wrappers add to them."""

import pytest

from lora_kernels.adapters.formats.keys import plain_keys, stripped

FACTORS = ("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("path", "plain", "taken"),
    [
        ("blocks.0._orig_mod.up", "blocks.0.up", []),
        (
            "_orig_mod.blocks.0._fsdp_wrapped_module.up._checkpoint_wrapped_module",
            "blocks.0.up",
            [],
        ),
        ("module._orig_mod.up", "up", ["module."]),
        ("module.module.up", "module.up", ["module."]),
        ("_orig_mod.module.model.up", "model.up", ["module."]),
        ("base_model.model.block.up.base_layer", "block.up", ["base_model.model."]),
        ("module.base_model.model.up", "up", ["module.base_model.model."]),
        ("block.module.base_layer.up", "block.module.base_layer.up", []),
        ("query.loras.task", "query", [".loras.task"]),
        ("query.loras.0", "query.loras.0", []),
        ("model.up", "model.up", []),
    ],
)
def test_plain_keys_are_those_of_the_model_without_wrappers(path, plain, taken):
    keys = [f"{path}.{name}" for name in FACTORS]
    found, parts = plain_keys(keys)
    assert list(found.items()) == [(key, f"{plain}.{key[-6:]}") for key in keys]
    assert parts == taken


def test_plain_keys_keep_a_front_that_one_key_has_not():
    keys = ["module.up.lora_A", "head.weight"]
    assert plain_keys(keys) == (dict(zip(keys, keys, strict=True)), [])


def test_plain_keys_take_off_the_fronts_given():
    (plain,) = plain_keys(["model.model.up"], ["model."])[0].values()
    assert plain == "model.up"  # a Llama in a LightningModule
    keys = ["model.module.net.up.lora_A", "model.module.head"]
    found, taken = plain_keys(keys, ["model.", "net."])
    assert list(found.values()) == ["net.up.lora_A", "head"]
    assert taken == ["model.module."]


def test_plain_keys_name_two_that_become_one():
    with pytest.raises(
        ValueError, match=r"q\.loras\.b\.lora_A: is q\.lora_A .*q\.loras\.a\.lora_A"
    ):
        plain_keys(["q.loras.a.lora_A", "q.loras.b.lora_A"])


def test_stripped_goes_for_paths_as_for_keys():
    strip, _ = stripped(["module.a._orig_mod.lora_A", "module.b.bias"])
    assert strip("module.a._orig_mod") == "a"
    assert strip("head") == "head"
