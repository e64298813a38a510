"""lora-kernels convert: loralib's file and PEFT's directory, both ways, and what is refused."""

import collections
import copy
import json
import os
import re
from pathlib import Path

import loralib
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kernels import (
    LoRAEmbedding,
    LoRALinear,
    LoRAMergedLinear,
    load_adapter,
    lora_state_dict,
    mark_only_lora_as_trainable,
    save_adapter,
)
from lora_kernels.cli import main
from lora_kernels.testing.tolerance import assert_close

ALPHA = ["--lora-alpha", "6"]


class Attention(nn.Module):
    """A MergedLinear and a Linear of the package given: loralib's names, or PyTorch's bases."""

    def __init__(self, linear, merged):
        super().__init__()
        self.qkv = merged(8, 24)
        self.out = linear(24, 8)

    def forward(self, x):
        return self.out(torch.relu(self.qkv(x)))


def plain():
    return Attention(nn.Linear, nn.Linear)


def adapted(package=loralib, enable_lora=(True, False, True)):
    return Attention(
        lambda k, n: package.Linear(k, n, r=4, lora_alpha=6),
        lambda k, n: package.MergedLinear(
            k, n, r=4, lora_alpha=6, enable_lora=list(enable_lora)
        ),
    )  # fmt: skip


def trained(model):
    """Weights as after training: nothing is zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def base_of(model):
    """The same weights without LoRA."""
    base = plain()
    state = {k: v for k, v in model.state_dict().items() if "lora_" not in k}
    base.load_state_dict(state)
    return base


def assert_same(actual, expected):
    assert set(actual) == set(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key], value), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("enable_lora", [(1, 0, 1), (1, 1, 1)])
def test_convert_there_and_back_is_bit_for_bit(convert, seed, enable_lora, dtype):
    state = loralib.lora_state_dict(trained(adapted(enable_lora=map(bool, enable_lora))).to(dtype))
    torch.save(state, "lora.pt")
    flags = ",".join(map(str, enable_lora))
    code, lines, err = convert("lora.pt", "peft", *ALPHA, "--enable-lora", flags)
    assert (code, err) == (0, "")
    assert "LoRA on 2 modules" in lines[0]
    code, lines, err = convert("peft", "back.pt")
    assert (code, err) == (0, "")
    assert_same(torch.load("back.pt"), state)
    assert os.stat("back.pt").st_mode == os.stat("lora.pt").st_mode
    assert any(line.endswith(": out") and "Linear(r=4, lora_alpha=6)" in line for line in lines)
    assert any("MergedLinear(r=4, lora_alpha=6" in line and "qkv" in line for line in lines)


def test_convert_takes_one_enabled_group_by_name(convert, seed):
    state = loralib.lora_state_dict(trained(adapted(enable_lora=(False, True, False))))
    torch.save(state, "lora.pt")
    assert convert("lora.pt", "peft", *ALPHA, "--enable-lora", "qkv=0,1,0")[0] == 0
    assert convert("peft", "back.pt")[0] == 0
    assert_same(torch.load("back.pt"), state)


def test_convert_makes_a_directory_that_gives_loralibs_outputs(convert, seed):
    model = trained(adapted()).eval()
    base = base_of(copy.deepcopy(model).train())  # train(): base weights without the update
    model.train()
    torch.save(loralib.lora_state_dict(model), "lora.pt")
    assert convert("lora.pt", "peft", *ALPHA, "--enable-lora", "1,0,1")[0] == 0
    x = torch.randn(5, 8)
    expected = copy.deepcopy(model).double()(x.double())
    ours = load_adapter(copy.deepcopy(base), "peft")
    assert isinstance(ours.qkv, LoRAMergedLinear)
    assert isinstance(ours.out, LoRALinear)
    assert_close(ours(x), expected, model(x))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), "peft")
    assert_close(theirs(x), expected, model(x))


def test_convert_makes_of_a_directory_of_peft_a_file_that_loralib_loads(convert, seed):
    base = plain()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["out", "qkv"])
    theirs = trained(peft.get_peft_model(copy.deepcopy(base), config))
    base = copy.deepcopy(theirs).unload()
    theirs.save_pretrained("peft")
    assert convert("peft", "lora.pt")[0] == 0

    def linear(k, n):
        return loralib.Linear(k, n, r=4, lora_alpha=6)

    model = Attention(linear, linear)
    state = base.state_dict() | torch.load("lora.pt")
    model.load_state_dict(state)  # strict: every key of both
    x = torch.randn(5, 8)
    assert_close(model(x), copy.deepcopy(theirs).double()(x.double()), theirs(x))


def test_convert_tells_alphas_to_their_last_digit(convert, seed):
    config = peft.LoraConfig(r=3, lora_alpha=3, use_rslora=True, target_modules=["out", "qkv"])
    trained(peft.get_peft_model(plain(), config)).save_pretrained("peft")
    _, lines, _ = convert("peft", "lora.pt")
    (told,) = {float(alpha) for line in lines for alpha in re.findall(r"lora_alpha=([\d.]+)", line)}
    assert told == pytest.approx(3 * 3**0.5, rel=1e-14)


SCALINGS = {
    "rslora": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"out": 7, "qkv": 2.5}},
    "both": {"use_rslora": True, "alpha_pattern": {"out": 7}, "rank_pattern": {"qkv": 3}},
}


@pytest.mark.parametrize("options", SCALINGS.values(), ids=SCALINGS)
def test_convert_there_and_back_keeps_every_scaling(convert, refused, options, seed):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["out", "qkv"], **options)
    theirs = trained(peft.get_peft_model(plain().double(), config))
    base = copy.deepcopy(theirs).unload()
    theirs.save_pretrained("peft")
    assert convert("peft", "lora.pt")[0] == 0
    assert nn.Module().load_state_dict(torch.load("lora.pt"), strict=False).unexpected_keys
    assert "6 was given: leave it out" in refused("lora.pt", "again", "--lora-alpha", "6")
    assert convert("lora.pt", "again")[0] == 0
    x = torch.randn(5, 8).double()
    torch.testing.assert_close(load_adapter(copy.deepcopy(base), "again")(x), theirs(x))


def test_convert_says_all_that_a_file_does_not_tell_at_once(refused):
    head = {"head.weight": torch.ones(2, 8), "head.bias": torch.ones(2), "more.weight": A}
    torch.save({"qkv.lora_A": A, "qkv.lora_B": torch.ones(8, 2), **head}, "lora.pt")
    err = refused("lora.pt", "peft")
    options = "--lora-alpha ALPHA --enable-lora 1,0,1 --modules-to-save head --modules-to-save more"
    assert err.endswith(f": give {options}\n")
    assert err.count("lora.pt: ") == 1
    options = options.replace("ALPHA", "6").replace("1,0,1", "1,1").split()
    assert main(["convert", "lora.pt", "peft", *options]) == 0


def everything():
    """A model with all that loralib's file leaves to its reader."""
    model = nn.ModuleDict(
        {
            "emb": LoRAEmbedding(9, 8, 4, 6),
            "qkv": LoRAMergedLinear(
                8, 12, 4, 6, 0.1, enable_lora=[True, False, True], out_splits=(6, 2, 4)
            ),
            "one": LoRAMergedLinear(8, 12, 4, 7, enable_lora=[False, False, True]),
            "plain": LoRALinear(8, 8, 4, 6, 0.2),
            "head": nn.Linear(8, 2),
        }
    )
    mark_only_lora_as_trainable(model, modules_to_save="head")
    return trained(model)


@pytest.mark.parametrize("transposed", [False, True])
def test_convert_there_and_back_needs_no_option(convert, transposed, seed):
    """PEFT's directory has one fan_in_fan_out for all layers."""
    model = everything()
    if transposed:
        model = nn.ModuleDict({"square": LoRALinear(8, 8, 4, 6, fan_in_fan_out=True)})
    save_adapter(trained(model), "peft")
    config = Path("peft/adapter_config.json")
    told = json.loads(config.read_text()) | {"base_model_name_or_path": "some/model"}
    config.write_text(json.dumps(told))
    assert convert("peft", "lora.pt")[0] == 0
    code, _, err = convert("lora.pt", "again")
    assert (code, err) == (0, "")
    for name in ("peft", "again"):
        loaded = load_file(f"{name}/adapter_model.safetensors")
        config = json.loads(Path(f"{name}/adapter_config.json").read_text())
        if name == "peft":
            first, expected = loaded, config
    assert config == expected
    assert_same(loaded, first)
    fresh = nn.ModuleDict(  # loralib's own layers, and PyTorch, pass over what is told
        {"qkv": loralib.MergedLinear(8, 12, 4, enable_lora=[True, False, True])}
    )
    if not transposed:
        state = torch.load("lora.pt")
        del state["qkv.lora_B"]  # of other sizes than loralib's
        fresh.load_state_dict(state, strict=False)
        assert torch.equal(fresh["qkv"].lora_A, model["qkv"].lora_A)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--enable-lora", "qkv=1,1,0"], "qkv: the file says enable_lora=[1, 0, 1], and [1, 1, 0]"),
        (["--enable-lora", "1,1,0"], "qkv: the file says enable_lora=[1, 0, 1], and [1, 1, 0]"),
        (["--out-splits", "qkv=4,4,4"], "qkv: the file says out_splits=[6, 2, 4], and [4, 4, 4]"),
        (["--lora-alpha", "6"], "one: the file says lora_alpha=7, and 6"),
    ],
)
def test_convert_refuses_what_the_file_contradicts(convert, refused, options, named, seed):
    save_adapter(everything(), "peft")
    assert convert("peft", "lora.pt")[0] == 0
    assert f"{named} was given: leave it out" in refused("lora.pt", "again", *options)
    agreeing = ["--enable-lora", "qkv=1,0,1", "--out-splits", "qkv=6,2,4", "--embedding", "emb"]
    assert convert("lora.pt", "again", *agreeing)[0] == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("lora_alpha", value) for value in ("much", float("nan"), [1])]
    + [("enable_lora", value) for value in (1, [], [True, "x"], [2, 1], ["a"], "101", [[True]])]
    + [("out_splits", value) for value in (8, [8.0], [-8], ["8"], [True], [0, 8])]
    + [("embedding", 1), ("fan_in_fan_out", "no"), ("lora_dropout", 2), ("lora_dropout", "x")],
)
def test_convert_refuses_what_is_forged_beside_the_keys(refused, name, value):
    state = collections.OrderedDict(FACTORS)
    state._metadata = {
        "out": {"lora_alpha": 6, "enable_lora": [True], "out_splits": [8], name: value}
    }
    torch.save(state, "lora.pt")
    assert f"out: {name}" in refused("lora.pt", "peft")


@pytest.mark.parametrize(
    ("name", "value"),
    [("modules_to_save", names) for names in ("head", 3, [3], ["nowhere"])]
    + [("base_model", ["a"]), ("base_model", 3)],
)
def test_convert_refuses_what_is_forged_of_the_model(refused, name, value):
    state = collections.OrderedDict(FACTORS)
    state._metadata = {"": {name: value}, "out": {"lora_alpha": 6}}
    torch.save(state, "lora.pt")
    assert name in refused("lora.pt", "peft").replace("-", "_")


def test_convert_passes_over_other_metadata(convert):
    model = nn.ModuleDict({"out": loralib.Linear(8, 8, r=4)})
    state = model.state_dict()
    state.pop("out.weight")
    state._metadata["out"], state._metadata[""] = 3, None
    torch.save(state, "lora.pt")
    assert convert("lora.pt", "peft", *ALPHA)[0] == 0


def test_convert_tells_keys_of_patterns_that_match_nothing(convert):
    config = peft.LoraConfig(r=4, target_modules=["out"], alpha_pattern={"typo": 3, "out": 5})
    with pytest.warns(RuntimeWarning, match="typo"):
        peft.get_peft_model(plain(), config).save_pretrained("peft")
    code, lines, _ = convert("peft", "lora.pt")
    assert code == 0
    assert "alpha_pattern: 'typo'" in lines[-1]


def test_convert_takes_biases_heads_and_embeddings_along(convert, seed):
    model = nn.ModuleDict(
        {"emb": LoRAEmbedding(10, 8, 4, 6), "out": LoRALinear(8, 8, 4, 6), "head": nn.Linear(8, 2)}
    )
    trained(model)
    state = lora_state_dict(model, "lora_only")
    state |= {f"head.{name}": value for name, value in model["head"].state_dict().items()}
    torch.save({"model_state_dict": {f"module.{k}": v for k, v in state.items()}}, "lora.pt")
    options = ["--embedding", "emb", "--modules-to-save", "head"]
    code, lines, err = convert("lora.pt", "peft", *ALPHA, *options)
    assert (code, err) == (0, "")
    assert "bias=lora_only, modules_to_save=['head']" in lines[0]
    with open("peft/adapter_config.json") as file:
        assert json.load(file)["modules_to_save"] == ["head"]
    assert "base_model.model.emb.lora_embedding_A" in load_file("peft/adapter_model.safetensors")
    assert convert("peft", "back.pt")[0] == 0
    assert_same(torch.load("back.pt"), state)


def test_convert_brings_weights_of_adapted_embeddings_and_heads_back(convert, refused, seed):
    config = peft.LoraConfig(r=4, target_modules=["embed", "lm_head"])
    base = nn.ModuleDict({"embed": nn.Embedding(10, 8), "lm_head": nn.Linear(8, 8)})
    model = peft.get_peft_model(base, config)
    model.save_pretrained("peft")
    before = load_file("peft/adapter_model.safetensors")
    for name, module in base.items():
        before[f"base_model.model.{name}.base_layer.weight"] = module.base_layer.weight.detach()
    save_file(before, "peft/adapter_model.safetensors")
    assert convert("peft", "lora.pt")[0] == 0
    assert convert("lora.pt", "back", "--embedding", "embed")[0] == 0
    assert_same(load_file("back/adapter_model.safetensors"), before)
    plain = dict(torch.load("lora.pt"))  # as loralib saves it: perhaps with the update in it
    torch.save(plain, "plain.pt")
    assert "embed.weight" in refused("plain.pt", "other", *ALPHA, "--embedding", "embed")


def test_convert_writes_factors_that_are_views(convert, seed):
    state = {"out.lora_A": torch.randn(8, 4).T, "out.lora_B": torch.randn(16, 8)[::2, ::2]}
    torch.save(state, "lora.pt")
    assert convert("lora.pt", "peft", *ALPHA)[0] == 0
    assert convert("peft", "back.pt")[0] == 0
    assert_same(torch.load("back.pt"), state)


# ---- what is refused ----

A, B = torch.ones(4, 8), torch.ones(8, 4)
FACTORS = {"out.lora_A": A, "out.lora_B": B}


@pytest.mark.parametrize(
    ("state", "options", "named"),
    [
        (FACTORS, [], "--lora-alpha"),
        (FACTORS, ["--lora-alpha", "much"], "much"),
        (FACTORS, ["--lora-alpha", "nan"], "nan"),
        (FACTORS, [*ALPHA, "--lora-dropout", "1.5"], "1.5"),
        (FACTORS, [*ALPHA, "--embedding", "emb"], "emb"),
        (FACTORS, [*ALPHA, "--enable-lora", "qkv=1,0"], "qkv"),
        (FACTORS, [*ALPHA, "--enable-lora", "out=yes"], "out=yes"),
        (FACTORS, [*ALPHA, "--enable-lora", "out=1,1"], "[1, 1]"),
        (FACTORS, [*ALPHA, "--modules-to-save", "head"], "head"),
        (FACTORS | {"head.weight": A}, ALPHA, "head.weight"),
        (FACTORS | {"out.lora_C": A}, ALPHA, "out.lora_C"),
        (FACTORS | {"step": 3}, ALPHA, "step"),
        ({"out.lora_A": A}, ALPHA, "out.lora_B"),
        ({"out.lora_A": A, "out.lora_B": torch.ones(8, 3)}, ALPHA, "rank"),
        ({"qkv.lora_A": A, "qkv.lora_B": torch.ones(8, 2)}, ALPHA, "--enable-lora"),
        ({"out.lora_A": A * float("inf"), "out.lora_B": B}, ALPHA, "finite"),
        ({"out.lora_A": A.long(), "out.lora_B": B}, ALPHA, "out.lora_A"),
        ({"lora_A": A, "lora_B": B}, ALPHA, "no name"),
        ({"a..lora_A": A, "a..lora_B": B}, ALPHA, "empty"),
        ({"type.lora_A": A, "type.lora_B": B}, ALPHA, "'type'"),
        ({"head.weight": A}, ALPHA, "lora_A"),
        ({}, ALPHA, "state dict"),
        ([A], ALPHA, "list"),
    ],
)
def test_convert_refuses_a_file_that_does_not_fit(refused, state, options, named):
    torch.save(state, "lora.pt")
    assert named in refused("lora.pt", "peft", *options)


class Command:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_convert_refuses_a_pickle_with_code(refused, tmp_path):
    torch.save(FACTORS | {"step": Command()}, "lora.pt")
    assert "lora.pt: holds more than tensors" in refused("lora.pt", "peft", *ALPHA)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04 cut off"])
def test_convert_refuses_a_damaged_file(refused, tmp_path, content):
    (tmp_path / "lora.pt").write_bytes(content)
    assert "lora.pt" in refused("lora.pt", "peft", *ALPHA)


@pytest.fixture
def directory(tmp_path):
    """A directory of PEFT's format, written by save_adapter."""
    model = nn.ModuleDict({"out": LoRALinear(8, 8, 4, 6)})
    save_adapter(model, tmp_path / "peft")
    return tmp_path / "peft"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [None, b"{", b""])
def test_convert_refuses_a_directory_without_or_with_damaged_files(
    refused, directory, tmp_path, name, content
):
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_bytes(content)
    (tmp_path / "lora.pt").write_bytes(b"older")
    assert name in refused("peft", "lora.pt")


@pytest.mark.parametrize(
    ("change", "named"),
    [({"use_dora": True}, "use_dora"), ({"r": 3}, "rank 3"), ({"peft_type": "IA3"}, "peft_type")],
)
def test_convert_refuses_what_loralib_cannot_express(refused, directory, change, named):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert named in refused("peft", "lora.pt")


def test_convert_refuses_places_that_cannot_be_read_or_written(refused, directory, tmp_path):
    torch.save(FACTORS, "lora.pt")
    (tmp_path / "a_file").write_bytes(b"")
    assert "nowhere" in refused("nowhere", "peft", *ALPHA)
    assert "a_file" in refused("lora.pt", "a_file", *ALPHA)
    assert "a_file" in refused("lora.pt", "a_file/peft", *ALPHA)
    assert "is a directory" in refused("peft", ".")
    for source, place in (("peft", "a_file/lora.pt"), ("lora.pt", "/proc/nowhere/peft")):
        assert f"{place}: cannot be written: " in refused(source, place, *ALPHA)
    assert "DESTINATION" in refused("lora.pt")


@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_a_name_that_is_too_long_is_one_line(command, capsys):
    assert main([command, "a" * 300, *(["out"] if command == "convert" else [])]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("form", ["loralib", "diffusers", "mlx"])
def test_convert_leaves_a_link_to_nothing_alone(refused, directory, tmp_path, form):
    link = tmp_path / "link.safetensors"
    link.symlink_to("nothing")
    assert "link.safetensors" in refused("peft", "link.safetensors", "--to", form)
    assert link.is_symlink()


def test_convert_writes_no_pickle_with_the_name_of_another_format(refused, directory):
    assert "give --to" in refused("peft", "lora.safetensors")


def test_convert_warns_if_peft_may_rewrite_the_targets(convert):
    path = "layers.0.mlp.shared_experts.up_proj"
    torch.save({f"{path}.lora_A": A, f"{path}.lora_B": B}, "lora.pt")
    code, lines, _ = convert("lora.pt", "peft", *ALPHA)
    assert code == 0
    assert any(line.startswith("warning: PEFT 0.19") and path in line for line in lines)


def test_convert_says_what_each_module_was_taken_for(convert, seed):
    model = nn.ModuleDict({"conv": loralib.Conv2d(8, 16, 3, r=4), "attention": adapted()})
    state = loralib.lora_state_dict(trained(model))
    state |= lora_state_dict(nn.ModuleDict({"emb": LoRAEmbedding(10, 8, 4, 6)}))
    torch.save(state, "lora.pt")
    code, lines, _ = convert(
        "lora.pt", "peft", *ALPHA, "--embedding", "emb", "--enable-lora", "1,0,1"
    )
    assert code == 0
    assert {line.removeprefix("lora.pt: taken for ") for line in lines if "taken for" in line} == {
        "Linear(24, 48, r=12): conv",
        "Linear(24, 8, r=4): attention.out",
        "MergedLinear(8, 24, r=4): attention.qkv",
        "Embedding(10, 8, r=4): emb",
    }
    assert any("a convolution from a Linear" in line and "save_adapter" in line for line in lines)


@pytest.mark.parametrize("entry", ["bias", "conv.bias", "conv.weight"])
def test_convert_refuses_a_convolution_that_its_bias_or_weight_gives_away(refused, entry):
    conv = loralib.Conv2d(8, 16, 3, r=4)
    value = conv.conv.weight if entry == "conv.weight" else conv.conv.bias
    state = {"c.lora_A": conv.lora_A, "c.lora_B": conv.lora_B, f"c.{entry}": value}
    torch.save({key: value.detach() for key, value in state.items()}, "lora.pt")
    err = refused("lora.pt", "peft", *ALPHA)
    assert "save_adapter" in err


def test_convert_says_in_its_help_what_it_cannot_tell(convert):
    code, lines, _ = convert("--help")
    assert code == 0
    assert "do not tell a convolution from a Linear" in " ".join(" ".join(lines).split())
