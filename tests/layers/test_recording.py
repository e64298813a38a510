"""Every layer under torch.jit.trace, torch.fx, torch.export and the exporters of ONNX."""

import inspect
import io

import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels import LoRAConv2d, LoRAEmbedding, LoRALinear
from tests.layers.cases import LAYERS, build

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
MAKERS = LAYERS | {
    "embedding": lambda **kw: LoRAEmbedding(12, 20, r=3, **kw),
    "embedding with max_norm": lambda **kw: LoRAEmbedding(12, 20, r=3, max_norm=1.0, **kw),
    "conv": lambda **kw: LoRAConv2d(4, 6, 3, r=2, padding=1, padding_mode="circular", **kw),
}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
every_merge = pytest.mark.parametrize("merge_weights", [True, False], ids=["merging", "on the fly"])


def built(make, device, **options):
    return build(make, device, dtype=torch.float64, **options)


def example(layer, device, m=5):
    if isinstance(layer, LoRAEmbedding):
        return torch.randint(12, (m, 3), device=device)
    shape = (m, 4, 6, 6) if isinstance(layer, LoRAConv2d) else (m, 12)
    return torch.randn(shape, dtype=torch.float64, device=device)


RECORDERS = {
    "trace": lambda layer, x: torch.jit.trace(layer, x),
    "fx": lambda layer, x: torch.fx.symbolic_trace(layer),
    "fx, inside": lambda layer, x: torch.fx.symbolic_trace(nn.Sequential(layer)),
    "export": lambda layer, x: exported(layer, x),
}


def exported(layer, x):
    module = torch.export.export(layer, (x,)).module
    guarded = "check_guards" in inspect.signature(module).parameters  # not on torch 2.8
    return module(check_guards=False) if guarded else module()


@every_maker
@every_merge
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("record", RECORDERS.values(), ids=RECORDERS)
def test_what_is_recorded_computes_the_same(
    record, training, merge_weights, make, seed, device, recwarn
):
    layer = built(make, device, merge_weights=merge_weights).train(training)
    x = example(layer, device)
    recorded = record(layer, x)
    assert layer.merged == (merge_weights and not training)  # recording changes nothing
    torch.testing.assert_close(recorded(x), layer(x))
    assert not [w for w in recwarn if issubclass(w.category, torch.jit.TracerWarning)]


@every_maker
@pytest.mark.parametrize(
    "record", [RECORDERS[name] for name in ("trace", "fx")], ids=["trace", "fx"]
)
def test_what_is_recorded_takes_other_batches_and_has_gradients(record, make, seed, device):
    layer = built(make, device)
    recorded = record(layer, example(layer, device))
    x = example(layer, device, m=8)
    factors = [dict(m.named_parameters()) for m in (recorded, layer)]
    ours, theirs = (
        torch.autograd.grad(m(x).pow(3).sum(), [named["lora_A"], named["lora_B"]])
        for m, named in zip((recorded, layer), factors, strict=True)
    )
    torch.testing.assert_close(ours, theirs)


def test_fx_keeps_the_layers_own_dropout(seed, device):
    for make in (LAYERS["linear"], MAKERS["conv"]):
        layer = built(make, device, lora_dropout=0.5, merge_weights=False)
        x = example(layer, device)
        recorded = torch.fx.symbolic_trace(layer.eval())
        torch.testing.assert_close(recorded.eval()(x), layer(x))
        recorded.train()
        assert not torch.equal(recorded(x), recorded(x))


def test_trace_of_a_layer_in_training_drops_anew_in_every_call(seed, device):
    layer = built(LAYERS["linear"], device, lora_dropout=0.5)
    x = example(layer, device)
    traced = torch.jit.trace(layer, x, check_trace=False)
    assert not torch.equal(traced(x), traced(x))


def test_fx_of_a_merged_layer_that_was_changed_computes_on_the_fly(seed, device):
    layer = built(LAYERS["linear"], device).eval()
    x = example(layer, device)
    with torch.no_grad():
        layer.lora_B.mul_(2)
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(x), layer(x))


def test_fx_records_functions_as_one_call(seed, device):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            shapes = {"weight": (6, 12), "a": (2, 12), "b": (6, 2)}
            for name, shape in shapes.items():
                setattr(self, name, nn.Parameter(torch.randn(shape, device=device)))

        def forward(self, x):
            one = lora_kernels.lora_linear(x, self.weight, self.a, self.b, scaling=2.0)
            two = lora_kernels.lora_merged_linear(
                x, self.weight, self.a, self.b, enable_lora=[True], dropout_p=0.0
            )
            three, four = lora_kernels.lora_shared_linear(
                x, [self.weight] * 2, [self.a] * 2, [self.b] * 2
            )
            return one + two + three + four

    net, x = Net(), torch.randn(3, 12, device=device)
    recorded = torch.fx.symbolic_trace(net)
    torch.testing.assert_close(recorded(x), net(x))


def test_trace_of_functions(seed, device):
    w, a, b = (torch.randn(*shape, device=device) for shape in ((6, 12), (4, 12), (4, 2)))
    own = torch.tensor([7], device=device)

    def merged(x):
        return lora_kernels.lora_merged_linear(
            x, w, a, b, enable_lora=[True, False, True], out_splits=[2, 2, 2],
            dropout_p=0.5, seed=own,
        )  # fmt: skip

    x, other = torch.randn(3, 12, device=device), torch.randn(7, 12, device=device)
    traced = torch.jit.trace(merged, x)
    for batch in (x, other):
        torch.testing.assert_close(traced(batch), merged(batch))


@every_merge
@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "dynamo"])
@pytest.mark.parametrize("name", ["linear", "unequal groups", "embedding", "conv"])
def test_onnx(name, dynamo, merge_weights, seed, device):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    layer = build(MAKERS[name], device, merge_weights=merge_weights).eval()
    x = example(layer, device)
    x = x if x.dtype == torch.int64 else x.float()
    if dynamo:
        file = io.BytesIO(
            torch.onnx.export(layer, (x,), dynamo=True).model_proto.SerializeToString()
        )
    else:
        torch.onnx.export(layer, (x,), file := io.BytesIO(), dynamo=False)
    session = runtime.InferenceSession(file.getvalue())
    (y,) = session.run(None, {session.get_inputs()[0].name: x.cpu().numpy()})
    torch.testing.assert_close(torch.from_numpy(y), layer(x).detach().cpu(), rtol=1e-4, atol=1e-4)


def test_a_layer_of_its_own_class_can_be_recorded(seed, device):
    class Doubled(LoRALinear):
        def forward(self, x):
            return super().forward(x) * 2

    layer = built(lambda **kw: Doubled(12, 20, r=3, **kw), device)
    x = example(layer, device)
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(x), layer(x))
    torch.testing.assert_close(torch.jit.trace(layer, x)(x), layer(x))
