"""Models and names that are not this package's: each is told, with what to do instead."""

import importlib
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaModel

import lora_kernels as lora
from lora_kernels.foreign import did_you_mean, importing, peft_layer
from lora_kernels.integrations.trainer import _callback_class

LAYER = "base_model.model.layers.0.self_attn.q_proj is a Linear of PEFT"


@pytest.fixture
def peft_model():
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1,
        vocab_size=9,
    )  # fmt: skip
    return get_peft_model(LlamaModel(config), LoraConfig(r=2, target_modules=["q_proj"]))


CALLS = {
    "apply_lora": (lambda m, d: lora.apply_lora(m, r=2, lora_alpha=4), "patch_peft()"),
    "mark_only_lora_as_trainable": (
        lambda m, d: lora.mark_only_lora_as_trainable(m), "set_adapter(name)",
    ),
    "lora_state_dict": (lambda m, d: lora.lora_state_dict(m), "peft.get_peft_model_state_dict"),
    "merged_state_dict": (lambda m, d: lora.merged_state_dict(m), "merge_and_unload()"),
    "save_adapter": (lambda m, d: lora.save_adapter(m, d / "out"), "save_pretrained(directory)"),
    "load_adapter": (lambda m, d: lora.load_adapter(m, d / "in"), "load_adapter(directory, name)"),
    "share_inputs": (lambda m, d: lora.share_inputs(m), "each by itself"),
    "merge_lora": (lambda m, d: lora.merge_lora(m), "merge_adapter()"),
    "unmerge_lora": (lambda m, d: lora.unmerge_lora(m), "unmerge_adapter()"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_own_functions_refuse_a_model_of_peft_and_change_nothing(name, peft_model, tmp_path):
    call, way_out = CALLS[name]
    before = {key: (p.requires_grad, p.clone()) for key, p in peft_model.named_parameters()}
    with pytest.raises(ValueError, match=f"^{name}: model holds adapters of PEFT") as raised:
        call(peft_model, tmp_path)
    assert LAYER in str(raised.value)
    assert way_out in str(raised.value)
    after = dict(peft_model.named_parameters())
    assert after.keys() == before.keys()
    for key, (trains, value) in before.items():
        assert after[key].requires_grad == trains
        assert torch.equal(after[key], value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "function"),
    [("peft", lora.patch_peft), ("transformers", lora.adapter_callback)],
)
def test_a_package_that_is_not_there_is_told_with_its_installation(package, function, monkeypatch):
    for module in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    _callback_class.cache_clear()
    told = f"^{function.__name__}: needs {package}: pip install {package}$"
    with pytest.raises(ModuleNotFoundError, match=told) as raised:
        function()
    assert raised.value.name == package


def test_what_a_package_fails_to_import_keeps_its_own_error():
    for name in ("no_such", "peft.no_such"):
        told = f"^No module named '{name}'$"
        with pytest.raises(ModuleNotFoundError, match=told), importing("peft", "patch_peft"):
            importlib.import_module(name)


def test_a_model_that_is_half_of_peft_is_refused_too(peft_model):
    both = nn.ModuleDict({"own": lora.LoRALinear(4, 4, r=2), "other": peft_model})
    with pytest.raises(ValueError, match=r"other\.base_model\.model\.layers\.0"):
        lora.lora_state_dict(both)
    assert lora.lora_state_dict(both["own"]).keys() == {"lora_A", "lora_B"}


def test_a_plain_model_holds_nothing_of_peft():
    assert peft_layer(nn.Sequential(nn.Linear(2, 2), lora.LoRALinear(2, 2, r=1))) is None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lora.mark_only_lora_as_trainable, "nothing trains now: apply_lora"),
        (lora.lora_state_dict, "the dict is empty"),
    ],
)
def test_a_model_without_lora_is_told_and_treated_as_loralib_does(function, message):
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.warns(RuntimeWarning, match=f"{function.__name__}: model has no LoRA .*{message}"):
        assert not function(model)


def test_parameters_that_are_named_as_loras_are_no_reason_to_warn():
    module = nn.Linear(2, 2)
    module.lora_gate = nn.Parameter(torch.ones(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.mark_only_lora_as_trainable(module)
        assert lora.lora_state_dict(module).keys() == {"lora_gate"}


# ---- names ----


def applied(**options) -> list[str]:
    """What apply_lora warns of."""
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4)})
    arguments = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **options}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lora.apply_lora(model, **arguments)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"target_modules": ["q_proj", "v_porj"]},
            "these names in target_modules match no module, and are ignored: 'v_porj' (did you "
            "mean 'v_proj'?)",
        ),
        (
            {"target_modules": ["q_proj", "else"]},
            "these names in target_modules match no module, and are ignored: 'else'",
        ),
        (
            {"rank_pattern": {"v_porj": 8}},
            "these keys match no module that gets LoRA, and are ignored: rank_pattern: 'v_porj' "
            "(did you mean 'v_proj'?)",
        ),
        (
            {"alpha_pattern": {"q_proj": 8, "k": 8}},
            "these keys match no module that gets LoRA, and are ignored: alpha_pattern: 'k'",
        ),
        ({"lora_alpha": 0}, "lora_alpha=0: LoRA changes nothing then"),
    ],
)
def test_a_name_that_matches_nothing_is_told_with_the_nearest(options, said):
    assert applied(**options) == [f"apply_lora: {said}"]


def test_names_that_match_are_not_told():
    assert applied() == []
    assert applied(target_modules=".*proj", rank_pattern={"v_proj": 1}) == []


@pytest.mark.parametrize(
    ("layer", "arguments", "message"),
    [
        (
            lora.Linear,
            {"rank": 4},
            "LoRALinear: got an unexpected argument 'rank': did you mean r?",
        ),
        (lora.Linear, {"alpha": 4}, "'alpha': did you mean lora_alpha?"),
        (lora.Linear, {"lora_droput": 0.1}, "'lora_droput': did you mean lora_dropout?"),
        (lora.Linear, {"biass": False}, "'biass': did you mean bias?"),
        (lora.MergedLinear, {"enable": [True]}, "LoRAMergedLinear: .*'enable'"),
        (lora.Embedding, {"padding": 0}, "LoRAEmbedding: .*'padding': did you mean padding_idx?"),
        (lora.Linear, {"xyz": 0}, "'xyz'$"),
    ],
)
def test_an_argument_that_there_is_not_names_the_layer_and_the_nearest(layer, arguments, message):
    with pytest.raises(TypeError, match=message.replace("?", r"\?")):
        layer(4, 4, r=2, **arguments)


def test_a_convolution_names_it_as_well():
    with pytest.raises(TypeError, match=r"LoRAConv2d: .*'strides': did you mean stride"):
        lora.Conv2d(4, 4, 3, r=2, strides=2)


def test_a_constructor_that_passes_all_on_knows_the_names_of_what_it_passes_to():
    class Mine(lora.LoRALinear):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    with pytest.raises(TypeError, match=r"Mine: .*'alpha': did you mean lora_alpha\?"):
        Mine(4, 4, alpha=2)
    with pytest.raises(TypeError, match=r"LoRAConv1d: .*'dropout': did you mean lora_dropout\?"):
        lora.LoRAConv1d(4, 4, 1, r=2, dropout=0.1)


def test_no_name_is_proposed_that_the_constructor_does_not_take():
    with pytest.raises(TypeError, match=r"MultiLoRALinear: got an unexpected argument 'r'$"):
        lora.MultiLoRALinear(4, 4, {"a": {"r": 2}}, r=2)
    with pytest.raises(TypeError, match=r"MultiLoRALinear: got an unexpected argument 'rank'$"):
        lora.MultiLoRALinear(4, 4, {"a": {"r": 2}}, rank=2)


def test_a_subclass_names_itself():
    class Mine(lora.LoRALinear):
        pass

    with pytest.raises(TypeError, match="Mine: got an unexpected argument 'rank'"):
        Mine(4, 4, rank=2)


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "hi.py").write_text("kept")
    model = lora.apply_lora(nn.Sequential(nn.Linear(4, 4)), r=2, lora_alpha=4)
    with pytest.raises(ValueError, match=r"save_adapter: directory=.*hi\.py' is a file"):
        lora.save_adapter(model, tmp_path / "hi.py")
    assert (tmp_path / "hi.py").read_text() == "kept"


def test_nearly_right():
    assert did_you_mean("q_porj", ["q_proj", "mlp"]) == "q_proj"
    assert did_you_mean("zzz", ["q_proj"]) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 4}, "'rank': did you mean r?"),
        ({"r": 4, "alpha": 8}, "'alpha': did you mean lora_alpha?"),
        ({"r": 4, "lora_alpha": 8, "dropout": 0.1}, "'dropout': did you mean lora_dropout?"),
        ({"r": 4, "lora_alpha": 8, "target_module": "0"}, "did you mean target_modules?"),
        ({"adapters": {"a": {"r": 2, "lora_alpha": 4}}, "rank": 4}, "'rank': did you mean r?"),
        ({"misspelt": 1}, "'misspelt'"),
    ],
)
def test_apply_lora_names_the_nearest_of_its_arguments(options, said):
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"^apply_lora: got an unexpected argument ") as raised:
        lora.apply_lora(model, **options)
    assert said in str(raised.value)
    assert type(model[0]) is nn.Linear


# ---- arguments in another's place ----


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("model", "shown"), [("dir", "str 'dir'"), (None, "NoneType"), ([], "list")]
)
def test_what_is_no_model_is_told(name, model, shown, tmp_path):
    told = rf"^{name}: model, the first argument, must be an nn\.Module, got {shown}$"
    with pytest.raises(TypeError, match=told):
        CALLS[name][0](model, tmp_path)


def test_what_is_no_path_is_told():
    model = lora.apply_lora(nn.Sequential(nn.Linear(4, 4)), r=2, lora_alpha=4)
    with pytest.raises(TypeError, match=r"^save_adapter: directory must be a path, got None"):
        lora.save_adapter(model, None)
    with pytest.raises(
        TypeError, match=r"^load_adapter: directory must be a path, got Sequential$"
    ):
        lora.load_adapter(model, model)
    told = r"must be a path, got OrderedDict: model\.load_state_dict\(it, strict=False\) takes"
    with pytest.raises(TypeError, match=told):
        lora.load_adapter(model, model.state_dict())


# ---- constructors ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lora.Conv2d(3, 4, kernel_sise=3), "LoRAConv2d: .*'kernel_sise': .* kernel_size?"),
        (lambda: lora.Conv1d(3), "LoRAConv1d: out_channels, kernel_size must be given"),
        (lambda: lora.Linear(4, r=2), "LoRALinear: out_features must be given"),
        (lambda: lora.Linear(in_feature=4, out_features=4), "'in_feature': .*in_features?"),
        (lambda: lora.Embedding(), "LoRAEmbedding: num_embeddings, embedding_dim must"),
        (lambda: lora.Linear(nn.Linear(4, 4), r=4), "Linear: LoRALinear.from_linear wraps a"),
        (lambda: lora.Linear(nn.Linear(4, 4), 4, r=4), "got a Linear: LoRALinear.from_linear"),
        (lambda: lora.Conv2d(nn.Conv2d(3, 4, 3), r=4), "LoRAConv2d.from_conv wraps a module"),
        (lambda: lora.Embedding(nn.Embedding(3, 4), r=4), "LoRAEmbedding.from_embedding wraps"),
        (lambda: lora.MergedLinear(nn.Linear(4, 4), r=4), "LoRAMergedLinear.from_linear wraps"),
    ],
)
def test_a_missing_argument_names_the_layer_and_what_was_meant(make, message):
    with pytest.raises(TypeError, match=message.replace("?", r"\?")):
        make()


def test_a_subclass_is_named_as_well():
    class Mine(lora.LoRALinear):
        pass

    with pytest.raises(TypeError, match=r"^Mine: out_features must be given$"):
        Mine(4)
    assert Mine(4, out_features=3, r=2).lora_B.shape == (3, 2)
