"""The guard of patch_peft() over quantised bases: what it takes, and what it leaves to PEFT."""

import re
import subprocess
import sys
import textwrap

import pytest
import torch

from lora_kernels import patch_peft, report, unpatch_peft
from lora_kernels.integrations.peft import quantized
from lora_kernels.quantization import find
from tests.op_calls import Calls

peft = pytest.importorskip("peft")
from tests.peft_models import quantised_lora_layer  # noqa: E402

N, K = 64, 128
pytestmark = pytest.mark.usefixtures("unpatched")


def base(change):
    return lambda layer: change(layer.get_base_layer())


def hooked(module):
    module.register_forward_hook(lambda *args: None)


def own_forward(module):
    module.forward = lambda x: type(module).forward(module, x) * 2


def add_active(layer):
    layer.update_layer("other", 2, 2, peft.LoraConfig(init_lora_weights=False))
    layer.set_adapter(["default", "other"])


def deprecated_orientation(module):
    """A weight that was quantised as [K, N]."""
    module.weight.quant_state.shape = torch.Size(reversed(module.weight.quant_state.shape))
    module.weight.data = module.weight.data.T  # [1, N*K/2], by which bitsandbytes knows it


def unquantised(module):
    """As it is before it is on its device."""
    module.weight, module.quant_state = type(module)(K, N).weight, None


def trained_codes(module):
    """Codes may be stored in a floating-point dtype, for FSDP, and such a tensor may train."""
    module.weight.data = module.weight.data.view(-1, 2).view(torch.bfloat16)
    trained_weight(module)


def subclassed(module):
    module.__class__ = type("Mine", (type(module),), {})


def trained_weight(module):
    module.weight.requires_grad_()


# The kind, options of LoraConfig, the change, and the reason.
LEFT_TO_PEFT = {
    "base hook": ("nf4", {}, base(hooked), "base_layer has hooks"),
    "8 bit base hook": ("int8", {}, base(hooked), "base_layer has hooks"),
    "A hook": ("nf4", {}, lambda layer: hooked(layer.lora_A["default"]), "lora_A has hooks"),
    "base forward": (
        "nf4", {}, base(own_forward), "base_layer is a Linear4bit: it has a forward of its own",
    ),
    "base subclass": ("nf4", {}, base(subclassed), "base_layer is a Mine: it is of no class"),
    "disabled": ("nf4", {}, lambda layer: layer.enable_adapters(False), "are disabled"),
    "merged": ("nf4", {}, lambda layer: layer.merge(), "its adapters are merged"),
    "8 bit merged": ("int8", {}, lambda layer: layer.merge(), "its adapters are merged"),
    "two active": (
        "nf4", {"lora_dropout": 0.1}, add_active, "adapters are active, and each has a dropout mask"
    ),
    "DoRA over rounded x": (
        "torchao-int8-dynamic", {"use_dora": True}, lambda layer: None,
        "base_layer rounds x as well",
    ),
    "[K, N]": (
        "nf4", {}, base(deprecated_orientation), r"quantised as \[128, 64\], not as \[out_features",
    ),
    "trained torchao weight": (
        "torchao-int8", {}, base(trained_weight), "its weight requires grad: freeze it",
    ),
    "float64 adapter": (
        "nf4", {}, lambda layer: (layer.lora_A.double(), layer.lora_B.double()),
        "its adapter is float64 and its base",
    ),
}  # fmt: skip


def run(layer):
    """y and every gradient, or the error."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, K, requires_grad=True)
    try:
        y = layer(x)
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad and p.is_leaf)]
        grads = torch.autograd.grad(y.sum(), leaves, allow_unused=True)
    except Exception as error:
        return [type(error), str(error)]
    return [y.detach(), *(grad for grad in grads if grad is not None)]


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(left, right, strict=True)
    )


def make(case):
    kind, lora, change, _ = LEFT_TO_PEFT[case]
    torch.manual_seed(0)
    layer = quantised_lora_layer(kind, lora=lora)
    change(layer)
    return layer


@pytest.mark.filterwarnings("ignore:Merge lora module to:UserWarning")
@pytest.mark.parametrize("case", LEFT_TO_PEFT)
def test_left_to_peft(case):
    expected = run(make(case))
    patch_peft()
    layer = make(case)
    with Calls() as calls:
        results = run(layer)
    assert calls.names == []
    assert same(results, expected)
    (row,) = report(layer)
    assert not row.fused
    assert re.search(LEFT_TO_PEFT[case][-1], row.reason), row.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (unquantised, "it has no quant_state: move it to its device"),
        (trained_codes, "its weight requires grad"),
    ],
    ids=["unquantised", "trained"],
)
def test_what_peft_cannot_run_either_is_told(change, reason):
    patch_peft()
    layer = quantised_lora_layer("nf4")
    change(layer.get_base_layer())
    (row,) = report(layer)
    assert not row.fused
    assert reason in row.reason


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_a_replaced_forward_of_the_bases_class_is_left_to_peft(kind, monkeypatch):
    patch_peft()
    layer = quantised_lora_layer(kind)
    owner = type(layer.get_base_layer())
    own = owner.forward
    assert report(layer)[0].fused
    monkeypatch.setattr(owner, "forward", lambda self, x: own(self, x) + 1)
    with Calls() as calls:
        y = layer(torch.zeros(3, K))
    assert calls.names == []
    unpatch_peft()
    assert torch.equal(y, layer(torch.zeros(3, K)))
    patch_peft()
    (row,) = report(layer)
    assert not row.fused
    assert "forward has been replaced" in row.reason


@pytest.mark.parametrize(
    ("kind", "expected", "dtype"),
    [
        ("nf4", "peft Linear4bit(Linear4bit nf4)", torch.bfloat16),
        ("fp4-nested", "peft Linear4bit(Linear4bit fp4)", torch.bfloat16),
        ("int8", "peft Linear8bitLt(Linear8bitLt int8)", None),
        ("torchao-int8", "peft TorchaoLoraLinear(Linear int8)", None),
        ("torchao-float8", "peft TorchaoLoraLinear(Linear float8)", torch.bfloat16),
        ("hqq-4", "peft HqqLoraLinear(HQQLinear hqq, 4 bits)", torch.bfloat16),
        ("quanto-int8", "peft Linear(QLinear qint8)", torch.bfloat16),
    ],
)
def test_report_says_kind_and_plan(kind, expected, dtype):
    patch_peft()
    layer = quantised_lora_layer(kind, dtype=torch.bfloat16)
    (row,) = report(layer)
    assert (row.kind, row.weight, row.dtype, row.ranks) == (expected, (N, K), dtype, (4,))
    assert row.fused
    assert row.reason.startswith("the layer's own product, then the update; backward by its weight")
    assert "None" not in str(report(layer))


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_eval_is_fused_and_agrees(kind, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_CPU_PRODUCTS", "own")  # so that the layer multiplies
    layer = quantised_lora_layer(kind).eval()
    x = torch.randn(3, 11, K)
    with torch.no_grad():
        expected = layer(x)
        patch_peft()
        with Calls() as calls:
            y = layer(x)
    assert calls.names == ["add_lora"]
    assert report(layer)[0].fused
    assert (y - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_samples_with_adapters_of_their_own_run_pefts_code(kind):
    layer = quantised_lora_layer(kind).eval()
    layer.update_layer("other", 2, 2, peft.LoraConfig(init_lora_weights=False))
    x, names = torch.randn(3, 5, K), ["default", "__base__", "other"]
    with torch.no_grad():
        expected = layer(x, adapter_names=names)
        patch_peft()
        with Calls() as calls:
            y = layer(x, adapter_names=names)
    assert calls.names == []
    assert torch.equal(y, expected)


def test_the_8bit_layer_of_llm_int8_has_the_backward_of_bitsandbytes():
    """In eval() it rounds x to 8 bits; x still gets a gradient, by the dense weight."""
    layer = quantised_lora_layer("int8").eval()
    assert not find(layer.get_base_layer()).exact
    expected = run(layer)
    patch_peft()
    for result, value in zip(run(layer), expected, strict=True):
        assert (result - value).norm() <= 1e-3 * value.norm()


def test_an_unknown_version_of_a_class_keeps_its_forward(monkeypatch):
    layer, int8 = quantised_lora_layer("nf4"), quantised_lora_layer("int8")
    kind, known = type(layer), dict(quantized._KNOWN_FORWARDS)
    own = kind.forward
    monkeypatch.setattr(
        quantized, "_KNOWN_FORWARDS", {**known, "peft.tuners.lora.bnb.Linear4bit": ("another",)}
    )
    patch_peft()
    assert kind.forward is own
    (row,) = report(layer)
    assert row.reason == "Linear4bit.forward of this PEFT is not that of a known version"
    assert report(int8)[0].fused


def test_users_classes_are_left_alone():
    """One that derives from a patched class is fused only if it has that class's forward."""
    layer = quantised_lora_layer("nf4")
    upstream = type(layer)
    own = upstream.forward
    patch_peft()

    class Mine(upstream):
        def forward(self, x):
            return super().forward(x) + 1

    class Plain(peft.tuners.lora.layer.LoraLayer):
        def forward(self, x):
            return x

    assert own is not upstream.forward
    mine, plain = Mine.forward, Plain.forward
    layer.__class__ = Mine
    (row,) = report(layer)
    assert row.reason == "Mine of PEFT has a forward of its own"
    unpatch_peft()
    assert upstream.forward is own
    assert Mine.forward is mine
    assert Plain.forward is plain


LATE = """
    import sys
    import peft.tuners.lora.layer
    import lora_kernels
    sys.modules.pop("peft.tuners.lora.bnb", None)
    lora_kernels.patch_peft()
    assert "peft.tuners.lora.bnb" not in sys.modules
    from peft import LoraConfig, get_peft_model
    from tests.peft_models import QuantisedNet
    model = get_peft_model(QuantisedNet("nf4"), LoraConfig(target_modules=["layer"]))
    kind, module = type(model.base_model.model.layer), sys.modules["peft.tuners.lora.bnb"]
    assert kind is module.Linear4bit
    (row,) = lora_kernels.report(model)
    assert row.fused, row
    assert "Linear4bit(Linear4bit nf4)" in row.kind, row
    assert module.Linear8bitLt.forward.__wrapped__
    lora_kernels.unpatch_peft()
    assert not hasattr(kind.forward, "__wrapped__")
    assert not hasattr(module.Linear8bitLt.forward, "__wrapped__")
    assert "__init_subclass__" not in vars(peft.tuners.lora.layer.LoraLayer)
    (row,) = lora_kernels.report(model)
    assert row.reason == "patch_peft() has not been called"
    lora_kernels.patch_peft()
    assert lora_kernels.report(model)[0].fused
"""


def test_pefts_module_of_bitsandbytes_may_be_imported_after_the_patch():
    pytest.importorskip("bitsandbytes")
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(LATE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
