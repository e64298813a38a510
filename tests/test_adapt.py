"""apply_lora and mark_only_lora_as_trainable, against PEFT and loralib."""

import copy
import math
import pickle
import warnings

import loralib
import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_kernels import apply_lora, mark_only_lora_as_trainable
from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.conv import ConvLoRA, LoRAConv1d, LoRAConv2d, LoRAConv3d
from lora_kernels.layers.embedding import LoRAEmbedding
from lora_kernels.layers.linear import LoRALinear
from lora_kernels.layers.merged_linear import LoRAMergedLinear
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_llama


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.value = nn.Linear(8, 6, bias=False)
        self.norm = nn.LayerNorm(8)


class Net(nn.Module):
    """One module of every kind that can be wrapped, and some that cannot."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.mix = Conv1D(6, 8)
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.conv2 = nn.Conv2d(4, 6, (3, 2), padding=1)
        self.conv3 = nn.Conv3d(2, 4, 2)
        self.head = nn.Linear(6, 3)


def layers_of(model):
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, LoRALayer)}


def peft_layers_of(model):
    prefix = "base_model.model."
    return {
        path.removeprefix(prefix): layer
        for path, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }


def snapshot(model):
    """All that a failed call must leave alone."""
    return (
        [(path, id(module), module.training) for path, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.clone()) for name, p in model.named_parameters()],
    )


def assert_untouched(model, before):
    modules, parameters = snapshot(model)
    assert modules == before[0]
    assert [p[:3] for p in parameters] == [p[:3] for p in before[1]]
    for (name, *_, new), (*_, old) in zip(parameters, before[1], strict=True):
        assert torch.equal(new, old), name


# ---- the same layers as PEFT ----

CASES = {
    "suffix list": (Net, {"target_modules": ["query", "value"]}),
    "full path": (Net, {"target_modules": ["blocks.1.query"]}),
    "suffix of two parts": (Net, {"target_modules": ["1.query", "2.value"]}),
    "some entries match nothing": (Net, {"target_modules": ["query", "q_proj"]}),
    "regex": (Net, {"target_modules": r"blocks\.[02]\.(query|value)"}),
    "every kind": (
        Net,
        {"target_modules": ["embed", "query", "mix", "conv1", "conv2", "conv3", "head"]},
    ),
    "all-linear": (Net, {"target_modules": "all-linear"}),
    "all-linear but saved": (Net, {"target_modules": "all-linear", "modules_to_save": ["head"]}),
    "saved container": (Net, {"target_modules": ["query"], "modules_to_save": ["blocks.1"]}),
    "rank and alpha patterns": (
        Net,
        {
            "target_modules": ["query", "value", "head"],
            "rank_pattern": {"blocks.0.query": 2, "value": 3, "quer": 5},
            "alpha_pattern": {r"blocks\.[12]\..*": 7, "^head": 1.5},
        },
    ),
    "rslora": (
        Net,
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"mix": 3}},
    ),
    "bert": (tiny_bert, {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
    "bert all-linear": (tiny_bert, {"target_modules": "all-linear"}),
    "gpt2": (tiny_gpt2, {"target_modules": ["c_attn", "wte"]}),
    "gpt2 all-linear leaves the tied head": (tiny_gpt2, {"target_modules": "all-linear"}),
    "llama all-linear leaves the head": (tiny_llama, {"target_modules": "all-linear"}),
    "llama regex": (tiny_llama, {"target_modules": r".*\.layers\.1\..*_proj"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_wraps_what_peft_wraps_with_its_ranks_and_scaling(case):
    build, options = CASES[case]
    theirs_model = build()
    ours_model = copy.deepcopy(theirs_model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT sets fan_in_fan_out itself and says so
        theirs = peft_layers_of(
            peft.get_peft_model(
                theirs_model, peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.25, **options)
            )
        )
    assert apply_lora(ours_model, r=4, lora_alpha=16, lora_dropout=0.25, **options) is ours_model
    ours = layers_of(ours_model)
    assert set(ours) == set(theirs)
    for path, layer in ours.items():
        assert layer.r == theirs[path].r["default"], path
        assert layer.lora_alpha == theirs[path].lora_alpha["default"], path
        assert layer.scaling == theirs[path].scaling["default"], path
        if not isinstance(layer, LoRAEmbedding):
            assert layer.lora_dropout.p == 0.25


def test_each_kind_becomes_its_lora_layer_around_the_same_parameters():
    model = Net()
    names = ["embed", "mix", "conv1", "conv2", "conv3", "head"]
    before = {name: getattr(model, name).weight for name in names}
    apply_lora(model, r=2, lora_alpha=4, target_modules=names)
    kinds = [LoRAEmbedding, LoRALinear, LoRAConv1d, LoRAConv2d, LoRAConv3d, LoRALinear]
    for name, kind in zip(names, kinds, strict=True):
        layer = getattr(model, name)
        assert type(layer) is kind
        assert layer.weight is before[name]
    assert model.mix.fan_in_fan_out
    assert not model.head.fan_in_fan_out


@pytest.mark.parametrize("training", [True, False])
def test_the_output_and_the_mode_stay(training, seed, device):
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).to(device)
    model.train(training)
    ids = torch.randint(0, 13, (2, 5), device=device)
    before = model(ids).logits
    apply_lora(model, r=2, lora_alpha=4)
    assert all(module.training == training for module in model.modules())
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-6)


def test_one_name_as_a_string_means_the_modules_of_that_name():
    model = apply_lora(Net(), r=2, lora_alpha=4, target_modules="query")
    assert set(layers_of(model)) == {f"blocks.{i}.query" for i in range(3)}


@pytest.mark.parametrize(
    ("base", "autocast", "expected"),
    [
        (torch.bfloat16, True, torch.float32),
        (torch.float16, True, torch.float32),
        (torch.bfloat16, False, torch.bfloat16),
        (torch.float32, True, torch.float32),
        (torch.float64, True, torch.float64),
    ],
)
def test_adapters_of_16_bit_weights_are_float32_as_in_peft(base, autocast, expected):
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["embed", "query", "conv2"]}
    model = apply_lora(Net().to(base), autocast_adapter_dtype=autocast, **options)
    theirs = peft.get_peft_model(
        Net().to(base), peft.LoraConfig(**options), autocast_adapter_dtype=autocast
    )
    for layer in layers_of(model).values():
        assert layer.lora_A.dtype == layer.lora_B.dtype == expected
        assert layer._weight().dtype == base
    found = {p.dtype for name, p in theirs.named_parameters() if "lora_" in name}
    assert found == {expected}


def test_a_module_under_two_names_is_wrapped_once_and_stays_shared():
    model = Net()
    model.alias = model.blocks[0].query
    model.blocks.append(model.blocks[1])
    apply_lora(model, r=2, lora_alpha=4, target_modules=["query"])
    assert model.alias is model.blocks[0].query
    assert model.blocks[3].query is model.blocks[1].query
    assert len(layers_of(model)) == 3


def test_a_module_matched_by_its_second_name_is_wrapped_under_all():
    model = Net()
    model.alias = model.head
    apply_lora(model, r=2, lora_alpha=4, target_modules=["alias"])
    assert type(model.head) is LoRALinear
    assert model.head is model.alias


def test_forward_hooks_keep_working_and_can_be_removed():
    model = nn.Sequential(nn.Linear(4, 4))
    seen = []
    handle = model[0].register_forward_hook(lambda module, args, y: seen.append(type(module)))
    backward = model[0].register_full_backward_hook(lambda module, dx, dy: seen.append("backward"))
    apply_lora(model, r=2, lora_alpha=4)
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert seen == [LoRALinear, "backward"]
    handle.remove()
    backward.remove()
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert len(seen) == 2


def test_an_eval_model_is_merged_by_its_next_eval_and_train_brings_the_base_back():
    model = Net().eval()
    before = model.head.weight.clone()
    apply_lora(model, r=2, lora_alpha=4)
    assert not model.head.merged
    nn.init.normal_(model.head.lora_B)
    model.eval()
    assert model.head.merged
    assert not torch.equal(model.head.weight, before)
    model.train()
    assert torch.equal(model.head.weight, before)


# ---- modules that read the weights of others ----


@pytest.mark.filterwarnings("ignore:.*nested.*")
def test_all_linear_leaves_the_projection_that_attention_reads_by_itself():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match=r"0\.out_proj \(NonDynamicallyQuantizableLinear\)"):
        apply_lora(model, r=2, lora_alpha=4)
    assert set(layers_of(model)) == {"1"}
    with pytest.raises(ValueError, match=r"0\.out_proj \(NonDynamicallyQuantizableLinear\)"):
        apply_lora(nn.Sequential(nn.MultiheadAttention(8, 2)), r=2, lora_alpha=4,
                   target_modules=["out_proj"])  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("padded", [False, True])
def test_transformer_encoder_does_not_pass_by_its_lora_layers_in_inference(padded, seed, device):
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, device=device)
    model = nn.TransformerEncoder(layer, 2)
    apply_lora(model, r=2, lora_alpha=4, merge_weights=False)
    for adapted in layers_of(model).values():
        nn.init.normal_(adapted.lora_B)
    x = torch.randn(2, 5, 8, device=device)
    padding = torch.zeros(2, 5, dtype=torch.bool, device=device)
    padding[1, 3:] = padded
    model.eval()
    with_grad = model(x, src_key_padding_mask=padding)
    with torch.no_grad():
        without = model(x, src_key_padding_mask=padding)
    assert torch.equal(with_grad, without)


# ---- what cannot be done leaves the model alone ----

BAD = {
    "no match": ({"target_modules": ["q_proj"]}, r"target_modules=\['q_proj'\].*'query'"),
    "no match of a regex": ({"target_modules": r"q.*z"}, r"target_modules='q\.\*z'"),
    "regex syntax": ({"target_modules": "(query"}, r"target_modules: '\(query'"),
    "pattern syntax": ({"rank_pattern": {"(": 2}}, "rank_pattern"),
    "target type": ({"target_modules": 3}, "target_modules.*3"),
    "target entry type": ({"target_modules": ["query", None]}, "target_modules"),
    "empty targets": ({"target_modules": []}, r"target_modules=\[\]"),
    "layer norm": ({"target_modules": ["query", "norm"]}, r"blocks\.0\.norm \(LayerNorm\)"),
    "container": ({"target_modules": r"blocks\.1"}, r"blocks\.1 \(Block\)"),
    "rank 0": ({"r": 0}, r"r must be .* got 0"),
    "negative rank": ({"r": -1}, "r must be .* -1"),
    "fractional rank": ({"r": 2.5}, r"r must be .* 2\.5"),
    "bool rank": ({"r": True}, "r must be .* True"),
    "negative rank in a pattern": ({"rank_pattern": {"head": -3}}, "head.*-3"),
    "huge rank": ({"r": 10**400}, "r must be .* 10000"),
    "huge alpha": ({"lora_alpha": 10**400}, "lora_alpha must be a finite number"),
    "alpha NaN": ({"lora_alpha": math.nan}, "lora_alpha.*nan"),
    "alpha None": ({"lora_alpha": None}, "lora_alpha.*None"),
    "alpha infinite in a pattern": ({"alpha_pattern": {"head": math.inf}}, "head.*inf"),
    "pattern type": ({"alpha_pattern": [3]}, r"alpha_pattern.*\[3\]"),
    "dropout": ({"lora_dropout": 1.0}, r"lora_dropout.*1\.0"),
    "saved nowhere": ({"modules_to_save": ["classifier"]}, "modules_to_save.*'classifier'"),
    "saved type": ({"modules_to_save": 3}, "modules_to_save.*3"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_raise_and_change_nothing(case):
    changes, message = BAD[case]
    model = Net()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        apply_lora(model, **{"r": 2, "lora_alpha": 4, **changes})
    assert_untouched(model, before)


def test_an_unknown_bias_raises_and_changes_nothing():
    model = Net()
    before = snapshot(model)
    with pytest.raises(NotImplementedError, match="'some'"):
        apply_lora(model, r=2, lora_alpha=4, bias="some")
    assert_untouched(model, before)


def test_running_out_of_memory_half_way_changes_nothing(monkeypatch):
    model = Net().eval()
    before = snapshot(model)
    built = []

    def run_out(layer):
        built.append(layer)
        if len(built) == 4:
            raise MemoryError

    monkeypatch.setattr(LoRALinear, "reset_lora_parameters", run_out)
    with pytest.raises(MemoryError):
        apply_lora(model, r=2, lora_alpha=4)
    assert len(built) == 4
    assert_untouched(model, before)


def test_a_second_time_raises_and_names_the_layer():
    model = apply_lora(Net(), r=2, lora_alpha=4, target_modules=["query"])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"blocks\.0\.query \(LoRALinear\).*already"):
        apply_lora(model, r=2, lora_alpha=4)
    assert_untouched(model, before)
    apply_lora(model, r=3, lora_alpha=4, target_modules=["value"])
    assert len(layers_of(model)) == 6


def test_inside_a_wrapped_convolution_nothing_is_matched():
    model = nn.Sequential()
    model.conv = nn.Conv2d(2, 2, 3)
    model.lin = nn.Linear(2, 2)
    apply_lora(model, r=2, lora_alpha=4, target_modules=["conv"])
    apply_lora(model, r=2, lora_alpha=4, target_modules=["lin"])
    with pytest.raises(ValueError, match=r"conv \(LoRAConv2d\).*already"):
        apply_lora(model, r=2, lora_alpha=4, target_modules=["conv"])


def test_a_model_that_is_itself_a_linear_raises_with_advice():
    with pytest.raises(ValueError, match=r"LoRALinear\.from_linear"):
        apply_lora(nn.Linear(4, 4), r=2, lora_alpha=4)


def test_weights_that_are_computed_are_not_wrapped():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="0 "):
        apply_lora(model, r=2, lora_alpha=4)
    assert set(layers_of(model)) == {"1"}
    with pytest.raises(ValueError, match=r"0 \(ParametrizedLinear\)"):
        apply_lora(model, r=2, lora_alpha=4, target_modules=["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older weight_norm is deprecated
        old = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"0 \(Linear\).*computed"):
        apply_lora(old, r=2, lora_alpha=4)


def test_a_replaced_forward_is_not_lost():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = lambda x: x
    with pytest.raises(ValueError, match=r"0 \(Linear\).*forward"):
        apply_lora(model, r=2, lora_alpha=4)


# ---- what trains ----


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_marks_what_loralib_marks(bias):
    def build(lora):
        return nn.ModuleDict(
            {
                "lin": lora.Linear(4, 4, r=2),
                "plain": nn.Linear(4, 4),
                "qkv": lora.MergedLinear(4, 6, r=2, enable_lora=[True, False, True]),
                "embed": lora.Embedding(5, 4, r=2),
                "attention": nn.MultiheadAttention(4, 2),
                "norm": nn.LayerNorm(4),
            }
        )

    class Ours:
        Linear, MergedLinear, Embedding = LoRALinear, LoRAMergedLinear, LoRAEmbedding

    theirs, ours = build(loralib), build(Ours)
    loralib.mark_only_lora_as_trainable(theirs, bias)
    assert mark_only_lora_as_trainable(ours, bias) is None
    assert trainable(ours) == trainable(theirs)


def test_lora_only_opens_the_bias_of_a_convolution():
    model = nn.ModuleDict({"conv": ConvLoRA(nn.Conv2d, 2, 2, 3, r=2), "lin": nn.Linear(2, 2)})
    mark_only_lora_as_trainable(model, "lora_only")
    assert trainable(model) == {"conv.lora_A", "conv.lora_B", "conv.conv.bias"}


def test_the_name_of_a_module_opens_nothing():
    model = nn.ModuleDict(
        {
            "lora_encoder": nn.Linear(2, 2),
            "relative_attention_bias": nn.Embedding(3, 2),
            "lin": LoRALinear(2, 2, r=1),
        }
    )
    mark_only_lora_as_trainable(model, "none")
    assert trainable(model) == {"lin.lora_A", "lin.lora_B"}
    mark_only_lora_as_trainable(model, "all")
    assert trainable(model) == {"lin.lora_A", "lin.lora_B", "lin.bias", "lora_encoder.bias"}


def test_a_users_own_lora_parameter_stays_as_it_is():
    model = nn.Module()
    model.lora_gate = nn.Parameter(torch.ones(2))
    model.lora_table = nn.Parameter(torch.ones(2), requires_grad=False)
    model.other = nn.Parameter(torch.ones(2))
    mark_only_lora_as_trainable(model)
    assert trainable(model) == {"lora_gate"}


def test_frozen_lora_factors_are_opened():
    model = nn.Sequential(LoRALinear(2, 2, r=1)).requires_grad_(False)
    mark_only_lora_as_trainable(model)
    assert trainable(model) == {"0.lora_A", "0.lora_B"}


def test_a_tied_bias_of_a_lora_layer_trains_wherever_it_comes_first():
    model = nn.Sequential(nn.Linear(2, 2), LoRALinear(2, 2, r=1))
    model[0].bias = model[1].bias
    mark_only_lora_as_trainable(model, "lora_only")
    assert model[1].bias.requires_grad


def test_modules_to_save_train_as_a_whole_and_the_next_mark_forgets_them():
    model = Net()
    apply_lora(
        model, r=2, lora_alpha=4, target_modules=["query"], modules_to_save=["head", "0.norm"]
    )
    lora = {f"blocks.{i}.query.lora_{x}" for i in range(3) for x in "AB"}
    whole = {"head.weight", "head.bias", "blocks.0.norm.weight", "blocks.0.norm.bias"}
    assert trainable(model) == lora | whole
    mark_only_lora_as_trainable(model, modules_to_save="head")
    assert trainable(model) == lora | {"head.weight", "head.bias"}
    mark_only_lora_as_trainable(model)
    assert trainable(model) == lora


def test_integer_parameters_of_saved_modules_stay_untrained():
    model = nn.Sequential(nn.Linear(2, 2), LoRALinear(2, 2, r=1))
    model[0].table = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    mark_only_lora_as_trainable(model, modules_to_save=["0"])
    assert trainable(model) == {"0.weight", "0.bias", "1.lora_A", "1.lora_B"}


@pytest.mark.parametrize("bias", ["some", None, "None"])
def test_another_bias_raises(bias):
    with pytest.raises(NotImplementedError, match=str(bias)):
        mark_only_lora_as_trainable(Net(), bias)


def test_the_adapted_model_trains_copies_and_pickles(seed, device):
    model = apply_lora(tiny_bert(), r=2, lora_alpha=4, lora_dropout=0.1,
                       modules_to_save=["classifier"]).to(device)  # fmt: skip
    ids = torch.randint(0, 13, (2, 5), device=device)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=torch.tensor([0, 1], device=device)).loss.backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (name not in frozen), name
        if name in frozen:
            assert torch.equal(p, frozen[name]), name
    model.eval()
    logits = model(ids).logits
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(ids).logits, logits)
        assert trainable(again) == trainable(model)
