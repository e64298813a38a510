"""patch_peft() over quantised bases: the same numbers as PEFT's, and nothing of the base kept."""

import contextlib
import copy
import itertools
import sys
import weakref

import pytest
import torch
from torch import nn

from lora_kernels import patch_peft, report, unpatch_peft
from lora_kernels.quantization import find
from lora_kernels.testing.problem import make_problem
from lora_kernels.testing.tolerance import assert_close
from tests.op_calls import Calls
from tests.quantized import INEXACT, KINDS

peft = pytest.importorskip("peft")
from tests.peft_models import quantised_lora_layer  # noqa: E402

N, K, R = 64, 128, 4
every_kind = pytest.mark.parametrize("kind", KINDS)
both_products = pytest.mark.parametrize("products", ["own", "float32"])
WIDE, NARROW = torch.float32, torch.bfloat16


@contextlib.contextmanager
def without_patch():
    unpatch_peft()
    yield
    patch_peft()


def factors(layer):
    return [getattr(layer, f"lora_{name}")["default"].weight for name in "AB"]


def problem_of(layer, dtype, lora_dtype):
    """The same product over the dense weight."""
    base = layer.get_base_layer()
    problem = make_problem(
        (3, 11), K, N, R, device="cpu", dtype=dtype, lora_dtype=lora_dtype,
        bias=base.bias is not None,
    )  # fmt: skip
    problem.w = find(base).dense(torch.float32)
    problem.bias = None if base.bias is None else base.bias.detach().float()
    problem.a, problem.b = (factor.detach() for factor in factors(layer))
    return problem


def solve(layer, x, dy):
    x = x.detach().requires_grad_()
    y = layer(x)
    grads = torch.autograd.grad(y, [x, *factors(layer)], dy.to(y.dtype), allow_unused=True)
    return {"y": y.detach(), **dict(zip("xab", grads, strict=True))}


def baseline_of(problem):
    """Plain PyTorch's results in the problem's own dtypes."""
    own = copy.copy(problem)
    own.w = own.w.to(problem.x.dtype)
    own.bias = None if own.bias is None else own.bias.to(problem.x.dtype)
    return own.solve()


@pytest.mark.parametrize("lora_dtype", [WIDE, NARROW], ids=str)
@pytest.mark.parametrize("dtype", [WIDE, NARROW], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@every_kind
def test_right_against_float64_over_the_dense_weight(kind, bias, dtype, lora_dtype, seed, patched):
    layer = quantised_lora_layer(kind, bias=bias, dtype=dtype, lora_dtype=lora_dtype)
    problem = problem_of(layer, dtype, lora_dtype)
    exact, baseline = problem.solve(torch.float64), baseline_of(problem)
    (row,) = report(layer)
    assert row.fused, row.reason
    results = solve(layer, problem.x, problem.dy)
    if kind in INEXACT:  # y is what the layer's own kernels give, with the update
        own = layer.get_base_layer()(problem.x).double()
        x, a, b = (getattr(problem, name).double() for name in "xab")
        exact["y"] = own + problem.scaling * x @ a.T @ b.T
    for name, result in results.items():
        assert_close(result, exact[name], baseline[name], name)


@pytest.mark.parametrize("autocast", [False, True])
@both_products
@pytest.mark.parametrize(
    "kind", ["nf4-nested", "int8", "torchao-int8", "torchao-float8", "hqq-4", "quanto-int4"]
)
def test_dtypes_are_those_of_peft(kind, products, autocast, seed, patched, monkeypatch):
    """For every x, dtype that the base multiplies in, and dtype of the factors, if PEFT's runs."""
    monkeypatch.setenv("LORA_KERNELS_CPU_PRODUCTS", products)

    def dtypes(x, dy, **options):
        layer = quantised_lora_layer(kind, **options)
        with torch.autocast("cpu", NARROW, enabled=autocast):
            results = solve(layer, x, dy)
        state = {name: value.dtype for name, value in layer.get_base_layer().named_parameters()}
        return results, state

    compared = 0
    for x_dtype, dtype, lora_dtype in itertools.product(
        (WIDE, NARROW, torch.float16), (WIDE, NARROW), (WIDE, NARROW)
    ):
        x, dy = torch.randn(3, 11, K).to(x_dtype), torch.randn(3, 11, N)
        options = {"dtype": dtype, "lora_dtype": lora_dtype}
        with without_patch():
            try:
                torch.manual_seed(0)
                expected, expected_state = dtypes(x, dy, **options)
            except (RuntimeError, ValueError):
                continue  # the base does not take this x
        torch.manual_seed(0)
        actual, state = dtypes(x, dy, **options)
        compared += 1
        for name, value in expected.items():
            assert actual[name].dtype == value.dtype, (name, x_dtype, dtype, lora_dtype)
            error = (actual[name].double() - value.double()).norm()
            assert error <= 0.02 * value.double().norm(), (name, x_dtype, dtype, lora_dtype)
        if products == "own":
            assert state == expected_state
    assert compared >= 4 or (autocast and kind.startswith(("hqq", "quanto")))
    assert compared == 12 or kind not in ("nf4-nested", "int8", "torchao-int8")


@both_products
@pytest.mark.parametrize("first", [WIDE, NARROW, torch.float16], ids=str)
def test_the_first_x_decides_what_a_4bit_layer_computes_in(
    first, products, seed, patched, monkeypatch
):
    monkeypatch.setenv("LORA_KERNELS_CPU_PRODUCTS", products)

    def run():
        layer = quantised_lora_layer("nf4", seed=1)
        base = layer.get_base_layer()
        base.compute_dtype, base.compute_type_is_set = None, False
        y = layer(torch.ones(32, K, dtype=first))
        return y.dtype, base.compute_dtype, base.compute_type_is_set, base.bias.dtype

    with without_patch():
        expected = run()
    assert run() == expected


def test_an_8bit_layer_takes_its_state_over_as_ever(seed, patched):
    layer = quantised_lora_layer("int8")
    base, x, dy = layer.get_base_layer(), torch.randn(5, K), torch.randn(5, N)
    assert base.state.CB is None
    assert base.weight.CB is not None
    first = solve(layer, x, dy)
    assert base.state.CB is not None
    assert base.weight.CB is None
    for name, value in solve(layer, x, dy).items():
        assert torch.equal(value, first[name])
    assert base.state_dict().keys() == {"weight", "bias", "SCB", "weight_format"}


@both_products
@pytest.mark.parametrize("dtype", [WIDE, NARROW], ids=str)
@every_kind
def test_under_dropout_the_backward_is_the_adjoint(
    kind, dtype, products, seed, patched, monkeypatch
):
    """<dy, y> = <dx, x> for dy = y, as y is linear in x; what rounds x to 8 bits, is so nearly."""
    monkeypatch.setenv("LORA_KERNELS_CPU_PRODUCTS", products)
    layer = quantised_lora_layer(kind, bias=False, dtype=dtype, lora={"lora_dropout": 0.4})
    x = torch.randn(3, 11, K, dtype=dtype, requires_grad=True)
    with Calls() as calls:
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, y.detach())
    assert calls.names[-1] == "lora_linear_backward"
    left, right = y.detach().double().square().sum(), (dx.double() * x.detach().double()).sum()
    assert abs(left - right) <= (1e-5 if dtype == WIDE and kind not in INEXACT else 5e-3) * left
    again = layer(x)
    assert not torch.equal(again, y)  # another mask


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@every_kind
def test_what_is_kept_is_h_and_the_seed_beside_x(kind, dropout, seed, patched, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_CPU_PRODUCTS", "own")  # so that one dense weight is made
    layer = quantised_lora_layer(kind, dtype=NARROW, lora={"lora_dropout": dropout})
    x = torch.randn(3, 11, K, dtype=NARROW, requires_grad=True)
    kind_of_weight, made = type(find(layer.get_base_layer())), []
    dense = kind_of_weight.dense

    def watched(*args):
        weight = dense(*args)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(kind_of_weight, "dense", watched)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    owned = {tensor.data_ptr() for tensor in (x, *factors(layer))}
    kept = [tensor for tensor in saved if tensor.data_ptr() not in owned]
    seed_bytes = 8 if dropout else 0
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == 33 * R * 4 + seed_bytes
    assert not [value for value in vars(y.grad_fn).values() if isinstance(value, torch.Tensor)]
    above = [node for node, _ in y.grad_fn.next_functions if node is not None]
    assert {type(node).__name__ for node in above} == {"AccumulateGrad"}
    y.sum().backward()
    assert len(made) == 1
    assert not any(weight() is not None for weight in made)


def test_a_packed_weight_gives_right_gradients_and_is_left_alone(seed, patched):
    """On a CPU with AVX512-BF16 eval() packs it; such a weight has no backward of its own."""
    layer = quantised_lora_layer("nf4-nested", n=64, k=128, lora_dtype=WIDE)
    base, x, dy = layer.get_base_layer(), torch.randn(40, K), torch.randn(40, N)
    before = solve(layer, x, dy)
    layer.eval()
    with torch.no_grad():
        layer(x)
    layer.train()
    packed = getattr(base.weight.quant_state, "packing_format_for_cpu", False)
    state = base.weight.quant_state
    held = {"codes": base.weight.data.clone(), "scales": state.absmax.clone()}
    (row,) = report(layer)
    assert row.fused
    after = solve(layer, x, dy)
    assert torch.equal(base.weight.data, held["codes"])
    assert torch.equal(base.weight.quant_state.absmax, held["scales"])
    assert base.weight.quant_state is state
    for name, value in before.items():
        error = (after[name] - value).norm()
        assert error <= (0.01 if packed else 0.0) * value.norm(), name


@both_products
@pytest.mark.parametrize("dtype", [WIDE, NARROW], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_a_bias_of_the_base_may_train(kind, dtype, products, seed, patched, monkeypatch):
    """bitsandbytes turns it into x's dtype, in its first forward."""
    monkeypatch.setenv("LORA_KERNELS_CPU_PRODUCTS", products)

    def run():
        torch.manual_seed(0)
        layer = quantised_lora_layer(kind, dtype=WIDE, lora={"bias": "all"})
        bias = layer.get_base_layer().bias
        assert bias.requires_grad
        if kind == "torchao-int8" and dtype != WIDE:
            layer.get_base_layer().bias.data = bias.data.to(dtype)
        layer(torch.ones(5, K, dtype=dtype)).float().square().sum().backward()
        return layer, bias

    with without_patch():
        _, expected = run()
    layer, bias = run()
    assert report(layer)[0].fused
    assert bias.grad.dtype == expected.grad.dtype
    assert bias.dtype == expected.dtype
    torch.testing.assert_close(bias.grad, expected.grad, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["nf4-nested", "int8", "torchao-int8", "hqq-4", "quanto-int8"])
def test_compiles_whole_before_any_call(kind, seed, patched, monkeypatch):
    monkeypatch.setattr(sys.modules["lora_kernels.quantization.find"], "_readers", {})
    torch.compiler.reset()
    layer = quantised_lora_layer(kind)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled.lora_A, compiled.lora_B = layer.lora_A, layer.lora_B
    for rows in (5, 9):
        x, dy = torch.randn(rows, K), torch.randn(rows, N)
        results, expected = solve(compiled, x, dy), solve(layer, x, dy)
        for name, value in results.items():
            torch.testing.assert_close(value, expected[name], msg=name)


def small_llama(seed=0):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def test_dynamic_int8_has_the_gradients_of_the_dense_model(seed, patched):
    """torchao's forward has no backward: adapters below such a layer learn from the residuals."""
    quantization = pytest.importorskip("torchao.quantization")
    dense, config = small_llama(), quantization.Int8DynamicActivationInt8WeightConfig()
    quantised = copy.deepcopy(dense)
    is_base = [name for name, module in dense.named_modules() if isinstance(module, nn.Linear)]
    is_base.remove("lm_head")
    quantization.quantize_(quantised, config, filter_fn=lambda module, name: name in is_base)
    with torch.no_grad():
        for name in is_base:
            weight = quantised.get_submodule(name).weight.dequantize()
            dense.get_submodule(name).weight.copy_(weight)
    ids, grads = torch.randint(64, (4, 32)), []
    for base in (dense, quantised):
        torch.manual_seed(1)
        lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=is_base)
        model = peft.get_peft_model(base, lora)
        for name, factor in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(factor, std=0.02)
        assert all(row.fused for row in report(model))
        model.train()(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    expected, actual = (torch.cat(some) for some in grads)
    assert torch.cosine_similarity(actual, expected, dim=0) > 0.999
