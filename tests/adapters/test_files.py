"""Adapters that are damaged, forged or for another model: an error, and a model as it was."""

import copy
import json
import math
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kernels import apply_lora, load_adapter, save_adapter
from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.merged_linear import LoRAMergedLinear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
A, B = "base_model.model.lin.lora_A.weight", "base_model.model.lin.lora_B.weight"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.lin = nn.Linear(8, 6)
        self.qkv = nn.Linear(6, 12)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)


def adapted(**options):
    options = {"r": 2, "lora_alpha": 4, **options}
    model = apply_lora(
        Net(), target_modules=["embed", "lin", "conv"], modules_to_save=["head"], bias="lora_only",
        **options,
    )  # fmt: skip
    model.qkv = LoRAMergedLinear.from_linear(
        model.qkv, r=2, lora_alpha=4, enable_lora=[True, False, True]
    )
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LoRALayer):
                nn.init.normal_(layer.lora_A)
                nn.init.normal_(layer.lora_B)
    return model


@pytest.fixture
def adapter(seed, tmp_path):
    """A sound adapter on disk."""
    save_adapter(adapted(), tmp_path)
    return tmp_path


@pytest.fixture(params=["plain", "adapted eval"])
def model(request, adapter):
    model = Net() if "plain" in request.param else adapted()
    return model.eval() if "eval" in request.param else model


def change_config(directory, **changes):
    config = json.loads((directory / CONFIG).read_text())
    for key, value in changes.items():
        config[key] = value
    (directory / CONFIG).write_text(json.dumps(config))


def change_weights(directory, change, records=None):
    with safe_open(directory / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    if records is not None:
        metadata["lora_kernels"] = records
    save_file(tensors, directory / WEIGHTS, metadata)


def assert_refused(model, directory, error, *fragments):
    before = [
        (name, id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()
    ]
    modules = [
        (path, id(module), module.training, sorted(vars(module)))
        for path, module in model.named_modules()
    ]
    scales = [(m.lora_alpha, m.scaling) for m in model.modules() if isinstance(m, LoRALayer)]
    with pytest.raises(error) as caught:
        load_adapter(model, directory)
    for fragment in fragments:
        assert fragment in str(caught.value)
    after = list(model.named_parameters())
    assert [(name, id(p), p.requires_grad) for name, p in after] == [x[:3] for x in before]
    for (name, p), (*_, old) in zip(after, before, strict=True):
        assert p.dtype == old.dtype
        assert torch.equal(p.nan_to_num(), old.nan_to_num()), name
    assert modules == [
        (path, id(module), module.training, sorted(vars(module)))
        for path, module in model.named_modules()
    ]
    assert scales == [
        (m.lora_alpha, m.scaling) for m in model.modules() if isinstance(m, LoRALayer)
    ]


def test_load_adapter_takes_the_untouched_adapter(model, adapter):
    assert load_adapter(model, adapter) is model


# ---- files ----


def test_files_that_are_missing_raise_file_not_found(model, adapter):
    assert_refused(model, adapter / "nowhere", FileNotFoundError, "nowhere")
    (adapter / WEIGHTS).rename(adapter / "elsewhere")
    assert_refused(model, adapter, FileNotFoundError, WEIGHTS)
    (adapter / "elsewhere").rename(adapter / WEIGHTS)
    (adapter / CONFIG).unlink()
    assert_refused(model, adapter, FileNotFoundError, CONFIG)


class Payload:
    """A pickle that leaves a trace where it is executed."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


@pytest.mark.parametrize("name", ["adapter_model.bin", WEIGHTS])
@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_files_that_are_pickles_are_never_executed(name, writer, model, adapter):
    (adapter / WEIGHTS).unlink()
    payload = Payload(adapter / "executed")
    if writer == "pickle":
        (adapter / name).write_bytes(pickle.dumps(payload))
    else:
        torch.save({A: payload}, adapter / name)
    assert_refused(model, adapter, ValueError, name)
    assert not (adapter / "executed").exists()


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, -1])
def test_weights_that_are_truncated_raise(kept, model, adapter):
    content = (adapter / WEIGHTS).read_bytes()
    cut = int(len(content) * kept) if isinstance(kept, float) else kept
    (adapter / WEIGHTS).write_bytes(content[:cut])
    assert_refused(model, adapter, ValueError, WEIGHTS)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 64,
        b"\xff\xff\xff\xff\xff\xff\xff\x7f{}",
        b"\x02\x00\x00\x00\x00\x00\x00\x00[]",
        b'\x02\x00\x00\x00\x00\x00\x00\x00{}',
        b"PK\x03\x04",
    ],
)  # fmt: skip
def test_weights_of_other_content_raise(content, model, adapter):
    (adapter / WEIGHTS).write_bytes(content)
    assert_refused(model, adapter, ValueError, WEIGHTS)


def test_files_that_are_directories_raise(model, adapter):
    (adapter / WEIGHTS).unlink()
    (adapter / WEIGHTS).mkdir()
    assert_refused(model, adapter, FileNotFoundError, WEIGHTS)
    (adapter / CONFIG).unlink()
    (adapter / CONFIG).mkdir()
    assert_refused(model, adapter, FileNotFoundError, CONFIG)


@pytest.mark.parametrize(
    "text", ["", "{", '{"r": 2', "[]", "3", "null", '"LORA"', "{'r': 2}", "[" * 100000]
)
def test_config_that_is_not_a_json_object_raises(text, model, adapter):
    (adapter / CONFIG).write_text(text)
    assert_refused(model, adapter, ValueError, CONFIG)


def test_config_that_is_not_text_raises(model, adapter):
    (adapter / CONFIG).write_bytes(b"\xff\xfe\x00{")
    assert_refused(model, adapter, ValueError, CONFIG)


# ---- the config ----

BAD_VALUES = {
    "peft_type": [None, "IA3", 3, "lora"],
    "r": [0, -1, 2.5, "2", True, 10**30, 2**60, 3, [2], math.nan],
    "lora_alpha": ["4", True, math.nan, math.inf, 10**400, [4]],
    "lora_dropout": [1.0, -0.1, "0.1", math.nan, 10**400],
    "target_modules": [None, [], {}, 3, "(lin", ["nothing"], [3], [None], [""], "../../lin",
                       ["lin"], ["lin", "head"], ["../lin", "/lin"]],
    "bias": ["some", 3, "none", "all", ["all"]],
    "use_rslora": ["yes", 1],
    "fan_in_fan_out": ["yes"],
    "modules_to_save": [None, ["nothing"], 3, [3], {"head": 1}, ["head", "qkv"], ["lin"]],
    "rank_pattern": [{"^lin": 3}, {"^lin": "2"}, {"^lin": -2}, {"(": 2}, {"^lin": None}, [2], "lin",
                     {"^lin": 2**60}, {}],
    "alpha_pattern": [{"^lin": "4"}, {"^lin": math.nan}, {"(": 4}, [4], {"^lin": [4]}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key, values in BAD_VALUES.items() for value in values],
    ids=lambda value: repr(value)[:20],
)
def test_config_with_a_wrong_value_raises(key, value, model, adapter):
    change_config(adapter, **{key: value})
    assert_refused(model, adapter, ValueError, "adapter_")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2, "target_modules_bd_a": ["lin"]}),
        ("use_bdlora", {"nblocks": 2, "target_modules_bd_b": ["lin"]}),
        ("use_bdlora", {"nblocks": 0}),
        ("use_bdlora", {"nblocks": 2, "target_modules_bd_b": "lin"}),
        ("use_bdlora", {"blocks": 2}),
        ("lora_bias", 1),
        ("velora_config", 2.0),
        ("layer_replication", [[0, 1]]),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["weight"]),
        ("alora_invocation_tokens", [1]),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"x": 1}),
        ("megatron_config", {"x": 1}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", ["pissa"]),
        ("a_switch_of_tomorrow", 0.5),
    ],
)
def test_config_with_features_beyond_lora_raises_and_names_them(key, value, model, adapter):
    change_config(adapter, **{key: value})
    assert_refused(model, adapter, ValueError, CONFIG, key)


def test_config_with_lora_bias_without_the_biases_raises(model, adapter):
    change_config(adapter, lora_bias=True)
    assert_refused(model, adapter, ValueError, WEIGHTS, "lora_B.bias", "lora_bias")


def test_config_with_defaults_and_remarks_is_fine(model, adapter):
    change_config(
        adapter, use_dora=False, layer_replication=None, loftq_config={}, revision="main",
        peft_version="9.9", task_type="SEQ_CLS", a_switch_of_tomorrow=None,
        init_lora_weights="gaussian", ensure_weight_tying=True,
    )  # fmt: skip
    load_adapter(model, adapter)


# ---- the weights ----


def poke(key, value):
    def change(tensors):
        tensors[key] = tensors[key].clone()
        tensors[key].view(-1)[0] = value

    return change


def replace(key, convert):
    def change(tensors):
        tensors[key] = convert(tensors[key]).contiguous()

    return change


HEAD, BIAS = "base_model.model.head.weight", "base_model.model.lin.base_layer.bias"
EMBED_A, CONV_B = "base_model.model.embed.lora_embedding_A", "base_model.model.conv.lora_B.weight"
QKV_A, QKV_B = "base_model.model.qkv.lora_A.weight", "base_model.model.qkv.lora_B.weight"
DTYPES = [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("key", [A, B, HEAD, BIAS, EMBED_A, CONV_B, QKV_B])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_raise(key, value, model, adapter):
    change_weights(adapter, poke(key, value))
    assert_refused(model, adapter, ValueError, WEIGHTS, key)


@pytest.mark.parametrize("key", [A, B, HEAD, BIAS, EMBED_A, CONV_B, QKV_A])
def test_weights_without_a_key_raise(key, model, adapter):
    change_weights(adapter, lambda tensors: tensors.pop(key))
    assert_refused(model, adapter, ValueError, WEIGHTS, key)


@pytest.mark.parametrize(
    "key",
    [
        "extra",
        "base_model.model.extra.lora_A.weight",
        "base_model.model.head.lora_A.weight",
        "base_model.model.head.extra",
        "base_model.model.lin.lora_magnitude_vector",
        "base_model.model.lin.lora_B.bias",
        "base_model.model.lin.base_layer.weight",
        "base_model.model.lin.lora_A.default.weight",
        "base_model.model.../../../lin.lora_A.weight",
        "base_model.model./etc/passwd.lora_A.weight",
        "lin.lora_A.weight",
        "",
    ],
)
def test_weights_with_a_further_key_raise(key, model, adapter):
    change_weights(adapter, lambda tensors: tensors.update({key: torch.ones(2)}))
    assert_refused(model, adapter, ValueError, WEIGHTS, key)


@pytest.mark.parametrize("key", [A, B, HEAD, BIAS, EMBED_A, CONV_B, QKV_A])
@pytest.mark.parametrize(
    "convert",
    [
        lambda t: t[:-1],
        lambda t: torch.cat([t, t]),
        lambda t: t.unsqueeze(0),
        lambda t: t.reshape(-1, 1),
        lambda t: t[:0],
        lambda t: torch.tensor(1.0),
    ],
    ids=["short", "long", "deep", "column", "empty", "scalar"],
)
def test_weights_of_a_wrong_shape_raise(key, convert, model, adapter):
    change_weights(adapter, replace(key, convert))
    assert_refused(model, adapter, ValueError, WEIGHTS, key)


@pytest.mark.parametrize("key", [A, B, HEAD, BIAS, EMBED_A, CONV_B, QKV_A])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_a_wrong_dtype_raise(key, dtype, model, adapter):
    change_weights(adapter, replace(key, lambda tensor: tensor.to(dtype)))
    assert_refused(model, adapter, ValueError, WEIGHTS, key)


def test_weights_of_a_giant_kernel_raise_before_they_are_expanded(adapter):
    key = "base_model.model.conv.lora_A.weight"

    def swap(tensors):
        rank = tensors[key].shape[0]
        tensors[key] = torch.ones(rank, 3, 1, 100_000)

    change_weights(adapter, swap, "{}")
    assert_refused(Net(), adapter, ValueError, WEIGHTS, key, "kernel")


def test_weights_of_a_grouped_convolution_raise(adapter):
    change_weights(adapter, replace(CONV_B, lambda tensor: tensor[:, :2]), "{}")
    assert_refused(Net(), adapter, ValueError, WEIGHTS, CONV_B, "groups=9")


@pytest.mark.parametrize(("key", "other"), [(A, "lora_embedding_A"), (EMBED_A, "lora_A.weight")])
def test_weights_of_two_kinds_for_a_module_raise(key, other, model, adapter):
    path = key.removesuffix(".lora_A.weight").removesuffix(".lora_embedding_A")
    change_weights(adapter, lambda tensors: tensors.update({f"{path}.{other}": torch.ones(2, 2)}))
    assert_refused(model, adapter, ValueError, WEIGHTS, path)


def test_weights_of_another_rank_than_the_configs_raise(model, adapter):
    def shrink(tensors):
        tensors[A], tensors[B] = tensors[A][:1].contiguous(), tensors[B][:, :1].contiguous()

    change_weights(adapter, shrink)
    assert_refused(model, adapter, ValueError, WEIGHTS, A, "r=2")


def test_weights_of_other_float_dtypes_load(model, adapter):
    change_weights(adapter, lambda tensors: tensors.update(
        {key: tensor.double() for key, tensor in tensors.items()}))  # fmt: skip
    load_adapter(model, adapter)
    assert model.lin.lora_A.dtype == torch.float32


# ---- our metadata ----


def record(**fields):
    return {"r": 2, "enable_lora": [True, False, True], "out_splits": [4, 4, 4], **fields}


@pytest.mark.parametrize(
    "records",
    [
        "",
        "{",
        "[]",
        "3",
        json.dumps({"qkv": 3}),
        json.dumps({"qkv": {}}),
        json.dumps({"qkv": {"r": 2, "unknown": 1}}),
        json.dumps({"qkv": record(r=4)}),
        json.dumps({"qkv": record(r=-2)}),
        json.dumps({"qkv": record(r="2")}),
        json.dumps({"qkv": record(r=2**60)}),
        json.dumps({"qkv": record(enable_lora=[True, True, False])}),
        json.dumps({"qkv": record(enable_lora=[True, True])}),
        json.dumps({"qkv": record(enable_lora=[])}),
        json.dumps({"qkv": record(enable_lora=3)}),
        json.dumps({"qkv": record(enable_lora=None)}),
        json.dumps({"qkv": record(out_splits=None)}),
        json.dumps({"qkv": record(out_splits=[])}),
        json.dumps({"qkv": record(out_splits=[3, 5, 4])}),
        json.dumps({"qkv": record(out_splits=[4, 4, 8])}),
        json.dumps({"qkv": record(out_splits=[12, 0, 0])}),
        json.dumps({"qkv": record(out_splits=["4", "4", "4"])}),
        json.dumps({"embed": record()}),
        json.dumps({"lin": {"r": 2}}),
        json.dumps({"conv": {"r": 1}}),
        json.dumps({"conv": record()}),
        json.dumps({"nothing": record()}),
    ],
)
def test_metadata_that_is_forged_raises(records, model, adapter):
    change_weights(adapter, lambda tensors: None, records)
    assert_refused(model, adapter, ValueError, WEIGHTS)


@pytest.mark.parametrize("key", [QKV_B, "base_model.model.conv.lora_A.weight"])
def test_metadata_that_the_weights_contradict_raises(key, model, adapter):
    def poke_off_block(tensors):
        tensors[key] = tensors[key].clone()
        tensors[key].view(-1)[-1 if key != QKV_B else 3] = 7.0
        if key != QKV_B:
            tensors[key].view(tensors[key].shape[0], -1)[0, -1] = 7.0

    change_weights(adapter, poke_off_block)
    assert_refused(model, adapter, ValueError, WEIGHTS, key.rpartition(".lora")[0])


# ---- another model ----


@pytest.mark.parametrize(
    "other",
    [
        lambda: nn.Sequential(nn.Linear(8, 6)),
        lambda: nn.ModuleDict({"lin": nn.Linear(8, 6)}),
        lambda: nn.Linear(8, 6),
        lambda: nn.Sequential(),
    ],
)
def test_model_without_the_modules_raises(other, adapter):
    assert_refused(other(), adapter, ValueError, "adapter_")


def test_model_with_modules_of_another_size_or_kind_raises(adapter):
    for name, module in [
        ("lin", nn.Linear(9, 6)),
        ("lin", nn.Embedding(6, 8)),
        ("lin", nn.LayerNorm(8)),
        ("lin", nn.Bilinear(8, 8, 6)),
        ("lin", nn.Linear(8, 6, bias=False)),
        ("embed", nn.Embedding(8, 8)),
        ("conv", nn.Conv2d(3, 4, 2)),
        ("conv", nn.Conv1d(3, 4, 3)),
        ("head", nn.Linear(4, 3)),
        ("head", nn.Linear(4, 2, bias=False)),
    ]:
        model = Net()
        setattr(model, name, module)
        assert_refused(model, adapter, ValueError, "adapter_", name)


def test_model_with_other_lora_layers_raises(adapter):
    assert_refused(adapted(r=3), adapter, ValueError, WEIGHTS, "rank 3")
    fewer = adapted()
    fewer.lin = nn.Linear(8, 6)
    assert_refused(fewer, adapter, ValueError, CONFIG, "'lin'")
    more = adapted()
    more.extra = copy.deepcopy(more.lin)
    assert_refused(more, adapter, ValueError, CONFIG, "'extra'")
    other = adapted()
    other.qkv = LoRAMergedLinear(6, 12, r=2, enable_lora=[True, True, False])
    assert_refused(other, adapter, ValueError, WEIGHTS, QKV_A, "LoRAMergedLinear")


def test_base_weight_of_a_lora_layer_is_refused_outside_of_base_layer(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(5, 4)

        def get_input_embeddings(self):
            return self.emb

    save_adapter(apply_lora(Model(), r=2, lora_alpha=1, target_modules=["emb"]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file) | {"base_model.model.emb.weight": torch.full((5, 4), 7.0)}
    save_file(tensors, file, {"format": "pt"})
    plain = Model()
    before = plain.emb.weight.clone()
    with pytest.raises(ValueError, match=r"base_model\.model\.emb\.weight: unexpected"):
        load_adapter(plain, tmp_path)
    assert torch.equal(plain.emb.weight, before)
