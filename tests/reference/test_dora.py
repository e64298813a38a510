"""The reference of DoRA against its formula in float64, its norms, and rows that are zero."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_kernels.reference import dora as reference
from lora_kernels.reference import dora_formula
from lora_kernels.spec import DoraNeeds
from lora_kernels.testing.dora_problem import DORA_OPERANDS, make_dora_problem
from lora_kernels.testing.tolerance import assert_close

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAWS = {"no dropout": (0.0, False), "PEFT's": (0.3, False), "low rank only": (0.3, True)}
every_law = pytest.mark.parametrize(("dropout_p", "low_rank_only"), LAWS.values(), ids=LAWS)


def forward(problem, module=reference):
    p = problem
    operands = p.x, p.w, p.a, p.b, p.bias, p.magnitude, p.seed
    return module.dora_forward(*operands, p.spec)


def backward(problem, h, norm, kept, needs, module=reference):
    p = problem
    operands = p.dy, p.x, h, p.w, p.a, p.b, p.bias, p.magnitude, p.seed, norm, kept
    grads = module.dora_backward(*operands, p.spec, DoraNeeds(*needs))
    asked = [name for name, needed in zip(DORA_OPERANDS, needs, strict=True) if needed]
    return dict(zip(asked, grads, strict=True))


def solve(problem, module=reference):
    y, h, norm, *c = forward(problem, module)
    needs = [getattr(problem, name) is not None for name in DORA_OPERANDS]
    return {"y": y, **backward(problem, h, norm, *(c or [y]), needs, module)}


def check(problem, results):
    """results against float64; dmagnitude in x's dtype, in which what it is made of is kept."""
    exact, baseline = problem.solve(torch.float64), problem.solve()
    assert results.keys() == exact.keys()
    for name, result in results.items():
        assert result.dtype == baseline[name].dtype, name
        if name == "magnitude":
            result, baseline[name] = (g.to(problem.x.dtype) for g in (result, baseline[name]))
        assert_close(result, exact[name], baseline[name], name)


@every_law
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("module", [reference, dora_formula], ids=["reference", "formula"])
def test_forward_and_backward_are_the_formula(
    module, dtype, bias, dropout_p, low_rank_only, seed, device
):
    problem = make_dora_problem(
        (3, 11), 40, 24, 4, device=device, dtype=dtype, bias=bias, dropout_p=dropout_p,
        low_rank_only=low_rank_only,
    )  # fmt: skip
    check(problem, solve(problem, module))


@every_law
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_adapters_over_a_16_bit_base(dtype, dropout_p, low_rank_only, seed, device):
    problem = make_dora_problem(
        33, 40, 24, 3, device=device, dtype=dtype, lora_dtype=torch.float32, dropout_p=dropout_p,
        low_rank_only=low_rank_only,
    )  # fmt: skip
    check(problem, solve(problem))


@every_law
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=6)), ids=str)
def test_every_subset_of_gradients_reads_only_what_it_needs(
    needs, dropout_p, low_rank_only, seed, device
):
    problem = make_dora_problem(
        6, 8, 12, 2, device=device, dropout_p=dropout_p, low_rank_only=low_rank_only
    )
    y, h, norm, *c = forward(problem)
    kept = c[0] if c else y
    everything = backward(problem, h, norm, kept, [True] * 6)
    needed = DoraNeeds(*needs)
    if not (needed.w or needed.a or needed.magnitude):
        problem.x = None
    if not (needed.x or needed.magnitude):
        problem.w = None
    if not (needed.x or needed.a):
        problem.a = None
    if not (needed.x or needed.a or needed.b or needed.magnitude):
        problem.b = None
    if not needed.magnitude:
        problem.bias = kept = None
    if not (needed.b or needed.magnitude):
        h = None
    grads = backward(problem, h, norm, kept, needs)
    assert len(grads) == sum(needs)
    for name, grad in grads.items():
        assert torch.equal(grad, everything[name]), name


@every_law
@pytest.mark.parametrize("shape", [(0, 4, 6, 2), (5, 1, 6, 2), (5, 4, 1, 1), (1, 1, 1, 3)])
def test_empty_and_one_element_sizes(shape, dropout_p, low_rank_only, seed, device):
    problem = make_dora_problem(
        *shape, device=device, dropout_p=dropout_p, low_rank_only=low_rank_only
    ).without_cancellation()
    check(problem, solve(problem))


# ---- the norms ----


def factors(dtype, n=96, k=160, r=8):
    w, a, b = torch.randn(n, k) / k**0.5, torch.randn(r, k) / k**0.5, torch.randn(n, r)
    return w.to(dtype), a, b


def exact_norms(w, a, b, scaling):
    return torch.linalg.vector_norm(w.double() + scaling * b.double() @ a.double(), dim=1)


@pytest.mark.parametrize("at_once", [1, 1000, 1 << 20], ids=str)
@pytest.mark.parametrize("times", [0.0, 0.05, 2.0], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(dtype, times, at_once, monkeypatch, seed, device):
    monkeypatch.setattr(reference, "_AT_ONCE", at_once)
    w, a, b = (tensor.to(device) for tensor in factors(dtype))
    norms, exact = reference.row_norms(w, a, b * times, 2.0), exact_norms(w, a, b * times, 2.0)
    assert norms.dtype == reference.accumulate_dtype(dtype)
    assert ((norms.double() - exact) / exact).abs().max() <= 8 * torch.finfo(norms.dtype).eps


@pytest.mark.parametrize("left", [0.3, 1e-1, 1e-2, 1e-3], ids=str)
def test_norms_of_rows_that_nearly_cancel(left, seed, device):
    w, a, b = factors(torch.float32)
    total = torch.nn.functional.normalize(torch.randn(w.shape), dim=1)
    w[::3] = (-2.0 * b @ a)[::3] + left * w.norm(dim=1, keepdim=True)[::3] * total[::3]
    w, a, b = (tensor.to(device) for tensor in (w, a, b))
    norms, exact = reference.row_norms(w, a, b, 2.0), exact_norms(w, a, b, 2.0)
    assert ((norms.double() - exact) / exact).abs().max() <= 1e-4


class Made(TorchDispatchMode):
    """How many elements each new tensor of floats has."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if _is(t)}
        results = func(*args, **(kwargs or {}))
        for result in filter(_is, tree_leaves(results)):
            fresh = result.untyped_storage().data_ptr() not in known
            if fresh and result.is_floating_point():
                self.elements.append(result.numel())
        return results


def _is(value):
    return isinstance(value, torch.Tensor)


@every_law
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_the_weights_size_is_made(
    dtype, dropout_p, low_rank_only, monkeypatch, seed, device
):
    monkeypatch.setattr(reference, "_AT_ONCE", 1000)
    monkeypatch.setenv("LORA_KERNELS_CPU_PRODUCTS", "own")
    problem = make_dora_problem(
        5, 128, 96, 4, device=device, dtype=dtype, dropout_p=dropout_p,
        low_rank_only=low_rank_only,
    )  # fmt: skip
    needs = [True, False, True, True, True, True]
    with Made() as made:
        y, h, norm, *c = forward(problem)
        backward(problem, h, norm, *(c or [y]), needs)
    assert 5 * 128 <= max(made.elements) <= 1000 + 128


@pytest.mark.parametrize(
    ("law", "large"),
    [
        ("no dropout", ["y", "dz", "dx"]),
        ("low rank only", ["mask", "y", "dz", "dx", "mask"]),
        ("PEFT's", ["x_hat", "mask", "c", "y", "dz", "dx", "mask"]),
    ],
)
def test_temporaries_of_a_step_share_memory(law, large, seed, device):
    dropout_p, low_rank_only = LAWS[law]
    problem = make_dora_problem(
        8, 64, 64, 4, device=device, dropout_p=dropout_p, low_rank_only=low_rank_only
    )
    with Made() as made:
        y, h, norm, *c = forward(problem)
        backward(problem, h, norm, *(c or [y]), [True, False, True, True, True, True])
    assert made.elements.count(8 * 64) == len(large)


# ---- zeros ----


@every_law
@pytest.mark.parametrize("module", [reference, dora_formula], ids=["reference", "formula"])
def test_a_row_of_zeros_is_finite_and_has_loras_gradient(
    module, dropout_p, low_rank_only, seed, device
):
    problem = make_dora_problem(
        9, 16, 12, 3, device=device, dropout_p=dropout_p, low_rank_only=low_rank_only
    )
    row = torch.arange(12, device=device) == 5
    for name in ("w", "b", "magnitude"):
        getattr(problem, name)[row] = 0
    y, h, *_ = forward(problem, module)
    results = solve(problem, module)
    assert all(result.isfinite().all() for result in results.values())
    assert torch.equal(y[:, row], problem.bias[row].expand(9, 1))
    assert results["magnitude"][row] == 0
    of_lora = problem.scaling * problem.dy[:, row].T @ h
    torch.testing.assert_close(results["b"][row], of_lora)

    problem.dy[:, row] = 0  # and no other row sees it
    for name in ("w", "b", "magnitude"):
        getattr(problem, name)[row] = 1  # a row with a norm, for the formula
    exact, baseline = problem.solve(torch.float64), problem.solve()
    for name, of in (("y", (slice(None), ~row)), ("b", ~row), ("magnitude", ~row)):
        assert_close(results[name][of], exact[name][of], baseline[name][of], name)


@every_law
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-3, -1.0], ids=str)
def test_dmagnitude_if_a_magnitude_is_zero_or_small(value, dropout_p, low_rank_only, seed, device):
    problem = make_dora_problem(
        33, 40, 24, 4, device=device, dropout_p=dropout_p, low_rank_only=low_rank_only
    )
    problem.magnitude[::5] *= value
    check(problem, solve(problem))
    problem.magnitude.fill_(value)
    check(problem, solve(problem))


@every_law
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("of_bias", "of_x"), [(100, 1), (1, 2**-6)], ids=str)
def test_dmagnitude_beside_a_bias_larger_than_the_product(
    of_bias, of_x, dtype, dropout_p, low_rank_only, seed, device
):
    problem = make_dora_problem(
        130, 96, 64, 8, device=device, dtype=dtype, bias=True, dropout_p=dropout_p,
        low_rank_only=low_rank_only, scaling=2.0,
    )  # fmt: skip
    problem.bias.mul_(of_bias)
    problem.bias[::7] = 0
    problem.x.mul_(of_x)
    check(problem, solve(problem))


def test_dmagnitude_if_every_column_is_computed_again(monkeypatch, seed, device):
    """As while a CUDA graph is captured."""
    monkeypatch.setattr(reference, "_columns_without_z", lambda *_: slice(None))
    problem = make_dora_problem(33, 40, 24, 4, device=device, dtype=torch.bfloat16)
    problem.magnitude[3] = 0
    check(problem, solve(problem))
