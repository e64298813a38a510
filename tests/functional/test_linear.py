"""lora_linear and lora_merged_linear: results, gradients, and every part of PyTorch around them."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lora_kernels
from lora_kernels.ops import linear as ops
from lora_kernels.testing.problem import OPERANDS, make_problem
from lora_kernels.testing.tolerance import assert_close
from tests.calls import call, solve

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
QKV = [(12, True), (4, False), (8, True)]


# Results must not depend on how they are computed. On a CPU the kernels are interpreted.
every_algorithm = pytest.mark.parametrize(
    "algorithm", ["reference", "fused", "addmm"], indirect=True
)


@pytest.mark.parametrize("groups", [None, QKV], ids=["linear", "merged"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradients(dtype, bias, dropout_p, groups, seed, device):
    problem = make_problem(
        (2, 9), 20, 24, 5, device=device, dtype=dtype, bias=bias, dropout_p=dropout_p,
        groups=groups,
    )  # fmt: skip
    exact, baseline = problem.solve(torch.float64), problem.solve()
    results = solve(problem)
    assert results.keys() == exact.keys()
    for name, result in results.items():
        assert_close(result, exact[name], baseline[name], name)


@pytest.mark.parametrize("groups", [None, QKV], ids=["linear", "merged"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck_and_gradgradcheck(groups, dropout_p, seed, device):
    problem = make_problem(
        3, 5, 24, 2, device=device, dtype=torch.float64, dropout_p=dropout_p, groups=groups
    )
    leaves = [value.requires_grad_() for value in problem.operands().values()]

    def function(*operands):
        return call(problem, **dict(zip(OPERANDS, operands, strict=True)))

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@every_algorithm
@pytest.mark.parametrize("groups", [None, QKV], ids=["linear", "merged"])
def test_every_subset_of_gradients(groups, seed, device):
    problem = make_problem(4, 6, 24, 2, device=device, dropout_p=0.5, groups=groups)
    expected = solve(problem)
    for needs in itertools.product([False, True], repeat=5):
        leaves = {
            name: getattr(problem, name).detach().requires_grad_(needed)
            for name, needed in zip(OPERANDS, needs, strict=True)
        }
        y = call(problem, **leaves)
        assert y.requires_grad == any(needs), needs
        if any(needs):
            y.backward(problem.dy)
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == leaf.requires_grad, (needs, name)
            if leaf.requires_grad:
                assert torch.equal(leaf.grad, expected[name]), (needs, name)


@pytest.mark.parametrize("needs", [n for n in itertools.product([False, True], repeat=5) if any(n)])
@pytest.mark.parametrize("groups", [None, QKV], ids=["linear", "merged"])
def test_double_backward_of_every_subset(groups, needs, seed, device):
    problem = make_problem(
        2, 3, 24, 1, device=device, dtype=torch.float64, dropout_p=0.4, groups=groups
    )
    asked = [name for name, needed in zip(OPERANDS, needs, strict=True) if needed]
    leaves = [getattr(problem, name).requires_grad_() for name in asked]

    def function(*operands):
        return call(problem, **dict(zip(asked, operands, strict=True)))

    if "x" in asked and "b" in asked and not {"w", "a"} & set(asked):
        grads = torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="lora_A"):
            sum(grad.sum() for grad in grads).backward()
    else:
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def count_backward_products(monkeypatch, needs, problem):
    """The op's needs argument, as the Function passes it."""
    seen = []
    real = ops.lora_linear_backward

    def spy(*args):
        seen.append(list(args[-1]))
        return real(*args)

    monkeypatch.setattr(ops, "lora_linear_backward", spy)
    for name, needed in zip(OPERANDS, needs, strict=True):
        getattr(problem, name).requires_grad_(needed)
    call(problem).backward(problem.dy)
    return seen


@pytest.mark.parametrize("needs", [n for n in itertools.product([False, True], repeat=5) if any(n)])
def test_only_the_gradients_asked_for_are_computed(monkeypatch, needs, seed, device):
    problem = make_problem(4, 6, 8, 2, device=device)
    assert count_backward_products(monkeypatch, needs, problem) == [list(needs)]


@every_algorithm
@pytest.mark.parametrize("needs", [n for n in itertools.product([False, True], repeat=5) if any(n)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_saves_nothing_beyond_x_h_the_seed_and_the_parameters(needs, dropout_p, seed, device):
    problem = make_problem(12, 9, 10, 2, device=device, dropout_p=dropout_p)
    for name, needed in zip(OPERANDS, needs, strict=True):
        getattr(problem, name).requires_grad_(needed)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call(problem)
    inputs = {value.data_ptr() for value in problem.operands().values()}
    extra = [tensor for tensor in saved if tensor.data_ptr() not in inputs]
    seeds = [tensor for tensor in extra if tensor.dtype == torch.int64]
    h = [tensor for tensor in extra if tensor.dtype != torch.int64]
    needs_x, needs_w, needs_a, needs_b, _ = needs
    assert [tuple(tensor.shape) for tensor in h] == [(12, 2)] * needs_b
    assert len(seeds) == (dropout_p > 0 and (needs_x or needs_a))
    names = {value.data_ptr(): name for name, value in problem.operands().items()}
    kept = {names[tensor.data_ptr()] for tensor in saved if tensor.data_ptr() in inputs}
    assert ("x" in kept) == (needs_w or needs_a)
    assert ("w" in kept) == needs_x
    assert "bias" not in kept
    y.backward(problem.dy)


@every_algorithm
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("groups", [None, QKV], ids=["linear", "merged"])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_whole_with_one_graph_for_every_m(backend, groups, seed, device):
    torch._dynamo.reset()
    problem = make_problem(2, 16, 24, 4, device=device, dropout_p=0.3, groups=groups)

    @torch.compile(backend=backend, fullgraph=True)
    def step(x, w, a, b, bias):
        return call(problem, x=x, w=w, a=a, b=b, bias=bias)

    for m in (7, 12, 33):
        problem.x = torch.randn(m, 16, device=device)
        problem.dy = torch.randn(m, 24, device=device)
        leaves = [v.detach().clone().requires_grad_() for v in problem.operands().values()]
        torch._dynamo.mark_dynamic(leaves[0], 0)
        y = step(*leaves)
        grads = torch.autograd.grad(y, leaves, problem.dy)
        eager = solve(problem)
        for name, result in zip(["y", *OPERANDS], [y, *grads], strict=True):
            assert torch.equal(result, eager[name]), name
    torch._dynamo.reset()


def test_a_compiled_function_draws_a_new_seed_in_every_call(device):
    torch._dynamo.reset()
    problem = make_problem(8, 32, 8, 4, device=device)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x):
        return lora_kernels.lora_linear(x, problem.w, problem.a, problem.b, dropout_p=0.5)

    assert not torch.equal(step(problem.x), step(problem.x))
    torch._dynamo.reset()


@every_algorithm
def test_exports(seed, device):
    problem = make_problem(6, 16, 24, 4, device=device, groups=QKV)

    class Model(torch.nn.Module):
        def forward(self, x):
            return call(problem, x=x)

    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(Model(), (problem.x,), dynamic_shapes=({0: batch},))
    x = torch.randn(9, 16, device=device)
    assert torch.equal(exported.module()(x), call(problem, x=x))


@every_algorithm
@pytest.mark.parametrize("groups", [None, QKV], ids=["linear", "merged"])
def test_torch_func_grad(groups, seed, device):
    problem = make_problem(5, 6, 24, 2, device=device, dropout_p=0.2, groups=groups)
    operands = tuple(problem.operands().values())

    def loss(*operands):
        y = call(problem, **dict(zip(OPERANDS, operands, strict=True)))
        return (y * problem.dy).sum()

    grads = torch.func.grad(loss, argnums=tuple(range(5)))(*operands)
    expected = solve(problem)
    for name, grad in zip(OPERANDS, grads, strict=True):
        assert torch.equal(grad, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", ["autocast", "float32"])
def test_autocast_casts_x_weight_and_bias_but_not_the_adapters(dtype, x_dtype, seed, device):
    problem = make_problem(9, 16, 12, 3, device=device, dropout_p=0.25)
    low = make_problem(
        9, 16, 12, 3, device=device, dtype=dtype, lora_dtype=torch.float32, dropout_p=0.25
    )
    low.seed, low.dy = problem.seed, problem.dy.to(dtype)
    for name in ("x", "w", "bias"):
        setattr(low, name, getattr(problem, name).to(dtype))
    low.a, low.b = problem.a, problem.b
    leaves = {name: v.clone().requires_grad_() for name, v in problem.operands().items()}
    if x_dtype == "autocast":
        leaves["x"] = low.x.clone().requires_grad_()
    with torch.autocast(device.type, dtype):
        y = call(problem, **leaves)
    assert y.dtype == dtype
    grads = torch.autograd.grad(y, list(leaves.values()), low.dy)
    expected = solve(low)
    assert torch.equal(y, expected["y"])
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        assert grad.dtype == leaf.dtype
        assert torch.equal(grad, expected[name].to(leaf.dtype)), name


@pytest.mark.parametrize("algorithm", ["fused", "addmm"], indirect=True)
@pytest.mark.parametrize("under", [True, False])
def test_under_autocast_products_round_float32_factors_and_gradients_do_not(
    under, algorithm, seed, device, monkeypatch
):
    from lora_kernels.kernels import linear

    asked, of = [], linear.numerics_of

    def numerics_of(*operands, narrow):
        asked.append(narrow)
        return of(*operands, narrow=narrow)

    monkeypatch.setattr(linear, "numerics_of", numerics_of)
    problem = make_problem(
        5, 8, 6, 2, device=device, dtype=torch.float16, lora_dtype=torch.float32, bias=False
    )
    x, w, a, b = (t.requires_grad_() for t in (problem.x, problem.w, problem.a, problem.b))
    with torch.autocast(device.type, torch.float16, enabled=under):
        y = lora_kernels.lora_linear(x, w.detach(), a, b)
    y.sum().backward()
    assert asked == [under, under]
    assert (y.dtype, x.grad.dtype) == (torch.float16,) * 2
    assert (a.grad.dtype, b.grad.dtype) == (torch.float32,) * 2


def test_autocast_leaves_float64_alone(seed, device):
    problem = make_problem(3, 4, 5, 2, device=device, dtype=torch.float64)
    with torch.autocast(device.type, torch.bfloat16):
        y = call(problem)
    assert torch.equal(y, call(problem))


@every_algorithm
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("groups", [None, QKV], ids=["linear", "merged"])
def test_checkpointing_recomputes_the_same_mask(use_reentrant, groups, seed, device):
    problem = make_problem(
        12, 16, 24, 4, device=device, dtype=torch.float64, dropout_p=0.5, bias=False, groups=groups
    )
    problem.seed = None

    def function(x, a):
        merged = {"enable_lora": problem.splits.enabled, "out_splits": problem.splits.sizes}
        name = "lora_linear" if len(problem.splits.sizes) == 1 else "lora_merged_linear"
        return getattr(lora_kernels, name)(
            x, problem.w, a, problem.b, scaling=2.0, dropout_p=0.5,
            **(merged if name == "lora_merged_linear" else {}),
        )  # fmt: skip

    x, a = problem.x.requires_grad_(), problem.a.requires_grad_()
    y = checkpoint(function, x, a, use_reentrant=use_reentrant)
    y.backward(problem.dy)
    # Without bias y is linear in x for a given mask, so the two inner products agree; and the part
    # of y that depends on a is linear in a.
    torch.testing.assert_close((problem.dy * y).sum(), (x.grad * x).sum())
    frozen = problem.x.detach() @ problem.w.T
    torch.testing.assert_close((problem.dy * (y - frozen)).sum(), (a.grad * a).sum())


def test_selective_checkpointing_sees_the_op(device):
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    problem = make_problem(4, 8, 8, 2, device=device)
    problem.a.requires_grad_()
    seen = []

    def policy(ctx, op, *args, **kwargs):
        seen.append(op)
        return CheckpointPolicy.MUST_SAVE

    y = checkpoint(
        lambda x: call(problem, x=x), problem.x, use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )  # fmt: skip
    y.backward(problem.dy)
    assert torch.ops.lora_kernels.lora_linear_forward.default in seen
    assert torch.equal(problem.a.grad, solve(problem)["a"])


@every_algorithm
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_recorded(mode, seed, device):
    problem = make_problem(3, 4, 5, 2, device=device)
    expected = call(problem)
    problem.a.requires_grad_()
    with mode():
        y = call(problem)
    assert not y.requires_grad
    assert torch.equal(y, expected)


def test_meta_tensors_give_shapes():
    problem = make_problem((2, 3), 8, 24, 2, device="meta", dropout_p=0.5, groups=QKV)
    leaves = {name: v.requires_grad_() for name, v in problem.operands().items()}
    y = call(problem)
    assert y.device.type == "meta"
    assert y.shape == (2, 3, 24)
    y.backward(problem.dy)
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves.values())


@every_algorithm
def test_the_seed_decides_and_the_default_comes_from_torchs_generator(device):
    problem = make_problem(16, 32, 8, 4, device=device, dropout_p=0.5)
    assert torch.equal(call(problem), call(problem))

    def drawn():
        return lora_kernels.lora_linear(problem.x, problem.w, problem.a, problem.b, dropout_p=0.5)

    torch.manual_seed(1)
    first, second = drawn(), drawn()
    torch.manual_seed(1)
    assert torch.equal(drawn(), first)
    assert not torch.equal(first, second)


@every_algorithm
@pytest.mark.parametrize(
    "view",
    {
        "transposed": lambda x: x.T.contiguous().T,
        "sliced columns": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
        "negative offset": lambda x: torch.cat([x, x])[x.shape[0] :],
        "expanded": lambda x: x[:1].expand(x.shape[0], -1),
        "overlapping": lambda x: x.flatten().as_strided((x.shape[0], x.shape[1]), (3, 1)),
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("operand", ["x", "w", "a", "b", "dy"])
def test_any_strides(view, operand, seed, device):
    problem = make_problem(10, 12, 24, 6, device=device, dropout_p=0.2, groups=QKV)
    setattr(problem, operand, view[1](getattr(problem, operand)))
    exact, baseline = problem.solve(torch.float64), problem.solve()
    leaves = [
        (value if name == operand else value.clone()).detach().requires_grad_()
        for name, value in problem.operands().items()
    ]
    y = call(problem, **dict(zip(problem.operands(), leaves, strict=True)))
    grads = torch.autograd.grad(y, leaves, problem.dy)
    for name, result in zip(["y", *problem.operands()], [y, *grads], strict=True):
        assert_close(result.detach(), exact[name], baseline[name], name)


@every_algorithm
@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 7), (2, 1, 2, 3, 7), (0, 7), (2, 0, 7)])
def test_any_number_of_leading_dimensions(shape, seed, device):
    problem = make_problem(shape[:-1], 7, 24, 2, device=device, groups=QKV)
    results = solve(problem)
    exact, baseline = problem.solve(torch.float64), problem.solve()
    for name, result in results.items():
        assert_close(result, exact[name], baseline[name], name)


@every_algorithm
@pytest.mark.parametrize("groups", [None, QKV], ids=["linear", "merged"])
@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7)])
def test_the_output_may_be_changed_in_place(shape, groups, seed, device):
    problem = make_problem(shape[:-1], 7, 24, 2, device=device, groups=groups)
    x = problem.x.requires_grad_()
    (expected,) = torch.autograd.grad(torch.relu(call(problem)).sum(), x)
    (actual,) = torch.autograd.grad(torch.nn.ReLU(inplace=True)(call(problem)).sum(), x)
    assert torch.equal(actual, expected)


@every_algorithm
@pytest.mark.parametrize("operand", ["x", "w", "a", "b", "bias", "dy"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_value_reaches_no_unrelated_element(operand, value, seed, device):
    problem = make_problem(6, 8, 24, 2, device=device, groups=QKV)
    clean = solve(problem)
    getattr(problem, operand).view(-1)[9 if operand != "bias" else 2] = value  # row 1 of x: col 1
    results = solve(problem)
    rows = {"x": 1, "dy": 0}
    if operand in rows:
        others = [row for row in range(6) if row != rows[operand]]
        touched = ["y", "x"] if operand == "dy" else ["y"]
        for name in touched:
            assert torch.equal(results[name][others], clean[name][others]), name
    if operand == "x":
        assert torch.equal(results["x"], clean["x"])  # dx does not depend on x
        assert results["y"][1].isnan().any() or results["y"][1].isinf().any()
    if operand == "w":  # row 1 of w is output column 1
        kept = [column for column in range(24) if column != 1]
        assert torch.equal(results["y"][:, kept], clean["y"][:, kept])
    if operand == "bias":
        kept = [column for column in range(24) if column != 2]
        assert torch.equal(results["y"][:, kept], clean["y"][:, kept])
        assert not results["y"][:, 2].isfinite().any()
    if operand == "b":  # element 9 is row 4, of the first group
        kept = [column for column in range(24) if column != 4]
        assert torch.equal(results["y"][:, kept], clean["y"][:, kept])
    if operand == "a":  # row 1 of a belongs to the first group
        assert torch.equal(results["y"][:, 12:], clean["y"][:, 12:])
        assert not results["y"][:, :12].isfinite().any()


def sparse(value):
    return value.to_sparse()


# What changes one operand of a good call; the error must name that argument.
BAD_OPERANDS = {
    "x None": ("x", lambda v: None, TypeError),
    "x list": ("x", lambda v: v.tolist(), TypeError),
    "x sparse": ("x", sparse, TypeError),
    "x complex": ("x", lambda v: v.to(torch.complex64), TypeError),
    "x integer": ("x", lambda v: v.long(), TypeError),
    "x bool": ("x", lambda v: v > 0, TypeError),
    "x 0-dimensional": ("x", lambda v: v[0, 0], ValueError),
    "x too wide": ("x", lambda v: torch.cat([v, v], 1), ValueError),
    "x dtype": ("weight", lambda v: v.half(), ValueError),
    "weight None": ("weight", lambda v: None, TypeError),
    "weight 3-dimensional": ("weight", lambda v: v[None], ValueError),
    "weight integer": ("weight", lambda v: v.long(), TypeError),
    "lora_A None": ("lora_A", lambda v: None, TypeError),
    "lora_A rows": ("lora_A", lambda v: v[1:], ValueError),
    "lora_A columns": ("lora_A", lambda v: v[:, 1:], ValueError),
    "lora_A 1-dimensional": ("lora_A", lambda v: v[0], ValueError),
    "lora_A sparse": ("lora_A", sparse, TypeError),
    "lora_B rows": ("lora_B", lambda v: v[1:], ValueError),
    "lora_B rank 0": ("lora_B", lambda v: v[:, :0], ValueError),
    "lora_B 1-dimensional": ("lora_B", lambda v: v[:, 0], ValueError),
    "lora_B complex": ("lora_B", lambda v: v.to(torch.complex64), TypeError),
    "bias length": ("bias", lambda v: v[1:], ValueError),
    "bias 2-dimensional": ("bias", lambda v: v[None], ValueError),
    "bias dtype": ("bias", lambda v: v.double(), ValueError),
    "bias list": ("bias", lambda v: v.tolist(), TypeError),
    "weight device": ("weight", lambda v: v.to("meta"), ValueError),
    "lora_A device": ("lora_A", lambda v: v.to("meta"), ValueError),
    "lora_B device": ("lora_B", lambda v: v.to("meta"), ValueError),
    "bias device": ("bias", lambda v: v.to("meta"), ValueError),
    "scaling NaN": ("scaling", lambda v: float("nan"), ValueError),
    "scaling None": ("scaling", lambda v: None, TypeError),
    "scaling str": ("scaling", lambda v: "1", TypeError),
    "scaling tensor": ("scaling", lambda v: torch.tensor(1.0), TypeError),
    "scaling huge": ("scaling", lambda v: 10**400, ValueError),
    "dropout_p None": ("dropout_p", lambda v: None, TypeError),
    "scaling infinite": ("scaling", lambda v: float("inf"), ValueError),
    "dropout_p 1": ("dropout_p", lambda v: 1.0, ValueError),
    "dropout_p negative": ("dropout_p", lambda v: -0.1, ValueError),
    "dropout_p NaN": ("dropout_p", lambda v: float("nan"), ValueError),
    "seed int": ("seed", lambda v: 3, TypeError),
    "seed float": ("seed", lambda v: v.double(), ValueError),
    "seed length": ("seed", lambda v: v.repeat(2), ValueError),
    "seed device": ("seed", lambda v: v.to("meta"), ValueError),
}


@pytest.mark.parametrize("merged", [False, True], ids=["lora_linear", "lora_merged_linear"])
@pytest.mark.parametrize(("name", "change", "error"), BAD_OPERANDS.values(), ids=BAD_OPERANDS)
def test_bad_input_is_named_with_the_function(name, change, error, merged, device):
    problem = make_problem(4, 6, 12, 2, device=device, groups=[(6, True)] * 2 if merged else None)
    arguments = {
        "x": problem.x, "weight": problem.w, "lora_A": problem.a, "lora_B": problem.b,
        "bias": problem.bias, "scaling": 1.0, "dropout_p": 0.5, "seed": problem.seed,
    }  # fmt: skip
    arguments[name] = change(arguments[name])
    function = lora_kernels.lora_merged_linear if merged else lora_kernels.lora_linear
    extra = {"enable_lora": [True, True]} if merged else {}
    # x and weight that do not fit each other are an error of x, as for a layer.
    named = f"x must .*{name}'s" if name == "weight" and error is ValueError else f"{name} "
    with pytest.raises(error, match=rf"^{function.__name__}: (the .*)?({name} |{named})"):
        function(**arguments, **extra)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"enable_lora": [False, False]}, "enable_lora"),
        ({"enable_lora": []}, "enable_lora"),
        ({"enable_lora": [True] * 5}, "enable_lora .*12"),
        ({"out_splits": [6, 5]}, "out_splits"),
        ({"out_splits": [12]}, "out_splits"),
        ({"out_splits": [12, 0]}, "out_splits"),
        ({"out_splits": [13, -1]}, "out_splits"),
        ({"out_splits": [6.0, 6.0]}, "out_splits"),
    ],
    ids=str,
)
def test_groups_that_do_not_fit(change, match, device):
    problem = make_problem(4, 6, 12, 2, device=device, groups=[(6, True)] * 2)
    arguments = {"enable_lora": [True, True], **change}
    with pytest.raises(ValueError, match=f"^lora_merged_linear: .*{match}"):
        lora_kernels.lora_merged_linear(
            problem.x, problem.w, problem.a, problem.b, problem.bias, **arguments
        )


@pytest.mark.parametrize("name", ["enable_lora", "out_splits"])
@pytest.mark.parametrize("value", [True, 3, "qv", {1: 2}], ids=str)
def test_groups_of_the_wrong_type(name, value, device):
    problem = make_problem(4, 6, 12, 2, device=device, groups=[(6, True)] * 2)
    arguments = {"enable_lora": [True, True], name: value}
    with pytest.raises(ValueError, match=f"^lora_merged_linear: {name} must"):
        lora_kernels.lora_merged_linear(problem.x, problem.w, problem.a, problem.b, **arguments)


@pytest.mark.parametrize("flags", [[1, 0], list(np.array([True, False]))], ids=["int", "numpy"])
def test_lora_merged_linear_takes_flags_that_are_no_bool(flags, seed, device):
    problem = make_problem(4, 6, 12, 2, device=device, groups=[(6, True), (6, False)])
    operands = (problem.x, problem.w, problem.a, problem.b, problem.bias)
    expected = lora_kernels.lora_merged_linear(*operands, enable_lora=[True, False])
    actual = lora_kernels.lora_merged_linear(
        *operands, enable_lora=flags, out_splits=list(np.array([6, 6]))
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("algorithm", ["fused"], indirect=True)
@pytest.mark.parametrize("operand", ["w", "a", "b", "bias"])
def test_a_sparse_operand_is_named_after_other_calls_too(operand, algorithm, device):
    problem = make_problem(3, 8, 6, 2, device=device)
    for _ in range(2):
        call(problem)
    name = {"w": "weight", "a": "lora_A", "b": "lora_B", "bias": "bias"}[operand]
    with pytest.raises(TypeError, match=name):
        call(problem, **{operand: getattr(problem, operand).to_sparse()})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's records take what is cast")
def test_autocast_converts_the_weight_once(monkeypatch):
    """Where no call can have a record, none is looked for with operands of its own."""
    problem, made = make_problem(300, 64, 64, 2, device="cpu"), []
    to = torch.Tensor.to

    def counted(tensor, *args, **kwargs):
        made.extend([tensor.shape] * (tensor.data_ptr() == problem.w.data_ptr()))
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    with torch.autocast("cpu", torch.bfloat16):
        call(problem)
    assert made == [(64, 64)]
