"""report(): what it says of each layer is what the layer then does."""

import json
import pickle

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import ModelHook, add_hook_to_module
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn
from torch.distributed.fsdp import fully_shard

import lora_kernels as lora
from lora_kernels import patch_peft, report
from lora_kernels.dispatch import algorithm
from lora_kernels.dispatch.algorithm import Algorithm, GemmShape
from lora_kernels.report_rows import Report, Row
from tests.op_calls import Calls
from tests.tiny_models import tiny_gpt2, tiny_llama

REFERENCE = "on a CPU PyTorch's operators run"


pytestmark = pytest.mark.usefixtures("unpatched")


@pytest.fixture
def no_interpreter(monkeypatch):
    """As in the process of a user without a GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("LORA_KERNELS_PLAN", "auto")


class Net(nn.Module):
    """Every kind of layer in a row: ids [B, 5] -> [B, 12, 5]."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.lin = nn.Linear(16, 8)
        self.conv = nn.Conv1d(8, 12, 3, padding=1)

    def forward(self, ids):
        return self.conv(self.lin(self.embed(ids)).transpose(1, 2))


def own_model(**options):
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["embed", "lin", "conv"], **options}
    return lora.apply_lora(Net(), **options)


def peft_model(base=None, **options):
    options = {"r": 2, "target_modules": ["embed", "lin", "conv"], **options}
    return peft.get_peft_model(Net() if base is None else base, peft.LoraConfig(**options))


def test_report_of_own_layers(device):
    linear, reason = torch.float32, "there are no kernels for it: it runs PyTorch's operators"
    model = own_model().to(device)
    chosen = algorithm.choose(GemmShape(4096, 8, 16, 2, torch.float32, device))
    assert report(model) == [
        Row("embed", "LoRAEmbedding", (11, 16), (2,), linear, False, None, reason),
        Row("lin", "LoRALinear", (8, 16), (2,), linear, True, *chosen),
        Row("conv", "LoRAConv1d", (12, 8, 3), (2,), linear, False, None, reason),
    ]
    with Calls() as calls:
        model(torch.zeros(1, 5, dtype=torch.int64, device=device))
    assert calls.fused == 1


def test_report_of_own_layers_that_run_as_plain_ones(device):
    merged = own_model(merge_weights=True).eval()
    assert {row.reason for row in report(merged)} == {"its adapter is merged"}
    assert {row.ranks for row in report(merged)} == {(2,)}
    (row,) = report(lora.Linear(4, 6))
    assert (row.ranks, row.fused, row.reason) == ((), False, "it has no adapter (r = 0)")

    class Own(lora.LoRALinear):
        def forward(self, x):
            return super().forward(x) + 1

    assert report(Own(4, 6, r=1))[0].reason == "it has a forward of its own"


def test_plan_of_a_row_reads_its_algorithm(device):
    rows = report(own_model().to(device))
    assert [row.plan for row in rows] == [row.algorithm for row in rows]
    assert "plan" not in rows[0]._asdict()


def test_report_of_layouts_and_groups(device):
    layers = nn.Sequential(
        lora.Linear(4, 6, r=1, fan_in_fan_out=True),
        lora.MergedLinear(6, 9, r=3, enable_lora=[True, False, True]),
    ).to(device)
    first, second = report(layers)
    assert (first.name, first.weight, first.fused) == ("0", (6, 4), True)
    assert (second.name, second.weight, second.ranks, second.fused) == ("1", (9, 6), (3,), True)
    with Calls() as calls:
        layers(torch.randn(2, 4, device=device))
    assert calls.fused == 2


def test_report_of_pefts_layers(device):
    model = peft_model().to(device)
    assert {row.reason for row in report(model)} == {"patch_peft() has not been called"}
    patch_peft()
    embed, linear, conv = report(model)
    assert embed.name == "base_model.model.embed"
    assert embed.reason == "Embedding of PEFT has a forward of its own"
    assert (embed.kind, embed.weight) == ("peft Embedding(Embedding)", (11, 16))
    assert (linear.kind, linear.weight) == ("peft Linear(Linear)", (8, 16))
    assert (linear.ranks, linear.dtype, linear.fused) == ((2,), torch.float32, True)
    assert (conv.kind, conv.fused, conv.algorithm) == ("peft Conv1d(Conv1d)", False, None)


def test_report_of_a_llama_and_a_gpt2():
    patch_peft()
    llama = report(peft_model(tiny_llama(), target_modules="all-linear"))
    assert len(llama) == 14
    assert {(row.kind, row.fused) for row in llama} == {("peft Linear(Linear)", True)}
    gpt2 = report(peft_model(tiny_gpt2(), target_modules=["c_attn"], fan_in_fan_out=True))
    assert {(row.kind, row.weight) for row in gpt2} == {("peft Linear(Conv1D)", (24, 8))}
    assert all(row.fused for row in gpt2)


def test_report_of_a_rank_that_is_padded_for_hotswapping():
    model = peft_model()
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    patch_peft()
    assert [row.ranks for row in report(model)] == [(2,), (6,), (2,)]


class Packed(nn.Linear):
    """A linear whose weight is stored as bitsandbytes stores 4-bit weights."""

    def __init__(self, *args):
        super().__init__(*args)
        packed = torch.zeros((self.weight.numel() // 2, 1), dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


def test_report_of_a_packed_weight_has_the_shape_that_it_stands_for():
    model = peft_model()
    lin = model.base_model.model.lin
    lin.base_layer = Packed(16, 8)
    (row,) = [row for row in report(model) if row.name.endswith("lin")]
    assert (row.weight, row.dtype, row.fused) == ((8, 16), torch.uint8, False)
    del lin.base_layer.weight  # some libraries call it qweight
    (row,) = [row for row in report(model) if row.name.endswith("lin")]
    assert (row.weight, row.dtype) == ((8, 16), None)


class InProjection(nn.Module, lora.LoRALayer):
    """A user's layer on the mixin, with a base weight of another name."""

    def __init__(self):
        nn.Module.__init__(self)
        lora.LoRALayer.__init__(self, r=2, lora_alpha=1, lora_dropout=0.0, merge_weights=False)
        self.in_proj_weight = nn.Parameter(torch.randn(12, 4), requires_grad=False)
        self.lora_A, self.lora_B = nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.ones(12, 2))

    def forward(self, x):
        return x @ (self.in_proj_weight + self.lora_B @ self.lora_A * self.scaling).T


def test_report_and_merged_state_dict_of_a_users_own_layer(tmp_path):
    model = nn.Sequential(InProjection(), lora.Linear(12, 4, r=2))
    nn.init.ones_(model[1].lora_B)
    first, second = report(model)
    assert (first.kind, first.weight, first.ranks, first.fused) == ("InProjection", (), (2,), False)
    assert second.weight == (4, 12)
    assert "InProjection" in str(report(model))
    with pytest.warns(UserWarning, match=r"0 \(InProjection\)"):
        merged = lora.merged_state_dict(model)
    assert list(merged) == ["0.in_proj_weight", "0.lora_A", "0.lora_B", "1.weight", "1.bias"]
    assert torch.equal(merged["1.weight"], model[1].merged_weight())
    with pytest.raises(ValueError, match=r"0 \(InProjection\) .* lora_state_dict"):
        lora.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_report_of_active_adapters():
    patch_peft()
    model = peft_model(target_modules=["lin"])
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["lin"]))
    assert report(model)[0].ranks == (2,)
    model.set_adapter("other")
    assert report(model)[0].ranks == (3,)
    model.base_model.set_adapter(["default", "other"])
    (row,) = report(model)
    assert (row.ranks, row.fused) == ((2, 3), True)
    assert row.reason.startswith("2 adapters in one; ")


def test_report_of_hooks_of_accelerate_before_and_after_the_patch(device):
    model = peft_model(target_modules=["lin"]).to(device)
    layer = model.base_model.model.lin
    add_hook_to_module(layer, ModelHook())
    patch_peft()
    (row,) = report(model)
    assert row.reason == "it has a forward of its own, such as a hook from before patch_peft()"
    again = peft_model(target_modules=["lin"]).to(device)
    add_hook_to_module(again.base_model.model.lin, ModelHook())
    assert report(again)[0].fused
    for tree, expected in ((model, 0), (again, 1)):
        with Calls() as calls:
            tree(torch.zeros(1, 5, dtype=torch.int64, device=device))
        assert calls.fused == expected


def test_algorithm_of_a_cpu_is_the_reference_and_says_why(no_interpreter):
    patch_peft()
    for model in (own_model(), peft_model()):
        assert [row.algorithm for row in report(model) if row.fused] == ["reference"]
        assert REFERENCE in str(report(model))


def test_algorithm_is_that_of_the_product(monkeypatch):
    """At these tokens, in the dtype under autocast, with dropout in training only."""
    shapes = []

    def choose(shape):
        shapes.append(shape)
        return Algorithm("addmm", "because")

    monkeypatch.setattr(algorithm, "choose", choose)
    patch_peft()
    for model in (own_model(lora_dropout=0.1, merge_weights=False), peft_model(lora_dropout=0.1)):
        assert [row[-2:] for row in report(model, tokens=7) if row.fused] == [("addmm", "because")]
        with torch.autocast("cpu", torch.bfloat16):
            report(model.eval(), tokens=9)
    cpu = torch.device("cpu")
    expected = [
        GemmShape(7, 8, 16, 2, torch.float32, cpu, dropout=True, tma=True),
        GemmShape(9, 8, 16, 2, torch.bfloat16, cpu, dropout=False, tma=True),
    ]
    assert [shape for shape in shapes if not shape.backward] == 2 * expected
    expected = [shape._replace(backward=True) for shape in expected]
    assert [shape for shape in shapes if shape.backward] == 2 * expected


def test_algorithm_of_the_backward_is_told_behind_the_forwards_if_it_is_another(monkeypatch):
    def choose(shape):
        return Algorithm(*(("addmm", "no") if shape.backward else ("fused", "measured")))

    monkeypatch.setattr(algorithm, "choose", choose)
    patch_peft()
    for model in (own_model(), peft_model()):
        (row,) = [row for row in report(model) if row.fused]
        assert (row.algorithm, row.reason) == ("fused", "measured; backward: addmm, no")


@pytest.mark.parametrize(
    ("in_features", "out_features", "dtype", "forward", "backward"),
    [
        (8, 8, "float32", True, True), (6, 8, "float32", False, False),
        (8, 6, "float32", True, False),
        (8, 8, "bfloat16", True, True), (4, 8, "bfloat16", False, False),
        (8, 4, "bfloat16", True, False),
    ],
)  # fmt: skip
def test_tma_compliance_is_that_of_x_or_dy_and_weight(
    in_features, out_features, dtype, forward, backward, monkeypatch
):
    seen = []

    def choose(shape):
        seen.append((shape.backward, shape.tma))
        return Algorithm("x", "y")

    monkeypatch.setattr(algorithm, "choose", choose)
    report(lora.Linear(in_features, out_features, r=1, dtype=getattr(torch, dtype)))
    with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
        report(lora.Linear(in_features, out_features, r=1))
    assert seen == 2 * [(False, forward), (True, backward)]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(16, 8), nn.Linear(16, 12), nn.Linear(16, 4)

    def forward(self, x):
        return torch.cat([self.query(x), self.key(x), self.value(x)], -1)


def test_algorithm_of_layers_that_share_x_is_that_of_their_one_call(monkeypatch, device):
    model = lora.apply_lora(
        Attention(), r=2, lora_alpha=2, target_modules=["query", "key", "value"]
    ).to(device)
    lora.share_inputs(model, [("query", "key")])
    shapes = []

    def choose(shape):
        shapes.append(shape)
        return Algorithm("addmm", "because")

    monkeypatch.setattr(algorithm, "choose", choose)
    together = "because; in one call with 1 other layer"
    assert [row.reason for row in report(model)] == [together, together, "because"]
    assert [p.n for p in shapes if not p.backward] == [20, 20, 4]
    assert [p.n for p in shapes if p.backward] == [20, 20, 4]
    model.key.merge_weights = True
    model.key.eval()  # merged: the others compute alone
    assert [row.reason for row in report(model)] == ["because", "its adapter is merged", "because"]
    monkeypatch.undo()
    model.train()
    expected = [row.algorithm for row in report(model)]
    with Calls() as calls:
        model(torch.randn(3, 16, device=device))
    assert calls.names == ["lora_shared_linear_forward", "lora_linear_forward"]
    assert expected[0] == expected[1]


def test_report_of_meta_models():
    patch_peft()
    for model in (own_model(), peft_model()):
        (row,) = [row for row in report(model.to("meta")) if row.fused]
        assert row.algorithm == "reference"


def test_report_is_a_list_and_a_table(no_interpreter):
    model = own_model(r=3)
    rows = report(model, tokens=12)
    assert isinstance(rows, list)
    assert [row._asdict()["name"] for row in rows] == ["embed", "lin", "conv"]
    assert rows.tokens == 12
    copied = pickle.loads(pickle.dumps(rows))
    assert (copied, copied.tokens, str(copied)) == (rows, 12, str(rows))
    assert str(rows).splitlines() == [
        "3 LoRA layers: 2 on PyTorch's operators, 1 on one PyTorch op; for 12 tokens",
        "layer  kind           weight  rank  dtype    runs on",
        "embed  LoRAEmbedding  11x16   3     float32  PyTorch's operators  [1]",
        "lin    LoRALinear     8x16    3     float32  one PyTorch op       [2]",
        "conv   LoRAConv1d     12x8x3  3     float32  PyTorch's operators  [1]",
        "[1] there are no kernels for it: it runs PyTorch's operators",
        f"[2] {REFERENCE}",
    ]


def deep(count: int) -> nn.Module:
    """Layers of one kind at several places, and one that differs from them."""
    blocks = nn.Sequential(*(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(count)))
    others = {"head": nn.Linear(4, 6), "list": nn.Sequential(nn.Linear(4, 4))}
    model = nn.ModuleDict({"blocks": blocks, **others})
    return lora.apply_lora(model, r=2, lora_alpha=4, rank_pattern={"blocks.0.q": 1})


def test_layers_of_one_kind_are_one_line(no_interpreter):
    text = str(report(deep(5))).splitlines()
    assert text[0] == "7 LoRA layers: 7 on one PyTorch op; for 4096 tokens"
    assert [line.split()[0] for line in text[2:6]] == ["blocks.0.q", "q", "head", "list.0"]
    assert text[3].split()[:3] == ["q", "x4", "LoRALinear"]
    assert len(text) == 7
    every = str(report(deep(5), verbose=True)).splitlines()
    assert [line.split()[0] for line in every[2:9]] == [
        *(f"blocks.{index}.q" for index in range(5)), "head", "list.0",
    ]  # fmt: skip


def test_the_table_fits_100_columns(no_interpreter):
    patch_peft()
    model = nn.ModuleDict({"a_name_that_is_far_too_long_for_any_column_of_a_table": deep(2)})
    model["p"] = peft_model(tiny_llama(), target_modules="all-linear", use_dora=True)
    for verbose in (False, True):
        lines = str(report(model, verbose=verbose)).splitlines()
        assert max(map(len, lines)) <= 100
        assert sum(line.startswith("[") for line in lines) == len({r.reason for r in report(model)})


def test_as_dict_is_json(no_interpreter):
    found = json.loads(json.dumps(report(own_model(), tokens=7).as_dict()))
    assert found["tokens"] == 7
    assert found["runs_on"] == {"PyTorch's operators": 2, "one PyTorch op": 1}
    assert found["layers"][1] == {
        "name": "lin", "kind": "LoRALinear", "weight": [8, 16], "ranks": [2], "dtype": "float32",
        "fused": True, "algorithm": "reference", "reason": REFERENCE, "runs_on": "one PyTorch op",
    }  # fmt: skip


def test_what_a_layer_runs_on(monkeypatch):
    assert [row.runs_on for row in report(peft_model(target_modules=["lin"]))] == ["PEFT's code"]
    monkeypatch.setenv("LORA_KERNELS_PLAN", "addmm")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (row,) = report(own_model(target_modules=["lin"]))
    assert row.runs_on == "Triton kernels"
    assert "Triton kernels, addmm" in str(report(own_model(target_modules=["lin"])))


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"report: model must be an nn\.Module, got 'x'"):
        report("x")


def test_report_of_what_fully_shard_gathers_is_fused_in_the_forward(tmp_path, device):
    """fully_shard leaves DTensors behind; between its hooks the weights are plain."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        patch_peft()
        model = peft_model(target_modules=["lin"]).to(device)
        fully_shard(model)
        (outside,) = report(model)
        assert (outside.fused, outside.reason) == (
            False,
            "base_layer.weight is a DTensor as it stands; if fully_shard gathers it, ask in the "
            "forward",
        )
        inside = []
        model.base_model.model.lin.register_forward_hook(lambda *_: inside.extend(report(model)))
        with Calls() as calls:
            model(torch.zeros(1, 5, dtype=torch.int64, device=device))
        assert [row.fused for row in inside] == [True]
        assert calls.fused == 1
    finally:
        dist.destroy_process_group()


def test_report_names_layers_without_wrappers():
    model = own_model()
    names = [row.name for row in report(model)]
    model.lin = torch.compile(model.lin, backend="eager")
    assert [row.name for row in report(torch.compile(model, backend="eager"))] == names


def test_report_of_a_model_without_lora():
    rows = report(nn.Linear(2, 2))
    assert isinstance(rows, Report)
    assert rows == []
    assert str(rows) == "0 LoRA layers; for 4096 tokens"


@pytest.mark.parametrize("tokens", [0, -1, 1.5, None, "8"])
def test_tokens_that_are_not_a_count(tokens):
    with pytest.raises(ValueError, match=r"report: tokens must be an integer >= 1, got"):
        report(nn.Linear(2, 2), tokens=tokens)


def test_a_model_without_weights_is_asked_about_another_device(no_interpreter):
    model = nn.Sequential(nn.Linear(64, 32, device="meta"))
    lora.apply_lora(model, r=4, lora_alpha=8)
    (row,) = report(model)
    assert row.reason == "there are no kernels for meta"
    (row,) = report(model, device="cpu")
    assert (row.reason, row.weight, row.ranks) == (REFERENCE, (32, 64), (4,))
