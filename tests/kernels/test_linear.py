"""Both algorithms through the public functions: random layers against float64, identities, bits."""

import collections
import dataclasses
import random

import pytest
import torch

from lora_kernels.dropout import keep_scale
from lora_kernels.kernels import linear
from lora_kernels.spec import Needs
from lora_kernels.testing.problem import make_problem
from lora_kernels.testing.tolerance import assert_close, assert_close_together
from tests.calls import call, solve

GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU
SIZES = [1, 2, 7, 13, 31, 32, 61, 64, 89, 96]
QKV = [(24, True), (16, False), (33, True)]
kernels = pytest.mark.parametrize("algorithm", ["fused", "addmm"], indirect=True)


def random_layout(choice, tensor):
    """The same values, laid out as a caller might have them."""
    layout = choice(["contiguous", "contiguous", "sliced", "transposed"])
    if tensor is None or layout == "contiguous":
        return tensor
    if layout == "transposed":
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    padding = tensor.new_full((*tensor.shape[:-1], choice([1, 3, 8])), torch.nan)
    return torch.cat([padding, tensor, padding], -1)[..., padding.shape[-1] : -padding.shape[-1]]


def random_problem(seed, device):
    """A layer of which nothing is round, with operands in all layouts."""
    rng = random.Random(seed)

    def size(limit=96):
        return min(rng.choice([rng.randint(1, 96), rng.choice(SIZES)]), limit)

    groups = None
    if rng.random() < 0.4:
        groups = [(size(40), rng.random() < 0.6) for _ in range(rng.randint(2, 4))]
        groups[rng.randrange(len(groups))] = (size(40), True)
    dtype = rng.choice(DTYPES)
    rows = rng.choice([size(), (2, size(48))])
    n = sum(size for size, _ in groups) if groups else size()
    problem = make_problem(
        rows, size(), n, rng.choice([rng.randint(1, 70), 4, 16]),
        device=device, dtype=dtype, lora_dtype=rng.choice([dtype, dtype, torch.float32]),
        bias=rng.random() < 0.7, dropout_p=rng.choice([0.0, 0.1, 0.5, 0.9]), groups=groups,
        scaling=rng.choice([1.0, 2.0, -0.25, 0.0, 30.0]),
    )  # fmt: skip
    if problem.x.numel() <= 16 or problem.dy.numel() <= 16:
        problem = problem.without_cancellation()
        # 30 times a sum of one sign can be more than float16 holds.
        spec = dataclasses.replace(problem.spec, scaling=min(problem.scaling, 2.0))
        problem.spec = spec
    for name in ("x", "w", "a", "b", "bias", "dy"):
        setattr(problem, name, random_layout(rng.choice, getattr(problem, name)))
    return problem


@kernels
@pytest.mark.parametrize("part", range(20 if GPU else 10))
def test_random_layers(part, algorithm, seed, device):
    found = collections.defaultdict(list)
    for case in range(8):
        problem = random_problem(seed + case, device)
        exact, baseline = problem.solve(torch.float64), problem.solve()
        for name, result in solve(problem).items():
            triple = (result, exact[name], baseline[name])
            assert result.shape == exact[name].shape, f"seed {seed + case} {name}"
            found[name, result.dtype].append(triple)
    for (name, _), triples in found.items():
        assert_close_together(triples, f"{algorithm} seeds {seed} to {seed + 7} {name}")


@kernels
@pytest.mark.parametrize("groups", [None, QKV], ids=["linear", "merged"])
@pytest.mark.parametrize("lora_dtype", [None, torch.float32], ids=["same", "float32 adapters"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradients(dtype, lora_dtype, groups, seed, device):
    problem = make_problem(
        (3, 23), 71, 73, 9, device=device, dtype=dtype, lora_dtype=lora_dtype, dropout_p=0.25,
        groups=groups,
    )  # fmt: skip
    exact, baseline = problem.solve(torch.float64), problem.solve()
    for name, result in solve(problem).items():
        assert_close(result, exact[name], baseline[name], name)


@kernels
@pytest.mark.parametrize("groups", [None, QKV], ids=["linear", "merged"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5])
def test_gradients_are_adjoint_to_the_output(dropout_p, groups, seed, device):
    """Without bias y is linear in x for a given mask, whatever it is: <dy, y> = <dx, x>."""
    problem = make_problem(
        70, 66, 73, 5, device=device, bias=False, dropout_p=dropout_p, groups=groups
    )
    results = {name: value.double() for name, value in solve(problem).items()}
    x, w, a, b, dy = (getattr(problem, name).double() for name in ("x", "w", "a", "b", "dy"))
    update = results["y"] - x @ w.T  # linear in a, and in b
    eps = torch.finfo(torch.float32).eps
    for left, right in (
        ((dy, results["y"]), (results["x"], x)),
        ((dy, update), (results["a"], a)),
        ((dy, update), (results["b"], b)),
    ):
        difference = (left[0] * left[1]).sum() - (right[0] * right[1]).sum()
        assert difference.abs() <= 4 * eps * left[0].norm() * results["y"].norm()


@kernels
@pytest.mark.parametrize("groups", [None, QKV], ids=["linear", "merged"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ten_runs_give_the_same_bits(dtype, groups, seed, device):
    scale = 8 if GPU else 1
    problem = make_problem(
        190 * scale, 100 * scale, 73 * scale, 12, device=device, dtype=dtype, dropout_p=0.3,
        groups=[(size * scale, on) for size, on in groups] if groups else None,
    )  # fmt: skip
    first = solve(problem)
    for _ in range(9 if GPU else 1):  # the interpreter has no threads to differ by
        for name, result in solve(problem).items():
            assert torch.equal(result, first[name]), name


@kernels
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_the_rows_of_a_batch_do_not_depend_on_each_other(dropout_p, seed, device):
    """More rows, other tiles and slices: the same mask, so the first rows stay what they are."""
    problem = make_problem(75, 40, 50, 6, device=device, dropout_p=dropout_p)
    y = call(problem)
    dx = solve(problem)["x"]
    problem.x, problem.dy = problem.x[:9], problem.dy[:9]
    torch.testing.assert_close(call(problem), y[:9])
    torch.testing.assert_close(solve(problem)["x"], dx[:9])


@kernels
@pytest.mark.parametrize("scaling", [2.0**40, 2.0**-40], ids=str)
def test_scaling_meets_float16_in_float32(scaling, algorithm, seed, device):
    """dh = scaling·dy·b and scaling·h are beyond float16; y, dx and the gradients are not."""
    problem = make_problem(20, 30, 25, 4, device=device, dtype=torch.float16, scaling=scaling)
    small = 2.0**-20
    factor = {2.0**40: small, 2.0**-40: 1 / small}[scaling]
    problem.a, problem.b = problem.a.float() * factor, problem.b.float() * factor
    exact = problem.solve(torch.float64)
    plain = make_problem(20, 30, 25, 4, device=device, dtype=torch.float16, scaling=1.0)
    for name in ("x", "w", "bias", "dy"):
        setattr(plain, name, getattr(problem, name))
    plain.a, plain.b = problem.a / factor, problem.b / factor
    baseline = plain.solve()
    for name, result in solve(problem).items():
        if name in ("y", "x"):
            assert_close(result, exact[name], baseline[name], name)


@kernels
def test_h_is_float32_and_saved_once(algorithm, seed, device):
    problem = make_problem(20, 30, 25, 4, device=device, dtype=torch.float16)
    operands = (problem.x, problem.w, problem.a, problem.b, problem.bias, None, problem.spec)
    y, h = linear.lora_linear_forward(algorithm, *operands)
    assert (y.dtype, y.shape) == (torch.float16, (20, 25))
    assert (h.dtype, h.shape) == (torch.float32, (20, 4))
    assert h.is_contiguous()
    assert y.is_contiguous()


@pytest.mark.parametrize("name", ["fused", "addmm"])
@pytest.mark.parametrize("needs", [Needs(x=True), Needs(x=True, a=True, b=True)], ids=str)
@pytest.mark.parametrize("stored", ["NK", "KN"])
def test_a_weight_of_another_dtype_multiplies_in_its_own(stored, needs, name, seed, device):
    """A base that multiplies in bfloat16 under a float32 x: dx is float32, dy·w a bfloat16 one."""
    p = make_problem(70, 66, 73, 5, device=device, bias=False, dropout_p=0.3)
    exact, baseline = p.solve(torch.float64), p.solve()
    w = p.w.bfloat16() if stored == "NK" else p.w.bfloat16().T.contiguous().T
    product = (p.dy.bfloat16() @ w).float()
    h = p.x * p.mask() @ p.a.T * keep_scale(p.dropout_p)
    arguments = (p.dy, p.x, h, w, p.a, p.b, p.seed, p.spec, needs)
    found = dict(zip(["x", "a", "b"], linear.lora_linear_backward(name, *arguments), strict=False))
    assert len(found) == sum(needs)
    without = exact["x"] - p.dy.double() @ p.w.double()
    assert_close(found["x"], without + product.double(), without.float() + product, "x")
    for gradient in set(found) - {"x"}:
        assert_close(found[gradient], exact[gradient], baseline[gradient], gradient)


@pytest.mark.skipif(not GPU, reason="CUDA graphs and streams need a GPU")
class TestOnAGPU:
    @kernels
    def test_a_graph_draws_a_new_mask_in_every_replay(self, algorithm, seed, device):
        problem = make_problem(256, 512, 384, 16, device=device, dropout_p=0.5, bias=False)
        leaves = {
            name: value.clone().requires_grad_() for name, value in problem.operands().items()
        }

        def step():
            problem.seed = None
            y = call(problem, **leaves)
            return y, *torch.autograd.grad(y, list(leaves.values()), problem.dy)

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, dx, *_ = step()
        seen = []
        for _ in range(3):
            graph.replay()
            torch.cuda.synchronize()
            seen.append(y.clone())
            # Forward and backward of one replay share the mask: <dy, y> = <dx, x>.
            left = (problem.dy.double() * y.double()).sum()
            right = (dx.double() * leaves["x"].double()).sum()
            bound = torch.finfo(torch.float32).eps * problem.dy.norm() * y.norm()
            assert (left - right).abs() <= 4 * bound
        assert not torch.equal(seen[0], seen[1])
        assert not torch.equal(seen[1], seen[2])

    @kernels
    def test_any_stream(self, algorithm, seed, device):
        problem = make_problem(512, 256, 384, 16, device=device, dropout_p=0.5)
        expected = solve(problem)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results = solve(problem)
        stream.synchronize()
        for name, result in results.items():
            assert torch.equal(result, expected[name]), name

    @kernels
    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_a_device_that_is_not_the_current_one(self, algorithm, seed):
        problem = make_problem(64, 96, 80, 8, device="cuda:1", dropout_p=0.5)
        exact, baseline = problem.solve(torch.float64), problem.solve()
        assert torch.cuda.current_device() == 0
        for name, result in solve(problem).items():
            assert_close(result, exact[name], baseline[name], name)

    @kernels
    @pytest.mark.parametrize("allow_tf32", [True, False], indirect=True)
    def test_float32_obeys_allow_tf32(self, allow_tf32, algorithm, seed, device):
        problem = make_problem(256, 512, 384, 16, device=device)
        exact, baseline = problem.solve(torch.float64), problem.solve()
        for name, result in solve(problem).items():
            assert_close(result, exact[name], baseline[name], name)
            if allow_tf32 and name == "y":
                error = (result.double() - exact[name]).norm() / exact[name].norm()
                assert error > 1e-5, "TF32 was allowed and not used"

    @kernels
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(1024, 512, 768, 16), (1000, 520, 776, 12)], ids=str)
    @pytest.mark.parametrize("fan_in_fan_out", [False, True])
    def test_sizes_that_take_the_tables_tiles(
        self, fan_in_fan_out, shape, dtype, algorithm, seed, device
    ):
        m, k, n, r = shape
        problem = make_problem(m, k, n, r, device=device, dtype=dtype, dropout_p=0.1)
        if fan_in_fan_out:
            problem.w = problem.w.T.contiguous().T
        exact, baseline = problem.solve(torch.float64), problem.solve()
        for name, result in solve(problem).items():
            assert_close(result, exact[name], baseline[name], name)
