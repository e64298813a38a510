"""lora_linear over a frozen weight that is not dense."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lora_kernels
from lora_kernels.testing.problem import make_problem
from lora_kernels.testing.tolerance import assert_close
from tests.frozen import Int8Linear, int8_weight
from tests.op_calls import Calls

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NAMES = ("x", "a", "b")


def make_case(dtype, device, *, bias=True, dropout_p=0.0, lora_dtype=None, m=(2, 9)):
    """A layer, and a problem whose w and bias are what the layer multiplies by."""
    layer = Int8Linear(24, 20, bias=bias, dtype=dtype, device=device)
    problem = make_problem(
        m, 20, 24, 5, device=device, dtype=dtype, lora_dtype=lora_dtype, bias=bias,
        dropout_p=dropout_p,
    )  # fmt: skip
    problem.w, problem.bias = layer.dense(dtype), layer.bias
    return layer, problem


def call(weight, problem, x, a, b):
    seed = problem.seed if problem.dropout_p else None
    options = {"scaling": problem.scaling, "dropout_p": problem.dropout_p, "seed": seed}
    return lora_kernels.lora_linear(x, weight, a, b, **options)


def solve(weight, problem, names=NAMES):
    leaves = [getattr(problem, name).detach().requires_grad_(name in names) for name in NAMES]
    y = call(weight, problem, *leaves)
    grads = torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], problem.dy)
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


@pytest.mark.parametrize("products", ["own", "float32"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lora_dtype", [None, torch.float32], ids=["own", "float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradients(
    dtype, lora_dtype, bias, dropout_p, products, seed, device, monkeypatch
):
    monkeypatch.setenv("LORA_KERNELS_CPU_PRODUCTS", products)
    layer, problem = make_case(
        dtype, device, bias=bias, dropout_p=dropout_p,
        lora_dtype=None if dtype == torch.float64 else lora_dtype,
    )  # fmt: skip
    exact, baseline = problem.solve(torch.float64), problem.solve()
    for name, result in solve(int8_weight(layer), problem).items():
        assert_close(result, exact[name], baseline[name], name)


def test_the_forward_is_the_layers_own(seed, device):
    """Also if it is not the product with dense(), as if activations are rounded to 8 bits."""
    layer, problem = make_case(torch.float32, device)
    layer.forward = lambda x: x.new_ones((*x.shape[:-1], 24))
    result = solve(int8_weight(layer, exact=False), problem)
    h = problem.x.double() @ problem.a.double().T
    expected = 1 + problem.scaling * h @ problem.b.double().T
    torch.testing.assert_close(result["y"], expected.float())
    exact, baseline = problem.solve(torch.float64), problem.solve()
    assert_close(result["x"], exact["x"], baseline["x"])


def test_nothing_of_the_base_is_kept(seed, device):
    layer, problem = make_case(torch.float32, device, dropout_p=0.1)
    kept = []
    leaves = [getattr(problem, name).detach().requires_grad_() for name in NAMES]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = call(int8_weight(layer), problem, *leaves)
    owned = {t.data_ptr() for t in (*leaves, problem.seed)}
    (h,) = [t for t in kept if t.data_ptr() not in owned]
    assert h.shape == (18, 5)
    assert {id(value) for value in vars(y.grad_fn).values() if isinstance(value, torch.Tensor)} <= {
        id(leaf) for leaf in leaves
    }


@pytest.mark.parametrize("names", [("x",), ("a",), ("b",), ("a", "b"), ("x", "b"), ("x", "a")])
def test_only_the_gradients_that_are_asked_for(names, seed, device):
    layer, problem = make_case(torch.float32, device, dropout_p=0.3)
    everything = solve(int8_weight(layer), problem)
    for name, result in solve(int8_weight(layer), problem, names).items():
        assert torch.equal(result, everything[name]), name


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck_and_gradgradcheck(dropout_p, seed, device):
    layer, problem = make_case(torch.float64, device, dropout_p=dropout_p, m=3)
    leaves = [getattr(problem, name).requires_grad_() for name in NAMES]

    def function(*operands):
        return call(int8_weight(layer), problem, *operands)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_the_layers_own_bias_may_train(seed, device):
    layer, problem = make_case(torch.float32, device)
    layer.bias.requires_grad_()
    y = call(int8_weight(layer), problem, problem.x, problem.a, problem.b)
    (grad,) = torch.autograd.grad(y, [layer.bias], problem.dy)
    torch.testing.assert_close(grad, problem.dy.flatten(0, 1).sum(0))


def test_opcheck(seed, device):
    _, problem = make_case(torch.float32, device, dropout_p=0.3)
    y = torch.randn(2, 9, 24, device=device)
    arguments = (y, problem.x, problem.a, problem.b, problem.seed, 2.0, 0.3, [24], [True])
    torch.library.opcheck(torch.ops.lora_kernels.add_lora.default, arguments)


@pytest.mark.parametrize("products", ["auto", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_whole_with_any_number_of_rows(dtype, products, seed, device, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_CPU_PRODUCTS", products)
    layer, problem = make_case(dtype, device, dropout_p=0.3)
    weight = int8_weight(layer)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(*operands):
        return call(weight, problem, *operands)

    for m in (7, 12):
        operands = [getattr(problem, name).detach().requires_grad_() for name in NAMES]
        x = operands[0] = torch.randn(m, 20, device=device, dtype=dtype, requires_grad=True)
        expected, result = call(weight, problem, *operands), compiled(*operands)
        torch.testing.assert_close(result, expected)
        dy = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(result, operands, dy), torch.autograd.grad(expected, operands, dy)
        )
        assert x.shape[0] == m


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_bit(reentrant, seed, device):
    layer, problem = make_case(torch.float32, device, dropout_p=0.3)
    leaves = [getattr(problem, name).detach().requires_grad_() for name in NAMES]

    def function(*operands):
        return call(int8_weight(layer), problem, *operands)

    plain = torch.autograd.grad(function(*leaves), leaves, problem.dy)
    checkpoint(function, *leaves, use_reentrant=reentrant).backward(problem.dy)
    for leaf, grad in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, grad)


def test_a_base_that_multiplies_in_another_dtype(seed, device):
    """x is float32, and the layer takes it to bfloat16 and back, as bitsandbytes' layers do."""
    layer, problem = make_case(torch.float32, device)
    own = layer.forward
    layer.forward = lambda x: own(x.bfloat16()).float()
    layer.bias.data = layer.bias.data.bfloat16()
    problem.bias = layer.bias.float()
    result = solve(int8_weight(layer, dtype=torch.bfloat16), problem)
    narrow, exact = problem.solve(torch.bfloat16), problem.solve(torch.float64)
    for name, value in result.items():
        assert value.dtype == torch.float32
        if name in ("a", "b"):
            assert_close(value, exact[name], problem.solve()[name], name)
        else:
            assert_close(value.bfloat16(), exact[name], narrow[name], name)


def test_may_be_changed_in_place(seed, device):
    layer, problem = make_case(torch.float32, device)
    leaves = [getattr(problem, name).detach().requires_grad_() for name in NAMES]
    y = call(int8_weight(layer), problem, *leaves)
    y.relu_()
    y.sum().backward()
    assert leaves[0].grad is not None


def test_under_transforms_the_formula_computes(seed, device):
    layer, problem = make_case(torch.float64, device)
    problem.dy = torch.ones_like(problem.dy)
    expected = solve(int8_weight(layer), problem)

    def loss(a):
        return call(int8_weight(layer), problem, problem.x, a, problem.b).sum()

    torch.testing.assert_close(torch.func.grad(loss)(problem.a), expected["a"])


@pytest.mark.parametrize("products", ["own", "float32"])
def test_hooks_on_the_layer_act_forward_and_backward(products, seed, device, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_CPU_PRODUCTS", products)
    layer, problem = make_case(torch.bfloat16, device)
    layer.register_forward_hook(lambda layer, args, y: 2 * y)
    called = []
    layer.register_full_backward_hook(lambda layer, dx, dy: called.append(layer))
    results = solve(int8_weight(layer), problem)
    assert called == [layer]
    problem.w, problem.bias = 2 * problem.w, 2 * problem.bias
    exact, baseline = problem.solve(torch.float64), problem.solve()
    for name, result in results.items():
        assert_close(result, exact[name], baseline[name], name)


def test_a_record_keeps_the_seed_that_is_given(seed, device):
    layer, problem = make_case(torch.float32, device, dropout_p=0.4)

    def function(x):
        return call(int8_weight(layer), problem, x, problem.a, problem.b)

    recorded = torch.jit.trace(function, (problem.x,))
    torch.testing.assert_close(recorded(problem.x), function(problem.x))


def test_jagged(seed, device):
    layer, problem = make_case(torch.float32, device)
    parts = [torch.randn(m, 20, device=device) for m in (3, 5)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    y = call(int8_weight(layer), problem, x, problem.a, problem.b)
    for got, part in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(
            got, call(int8_weight(layer), problem, part, problem.a, problem.b)
        )


def test_bad_arguments(seed, device):
    layer, problem = make_case(torch.float32, device)
    weight, a, b = int8_weight(layer), problem.a, problem.b
    with pytest.raises(ValueError, match=r"lora_linear: bias must be None"):
        lora_kernels.lora_linear(problem.x, weight, a, b, layer.bias)
    for wrong in (layer, layer.codes):
        with pytest.raises(TypeError, match=r"weight must be .*; .* as frozen_weight\(layer\)"):
            lora_kernels.lora_linear(problem.x, wrong, a, b)
    with pytest.raises(ValueError, match=r"lora_linear: x must have shape \[..., 20\]"):
        lora_kernels.lora_linear(problem.x[..., :3], weight, a, b)
    with pytest.raises(ValueError, match=r"lora_linear: lora_A must have shape \[5, 20\]"):
        lora_kernels.lora_linear(problem.x, weight, a[:, :3], b)
    with pytest.raises(ValueError, match="lora_linear: dropout_p must be in"):
        lora_kernels.lora_linear(problem.x, weight, a, b, dropout_p=1.0)
    elsewhere = torch.empty(4, 20, device="meta")
    with pytest.raises(ValueError, match="x must be on the base layer's device"):
        lora_kernels.lora_linear(elsewhere, weight, a, b)


def test_add_lora_is_called_once_and_the_backward_once(seed, device):
    layer, problem = make_case(torch.float32, device)
    with Calls() as calls:
        solve(int8_weight(layer), problem)
    assert calls.names == ["add_lora", "lora_linear_backward"]


@pytest.mark.parametrize("algorithm", ["fused", "addmm"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_on_kernels(dtype, algorithm, seed, device, monkeypatch):
    """Also if a CPU would rather multiply in float32: kernels take operands of one dtype."""
    monkeypatch.setenv("LORA_KERNELS_CPU_PRODUCTS", "float32")
    layer, problem = make_case(dtype, device, dropout_p=0.3)
    exact, baseline = problem.solve(torch.float64), problem.solve()
    for name, result in solve(int8_weight(layer), problem).items():
        assert_close(result, exact[name], baseline[name], name)
