"""lora_grouped_linear: row by row what its formula says, and nothing for rows that are not its."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import lora_grouped_linear, lora_linear
from lora_kernels.testing.grouped_problem import make_grouped_problem
from lora_kernels.testing.problem import OPERANDS
from lora_kernels.testing.tolerance import assert_close

SIZES = (5, 0, 7, 1, 3)
MIXED = (1, -1, 0, 1, 2)
CASES = {
    "adapters": {},
    "adapters, mixed": {"groups": MIXED, "behind": 2, "bias": True},
    "adapters, dropout": {"groups": MIXED, "dropout_ps": (0.5, 0.0, 0.2), "scalings": (1, 2, 3)},
    "adapters, index": {"groups": MIXED, "sources": 6, "bias": True, "dropout_ps": (0.3,)},
    "experts": {"experts": 5, "bias": True},
    "experts, behind": {"experts": 5, "behind": 3, "dropout_ps": (0.25,)},
    "experts, index": {"experts": 5, "sources": 4, "scalings": (1, 2, 3, 4, 5)},
    "experts, one": {"experts": 1},
    "adapters over experts": {"experts": 5, "groups": (3, 0, -1, 4, 4), "bias": True},
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
DTYPES = {
    "float32": (torch.float32, None),
    "float64": (torch.float64, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "bfloat16, float32 factors": (torch.bfloat16, torch.float32),
}
every_dtype = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())


def call(problem, operands=None, **options):
    operands = problem.operands() if operands is None else operands
    x, w, a, b, bias = (operands.get(name) for name in OPERANDS)
    spec = problem.spec
    options = {
        "groups": problem.groups,
        "index": problem.index,
        "scaling": spec.scalings,
        "dropout_p": spec.dropout_ps,
        "seed": problem.seeds,
        **options,
    }
    return lora_grouped_linear(x, w, a, b, problem.ends, bias, **options)


def solve(problem, needs=OPERANDS):
    """y and the gradients of the operands in needs, by the function."""
    leaves = {
        name: value.detach().requires_grad_(name in needs)
        for name, value in problem.operands().items()
    }
    y = call(problem, leaves)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), problem.dy)
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


@every_case
@every_dtype
def test_result_and_gradients_are_those_of_the_formula(case, dtypes, seed, device):
    dtype, lora_dtype = dtypes
    problem = make_grouped_problem(
        SIZES, 24, 16, 3, device=device, dtype=dtype, lora_dtype=lora_dtype, **case
    )
    actual, exact = solve(problem), problem.solve(torch.float64)
    assert actual.keys() == exact.keys()
    # In fewer bits plain PyTorch would round what each op here leaves in float32.
    wide = problem.solve(torch.float32) if dtype.itemsize < 4 else problem.solve()
    for name, value in actual.items():
        like = problem.dy if name == "y" else getattr(problem, name)
        assert value.dtype == like.dtype
        assert_close(value, exact[name], wide[name].to(like.dtype), name)


def small_function(case):
    problem = make_grouped_problem(
        (2, 0, 1, 2, 1), 3, 4, 2, device="cpu", dtype=torch.float64, **case
    )
    leaves = [value.requires_grad_() for value in problem.operands().values()]

    def function(*values):
        return call(problem, dict(zip(problem.operands(), values, strict=True)))

    return function, leaves


@every_case
def test_gradcheck(case, seed):
    function, leaves = small_function(case)
    assert torch.autograd.gradcheck(function, leaves)


@every_case
def test_gradgradcheck(case, seed):
    function, leaves = small_function(case)
    assert torch.autograd.gradgradcheck(function, leaves)


@every_case
@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_for_a_batch_of_dy(case, create_graph, seed):
    function, leaves = small_function(case)
    y = function(*leaves)
    dys = torch.randn(3, *y.shape, dtype=torch.float64)
    options = {"retain_graph": True, "create_graph": create_graph}
    batched = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, **options)
    for i, dy in enumerate(dys):
        alone = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        for one, other in zip(batched, alone, strict=True):
            torch.testing.assert_close(one[i], other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("needs", [("x",), ("a",), ("b",), ("a", "b"), ("w", "bias")], ids=str)
@pytest.mark.parametrize("name", ["adapters, index", "experts, behind", "adapters over experts"])
def test_only_what_needs_a_gradient_is_computed(name, needs, seed, device):
    problem = make_grouped_problem(SIZES, 8, 6, 2, device=device, **CASES[name])
    needs = [n for n in needs if n in problem.operands()]
    whole, some = solve(problem), solve(problem, needs)
    assert set(some) == {"y", *needs}
    for key, value in some.items():
        # float32: other products run beside
        torch.testing.assert_close(value, whole[key], rtol=1e-5, atol=1e-5)


def test_a_group_alone_is_lora_linear_over_its_rows(seed, device):
    problem = make_grouped_problem(
        (6,), 12, 10, 4, device=device, dtype=torch.float64, dropout_ps=(0.4,), bias=True
    )
    expected = lora_linear(
        problem.x, problem.w, problem.a[0], problem.b[0], problem.bias,
        scaling=2.0, dropout_p=0.4, seed=problem.seeds,
    )  # fmt: skip
    torch.testing.assert_close(call(problem), expected, rtol=0, atol=1e-13)


def test_a_groups_rows_and_mask_do_not_depend_on_the_rest_of_the_batch(seed, device):
    """Bit for bit: alone, and in two segments among others."""
    options = {"device": device, "dropout_ps": (0.4, 0.1)}
    mixed = make_grouped_problem((3, 4, 2), 8, 6, 2, groups=(0, 1, 0), **options)
    mine = torch.tensor([0, 1, 2, 7, 8], device=device)
    alone = make_grouped_problem((5,), 8, 6, 2, groups=(0,), **options)
    alone.x, alone.dy, alone.w = mixed.x[mine], mixed.dy[mine], mixed.w
    alone.a, alone.b, alone.seeds = mixed.a, mixed.b, mixed.seeds
    expected, actual = solve(alone), solve(mixed)
    torch.testing.assert_close(actual["y"][mine], expected["y"], rtol=0, atol=1e-6)
    torch.testing.assert_close(actual["x"][mine], expected["x"], rtol=0, atol=1e-6)
    torch.testing.assert_close(actual["a"][0], expected["a"][0], rtol=0, atol=1e-5)


def test_rows_that_are_not_its_are_neither_read_nor_written(seed, device):
    """NaN behind the last end stays there; with experts y and dx are zero there."""
    problem = make_grouped_problem(SIZES, 8, 6, 2, device=device, experts=5, behind=3)
    clean = solve(problem)
    problem.x[-3:] = torch.nan
    problem.dy[-3:] = torch.nan
    dirty = solve(problem)
    for name, value in dirty.items():
        assert torch.equal(value, clean[name]), name
    assert not dirty["y"][-3:].any()
    assert not dirty["x"][-3:].any()


def test_groups_without_rows_get_zeros(seed, device):
    problem = make_grouped_problem((4, 0), 8, 6, 2, device=device)
    solved = solve(problem)
    assert solved["a"][0].any()
    assert not solved["a"][1].any()
    assert not solved["b"][1].any()


@pytest.mark.parametrize("experts", [None, 3])
def test_no_rows_at_all(experts, device):
    problem = make_grouped_problem((0, 0, 0), 8, 6, 2, device=device, experts=experts)
    solved = solve(problem)
    assert solved["y"].shape == (0, 6)
    assert not solved["a"].any()


def test_factors_of_several_ranks_are_padded(seed, device):
    options = {"dtype": torch.float64, "device": device}
    ranks = (1, 5, 8)
    a = [torch.randn(r, 6, **options).requires_grad_() for r in ranks]
    b = [torch.randn(7, r, **options).requires_grad_() for r in ranks]
    x, w = torch.randn(9, 6, **options), torch.randn(7, 6, **options)
    ends = torch.tensor([2, 5, 9], dtype=torch.int32, device=device)
    y = lora_grouped_linear(x, w, a, b, ends, scaling=[1.0, 2.0, 3.0])
    parts = zip(x.split([2, 3, 4]), a, b, (1.0, 2.0, 3.0), strict=True)
    expected = torch.cat([lora_linear(rows, w, *f, scaling=s) for rows, *f, s in parts])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    dy = torch.randn_like(y)
    actual = torch.autograd.grad(y, [*a, *b], dy, retain_graph=True)
    for grad, wanted in zip(actual, torch.autograd.grad(expected, [*a, *b], dy), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-12)


def test_shared_factors_and_transposed_experts_are_views(seed, device):
    """One lora_A for all groups by expand(), weights stored [E, K, N] by mT."""
    options = {"dtype": torch.float64, "device": device}
    problem = make_grouped_problem((3, 4), 6, 5, 2, experts=2, **options)
    shared = problem.a[:1].clone().requires_grad_()
    problem.w = problem.w.mT.contiguous().mT
    y = call(problem, problem.operands() | {"a": shared.expand(2, -1, -1)})
    expected = call(problem, problem.operands() | {"a": shared.repeat(2, 1, 1)})
    assert torch.equal(y, expected)
    grads = [torch.autograd.grad(v.sum(), shared)[0] for v in (y, expected)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("experts", [None, 2])
def test_a_small_update_of_bfloat16_arrives(experts, seed, device):
    """99 in 100 of one of 7e-4 of W, which rounding W + s·B·A to 8 bits loses for the most part."""
    problem = make_grouped_problem(
        (1000, 1000), 256, 256, 4, device=device, dtype=torch.bfloat16, experts=experts
    )
    problem.b *= 7e-4 / 2  # of scaling·b·a, which is as large as w
    x, a, b = (t.double() for t in (problem.x, problem.a, problem.b))
    update = torch.cat([2 * x[:1000] @ a[0].T @ b[0].T, 2 * x[1000:] @ a[1].T @ b[1].T])
    base = call(problem, problem.operands() | {"b": torch.zeros_like(problem.b)}).double()
    share = ((call(problem).double() - base) * update).sum() / update.square().sum()
    assert abs(share - 1) < 0.01


# ---- what is kept, and where the function goes ----


class Saved:
    """Bytes of the storages that autograd keeps, but for those of known tensors."""

    def __init__(self, known):
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.found = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.found[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args):
        self.hooks.__exit__(*args)

    @property
    def bytes(self):
        return sum(self.found.values())


@pytest.mark.parametrize("name", ["adapters, index", "experts, index", "experts, behind"])
def test_only_h_is_kept(name, seed, device):
    """Not the rows that index gathers, nor anything of a weight's size."""
    problem = make_grouped_problem((40, 0, 70, 10, 30), 24, 16, 3, device=device, **CASES[name])
    leaves = {n: v.requires_grad_(n in "xab") for n, v in problem.operands().items()}
    known = [*leaves.values(), problem.ends, problem.groups, problem.index, problem.seeds]
    with Saved([tensor for tensor in known if tensor is not None]) as saved:
        y = call(problem, leaves)
    assert saved.bytes == y.shape[0] * 3 * 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant, seed, device):
    problem = make_grouped_problem(SIZES, 8, 6, 2, device=device, **CASES["adapters, dropout"])
    names = list(problem.operands())

    def function(*values):
        return call(problem, dict(zip(names, values, strict=True)), seed=None)

    def run(through):
        leaves = [value.detach().requires_grad_() for value in problem.operands().values()]
        torch.manual_seed(seed)
        y = through(function, *leaves)
        y.backward(problem.dy)
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    actual = run(functools.partial(checkpoint, use_reentrant=reentrant))
    for one, other in zip(actual, run(lambda f, *leaves: f(*leaves)), strict=True):
        assert torch.equal(one, other)


def test_autocast_casts_x_weight_and_bias(seed, device):
    problem = make_grouped_problem(SIZES, 8, 6, 2, device=device, **CASES["experts"])
    with torch.autocast(device.type, torch.bfloat16):
        y = call(problem)
    cast = {
        n: v.bfloat16() if n in ("x", "w", "bias") else v for n, v in problem.operands().items()
    }
    assert torch.equal(y, call(problem, cast))


@pytest.mark.parametrize("name", ["adapters, index", "experts, behind"])
def test_compiles_as_one_graph_for_any_number_of_rows(name, seed, device):
    torch._dynamo.reset()
    compiled = torch.compile(call_of_leaves, fullgraph=True, backend="aot_eager", dynamic=True)
    for sizes in (SIZES, (4, 2, 0, 6, 7), (1, 1, 1, 2, 9)):
        problem = make_grouped_problem(
            sizes, 8, 6, 2, device=device, dtype=torch.float64, **CASES[name]
        )
        expected, actual = (
            solve_leaves(function, problem) for function in (call_of_leaves, compiled)
        )
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def call_of_leaves(x, w, a, b, ends, groups, index, seeds, dropout_p):
    return lora_grouped_linear(
        x, w, a, b, ends, groups=groups, index=index, seed=seeds, dropout_p=dropout_p
    )


def solve_leaves(function, problem):
    x, a, b = (t.detach().requires_grad_() for t in (problem.x, problem.a, problem.b))
    y = function(
        x, problem.w, a, b, problem.ends, problem.groups, problem.index, problem.seeds,
        problem.spec.dropout_ps[0],
    )  # fmt: skip
    return [y.detach(), *torch.autograd.grad(y, (x, a, b), problem.dy)]


def test_a_module_around_it_trains(seed, device):
    """Two adapters of their own ranks and optimizers' steps, in one batch."""
    w = torch.randn(4, 4, device=device)
    a = nn.ParameterList([torch.randn(r, 4, device=device) for r in (1, 2)])
    b = nn.ParameterList([torch.zeros(4, r, device=device) for r in (1, 2)])
    x, target = torch.randn(6, 4, device=device), torch.randn(6, 4, device=device)
    ends = torch.tensor([3, 6], dtype=torch.int32, device=device)
    optimizer = torch.optim.SGD([*a, *b], lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (lora_grouped_linear(x, w, list(a), list(b), ends) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# ---- errors ----


def operands(**changes):
    values = {
        "x": torch.randn(6, 4),
        "weight": torch.randn(2, 5, 4),
        "lora_A": torch.randn(2, 3, 4),
        "lora_B": torch.randn(2, 5, 3),
        "ends": torch.tensor([2, 6], dtype=torch.int32),
    }
    return values | changes


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD = {
    "x of another width": ({"x": torch.randn(6, 3)}, r"x must have shape \[rows, 4\]"),
    "x of three dimensions": ({"x": torch.randn(1, 6, 4)}, r"x must have shape \[rows, 4\]"),
    "x of another dtype": ({"x": torch.randn(6, 4).double()}, "x must have weight's dtype"),
    "weight a vector": ({"weight": torch.randn(4)}, r"weight must have shape \[N, K\] or"),
    "lora_A a matrix": ({"lora_A": torch.randn(3, 4)}, r"lora_A must have shape \[G, R, K\]"),
    "lora_A of another width": ({"lora_A": torch.randn(2, 3, 5)}, "lora_A must have shape"),
    "lora_A of no rank": ({"lora_A": torch.randn(2, 0, 4)}, "lora_A must have shape"),
    "lora_B of another rank": ({"lora_B": torch.randn(2, 5, 2)}, "lora_B must have shape"),
    "factors of unlike shapes": (
        {"lora_A": [torch.randn(3, 4), torch.randn(3, 5)]},
        "lora_A must have one shape but for the rank",
    ),
    "no factors": ({"lora_B": []}, "lora_B must be a tensor or a sequence of at least one"),
    "bias of one expert": ({"bias": torch.randn(5)}, r"bias must have shape \[2, 5\]"),
    "ends of int64": ({"ends": torch.tensor([2, 6])}, "ends must be a vector of torch.int32"),
    "ends too few": ({"ends": int32(6)}, "ends must have an entry for each of 2 groups"),
    "ends not of all experts": (
        {"ends": int32(2, 4, 6), "groups": int32(0, 1, 0)},
        "ends must have a multiple of 2 entries",
    ),
    "ends descend": ({"ends": int32(4, 2)}, "ends must ascend from 0 to at most the 6 rows"),
    "ends below zero": ({"ends": int32(-1, 2)}, "ends must ascend from 0"),
    "ends beyond the rows": ({"ends": int32(2, 7)}, "ends must ascend from 0 to at most the 6"),
    "groups too few": ({"groups": int32(0)}, "groups must have an entry for each of 2 ends"),
    "groups out of range": ({"groups": int32(0, 2)}, "groups must be -1, or the number of one of"),
    "groups below -1": ({"groups": int32(0, -2)}, "groups must be -1"),
    "index out of range": ({"index": torch.tensor([0, 6])}, "ends must ascend|index must be rows"),
    "index of int32": ({"index": int32(*range(6))}, "index must be a vector of torch.int64"),
    "scaling infinite": ({"scaling": float("inf")}, "scaling must be finite"),
    "scaling of another count": ({"scaling": [1.0] * 3}, "scaling must be a number, or have one"),
    "dropout_p of one": ({"dropout_p": [0.0, 1.0]}, r"dropout_p must be in \[0, 1\)"),
    "seed of one": (
        {"dropout_p": 0.5, "seed": torch.zeros(1, dtype=torch.int64)},
        "seed must be an int64 tensor of 2 elements",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_bad_operands_are_value_errors_that_name_them(changes, message):
    with pytest.raises(ValueError, match=f"lora_grouped_linear: ({message})"):
        lora_grouped_linear(**operands(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": [1.0]}, "x must be a torch.Tensor"),
        ({"weight": torch.ones(2, 5, 4, dtype=torch.int8)}, "weight must be float32"),
        ({"lora_A": [None]}, r"lora_A\[0\] must be a torch.Tensor"),
        ({"scaling": "2"}, "scaling must be a number"),
        ({"dropout_p": [0.0, None]}, "dropout_p must be a number"),
    ],
    ids=str,
)
def test_wrong_types_are_type_errors_that_name_them(changes, message):
    with pytest.raises(TypeError, match=f"lora_grouped_linear: {message}"):
        lora_grouped_linear(**operands(**changes))


def test_double_backward_without_lora_a_is_refused():
    x = torch.randn(6, 4, requires_grad=True)
    b = torch.randn(2, 5, 3, requires_grad=True)
    y = lora_grouped_linear(**operands(x=x, lora_B=b))
    with pytest.raises(RuntimeError, match="needs lora_A to require a gradient too"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_transforms_are_refused_by_name():
    values = operands()
    with pytest.raises(NotImplementedError, match=r"torch\.func is running, and this function has"):
        torch.func.vmap(lambda x: lora_grouped_linear(**values | {"x": x}))(torch.randn(2, 6, 4))
