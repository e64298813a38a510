"""apply_lora, against PEFT's get_peft_model."""

import copy
import math
import pickle
import warnings

import peft
import pytest
import torch
from torch import nn

from lora_kernels import apply_lora
from lora_kernels.layers.conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from lora_kernels.layers.embedding import LoRAEmbedding
from lora_kernels.layers.linear import LoRALinear
from tests.model.nets import Net, layers_of, trainable
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_llama


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
def test_apply_lora_wraps_what_peft_wraps_with_its_ranks_and_scaling(case):
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


def test_apply_lora_makes_of_each_kind_its_layer_around_the_same_parameters():
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
def test_apply_lora_keeps_the_output_and_the_mode(training, seed, device):
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).to(device)
    model.train(training)
    ids = torch.randint(0, 13, (2, 5), device=device)
    before = model(ids).logits
    apply_lora(model, r=2, lora_alpha=4)
    assert all(module.training == training for module in model.modules())
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-6)


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
def test_apply_lora_gives_16_bit_weights_float32_adapters_as_peft_does(base, autocast, expected):
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["embed", "query", "conv2"]}
    model = apply_lora(Net().to(base), autocast_adapter_dtype=autocast, **options)
    theirs = peft.get_peft_model(
        Net().to(base), peft.LoraConfig(**options), autocast_adapter_dtype=autocast
    )
    for layer in layers_of(model).values():
        assert layer.lora_A.dtype == layer.lora_B.dtype == expected
        assert layer.base_weight().dtype == base
    found = {p.dtype for name, p in theirs.named_parameters() if "lora_" in name}
    assert found == {expected}


def test_apply_lora_wraps_a_module_under_two_names_once():
    model = Net()
    model.alias = model.blocks[0].query
    model.blocks.append(model.blocks[1])
    apply_lora(model, r=2, lora_alpha=4, target_modules=["query"])
    assert model.alias is model.blocks[0].query
    assert model.blocks[3].query is model.blocks[1].query
    assert len(layers_of(model)) == 3


def test_apply_lora_wraps_a_module_under_all_names_if_its_second_one_matches():
    model = Net()
    model.alias = model.head
    apply_lora(model, r=2, lora_alpha=4, target_modules=["alias"])
    assert type(model.head) is LoRALinear
    assert model.head is model.alias


def test_apply_lora_keeps_hooks_and_their_handles():
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


def test_apply_lora_leaves_merging_to_the_next_eval():
    model = Net().eval()
    before = model.head.weight.clone()
    apply_lora(model, r=2, lora_alpha=4, merge_weights=True)
    assert not model.head.merged
    nn.init.normal_(model.head.lora_B)
    model.eval()
    assert model.head.merged
    assert not torch.equal(model.head.complete_weight(), before)
    model.train()
    assert not model.head.merged
    assert torch.equal(model.head.weight, before)


def test_apply_lora_merges_only_if_asked():
    model = apply_lora(Net(), r=2, lora_alpha=4).eval()
    assert not any(layer.merged or layer.merge_weights for layer in layers_of(model).values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("padded", [False, True])
def test_apply_lora_keeps_transformer_encoder_from_passing_by_the_layers(padded, seed, device):
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


def test_apply_lora_gives_a_model_that_trains_copies_and_pickles(seed, device):
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
    "alpha None": ({"lora_alpha": None}, "'blocks.*': lora_alpha must be given, .*got None"),
    "no rank": ({"r": None}, r": r must be given, as in apply_lora\(model, r=8, lora_alpha=16\)"),
    "neither": ({"r": None, "lora_alpha": None}, ": r and lora_alpha must be given, as in"),
    "rank by a pattern": (
        {"r": None, "target_modules": ["query", "head"], "rank_pattern": {"query": 2}},
        "LoRA on 'head': r must be given",
    ),
    "alpha infinite in a pattern": ({"alpha_pattern": {"head": math.inf}}, "head.*inf"),
    "pattern type": ({"alpha_pattern": [3]}, r"alpha_pattern.*\[3\]"),
    "dropout": ({"lora_dropout": 1.0}, r"lora_dropout.*1\.0"),
    "saved nowhere": (
        {"modules_to_save": ["classifier"]},
        "modules_to_save: .*'classifier'; the model has 'embed', 'blocks', '0', 'query', .*, ...$",
    ),
    "saved misspelt": ({"modules_to_save": "haed"}, r"'haed' \(did you mean 'head'\?\); the"),
    "saved path misspelt": (
        {"modules_to_save": ["blocks.1.norn"]},
        r"\(did you mean 'blocks.1.norm'\?\)",
    ),
    "saved and targeted": (
        {"target_modules": ["head"], "modules_to_save": ["head"]},
        r"target_modules=\['head'\] matches 'head' alone, which modules_to_save=\['head'\] trains",
    ),
    "inside what is saved": (
        {"target_modules": r"blocks\.\d\.query", "modules_to_save": "blocks"},
        r"matches 'blocks.0.query', .*'blocks.2.query' alone, which modules_to_save=\['blocks'\]",
    ),
    "saved type": ({"modules_to_save": 3}, "modules_to_save.*3"),
}


@pytest.mark.parametrize("case", BAD)
def test_apply_lora_raises_for_bad_arguments_and_changes_nothing(case):
    changes, message = BAD[case]
    model = Net()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        apply_lora(model, **{"r": 2, "lora_alpha": 4, **changes})
    assert_untouched(model, before)


def test_apply_lora_raises_for_an_unknown_bias_and_changes_nothing():
    model = Net()
    before = snapshot(model)
    with pytest.raises(NotImplementedError, match="'some'"):
        apply_lora(model, r=2, lora_alpha=4, bias="some")
    assert_untouched(model, before)


def test_apply_lora_out_of_memory_half_way_changes_nothing(monkeypatch):
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


def test_apply_lora_raises_for_a_second_time_and_names_the_layer():
    model = apply_lora(Net(), r=2, lora_alpha=4, target_modules=["query"])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"blocks\.0\.query \(LoRALinear\).*already"):
        apply_lora(model, r=2, lora_alpha=4)
    assert_untouched(model, before)
    apply_lora(model, r=3, lora_alpha=4, target_modules=["value"])
    assert len(layers_of(model)) == 6


def test_apply_lora_raises_for_a_linear_with_advice():
    with pytest.raises(ValueError, match=r"LoRALinear\.from_linear"):
        apply_lora(nn.Linear(4, 4), r=2, lora_alpha=4)
