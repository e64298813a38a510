"""lora_linear with a magnitude: results, gradients, PEFT, and every part of PyTorch around it."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lora_kernels
from lora_kernels.testing.dora_problem import DORA_OPERANDS, make_dora_problem
from lora_kernels.testing.tolerance import assert_close
from tests.calls import call_dora, solve

LAWS = {"no dropout": (0.0, False), "PEFT's": (0.3, False), "low rank only": (0.3, True)}
every_law = pytest.mark.parametrize(("dropout_p", "low_rank_only"), LAWS.values(), ids=LAWS)
every_algorithm = pytest.mark.parametrize(
    "algorithm", ["reference", "fused", "addmm"], indirect=True
)


def make(*sizes, law=(0.0, False), **options):
    return make_dora_problem(*sizes, dropout_p=law[0], low_rank_only=law[1], **options)


def check(problem, results):
    exact, baseline = problem.solve(torch.float64), problem.solve()
    assert results.keys() == exact.keys()
    for name, result in results.items():
        if name == "magnitude":  # made of what x's dtype keeps
            result, baseline[name] = (g.to(problem.x.dtype) for g in (result, baseline[name]))
        assert_close(result, exact[name], baseline[name], name)


@every_algorithm
@every_law
@pytest.mark.parametrize("m", [5, 70], ids=["few rows", "many rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_output_and_gradients(dtype, m, dropout_p, low_rank_only, seed, device):
    problem = make((2, m), 40, 33, 5, device=device, dtype=dtype, law=(dropout_p, low_rank_only))
    check(problem, solve(problem))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=6)), ids=str)
def test_every_subset_of_gradients(needs, dropout_p, seed, device):
    problem = make(4, 6, 12, 2, device=device, law=(dropout_p, False))
    expected = solve(problem)
    leaves = {
        name: getattr(problem, name).detach().requires_grad_(needed)
        for name, needed in zip(DORA_OPERANDS, needs, strict=True)
    }
    y = call_dora(problem, **leaves)
    assert y.requires_grad == any(needs)
    if any(needs):
        y.backward(problem.dy)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == leaf.requires_grad, name
        if leaf.requires_grad:
            assert torch.equal(leaf.grad, expected[name]), name


# ---- PEFT ----


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_it_is_pefts_dora(bias, dropout_p, seed, device):
    from peft import LoraConfig, inject_adapter_in_model

    class Given(torch.nn.Dropout):
        def forward(self, x):
            return x * mask

    p = make(7, 12, 10, 3, device=device, dtype=torch.float64, bias=bias, law=(dropout_p, False))
    base = torch.nn.Linear(12, 10, bias=bias, dtype=torch.float64, device=device)
    model = torch.nn.Sequential(base)
    with torch.no_grad():
        base.weight.copy_(p.w)
        if bias:
            base.bias.copy_(p.bias)
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=["0"], use_dora=True, lora_dropout=dropout_p
    )
    layer = inject_adapter_in_model(config, model)[0]
    trained = {
        "a": layer.lora_A.default,
        "b": layer.lora_B.default,
        "magnitude": layer.lora_magnitude_vector.default,
    }
    for name, module in trained.items():
        module.weight.data = getattr(p, name).clone()
    if dropout_p:
        mask = p.scaled_mask()
        layer.lora_dropout["default"] = Given(dropout_p)
    x = p.x.clone().requires_grad_()
    y = layer(x)
    y.backward(p.dy)
    ours = solve(p)
    torch.testing.assert_close(ours["y"], y.detach(), rtol=1e-12, atol=1e-12)
    for name, leaf in {"x": x, **{name: m.weight for name, m in trained.items()}}.items():
        torch.testing.assert_close(ours[name], leaf.grad, rtol=1e-12, atol=1e-12, msg=name)


# ---- what is saved ----


@every_algorithm
@every_law
@pytest.mark.parametrize("trained", [True, False], ids=["magnitude trains", "magnitude frozen"])
def test_what_is_saved(trained, dropout_p, low_rank_only, seed, device):
    problem = make(12, 9, 10, 2, device=device, law=(dropout_p, low_rank_only))
    for name in ("x", "a", "b", "magnitude")[: 4 if trained else 3]:
        getattr(problem, name).requires_grad_()
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call_dora(problem)
    inputs = {value.data_ptr() for value in [*problem.operands().values(), problem.seed]}
    extra = [tensor for tensor in saved if tensor.data_ptr() not in inputs]
    shapes = sorted(tuple(tensor.shape) for tensor in extra)
    assert shapes == [(10,), *[(12, 2)], *[(12, 10)] * trained]
    c = [t for t in extra if t.shape == y.shape and t.data_ptr() != y.data_ptr()]
    assert len(c) == (trained and problem.spec.drops_product)
    y.backward(problem.dy)


@every_law
@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7)], ids=str)
def test_a_change_of_the_output_in_place_is_an_error_or_right(
    shape, dropout_p, low_rank_only, seed, device
):
    law = (dropout_p, low_rank_only)
    problem = make(shape[:-1], 7, 24, 2, device=device, law=law)
    leaves = {name: value.requires_grad_() for name, value in problem.operands().items()}
    (expected,) = torch.autograd.grad(torch.relu(call_dora(problem)).sum(), leaves["b"])
    changed = torch.nn.ReLU(inplace=True)(call_dora(problem))
    if problem.spec.drops_product:
        (actual,) = torch.autograd.grad(changed.sum(), leaves["b"])
        assert torch.equal(actual, expected)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            changed.sum().backward()
    problem.magnitude = problem.magnitude.detach()  # then nothing reads y
    y = torch.nn.ReLU(inplace=True)(call_dora(problem))
    assert torch.equal(torch.autograd.grad(y.sum(), leaves["b"])[0], expected)


# ---- PyTorch around it ----


@pytest.mark.parametrize(
    ("algorithm", "backend"),
    [("reference", "inductor"), ("reference", "aot_eager"), ("addmm", "aot_eager")],
    indirect=["algorithm"],
)
@every_law
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_whole_with_one_graph_for_every_m(
    backend, dropout_p, low_rank_only, algorithm, seed, device
):
    torch._dynamo.reset()
    problem = make(2, 16, 24, 4, device=device, law=(dropout_p, low_rank_only))

    @torch.compile(backend=backend, fullgraph=True)
    def step(*operands):
        return call_dora(problem, **dict(zip(DORA_OPERANDS, operands, strict=True)))

    for m in (7, 12, 33):
        problem.x = torch.randn(m, 16, device=device)
        problem.dy = torch.randn(m, 24, device=device)
        leaves = [v.detach().clone().requires_grad_() for v in problem.operands().values()]
        torch._dynamo.mark_dynamic(leaves[0], 0)
        y = step(*leaves)
        grads = torch.autograd.grad(y, leaves, problem.dy)
        eager = solve(problem)
        for name, result in zip(["y", *DORA_OPERANDS], [y, *grads], strict=True):
            assert torch.equal(result, eager[name]), name
    torch._dynamo.reset()


def test_exports(seed, device):
    problem = make(6, 16, 24, 4, device=device)

    class Model(torch.nn.Module):
        def forward(self, x):
            return call_dora(problem, x=x)

    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(Model(), (problem.x,), dynamic_shapes=({0: batch},))
    x = torch.randn(9, 16, device=device)
    assert torch.equal(exported.module()(x), call_dora(problem, x=x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_x_weight_and_bias_but_no_adapter(dtype, seed, device):
    problem = make(9, 16, 12, 3, device=device, law=(0.25, False))
    leaves = {name: v.clone().requires_grad_() for name, v in problem.operands().items()}
    with torch.autocast(device.type, dtype):
        y = call_dora(problem, **leaves)
    assert y.dtype == dtype
    grads = torch.autograd.grad(y, list(leaves.values()), problem.dy.to(dtype))
    for name in ("x", "w", "bias", "dy"):
        setattr(problem, name, getattr(problem, name).to(dtype))
    expected = solve(problem)
    assert torch.equal(y, expected["y"])
    for (name, leaf), gradient in zip(leaves.items(), grads, strict=True):
        assert torch.equal(gradient, expected[name].to(leaf.dtype)), name


@every_law
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_the_same(use_reentrant, dropout_p, low_rank_only, seed, device):
    problem = make(12, 16, 24, 4, device=device, law=(dropout_p, low_rank_only))
    problem.seed = None

    def function(*leaves):
        return call_dora(problem, **dict(zip(DORA_OPERANDS, leaves, strict=True)))

    results = []
    for run in (function, lambda *o: checkpoint(function, *o, use_reentrant=use_reentrant)):
        torch.manual_seed(seed)
        leaves = [v.detach().clone().requires_grad_() for v in problem.operands().values()]
        y = run(*leaves)
        y.backward(problem.dy)
        results.append([y, *(leaf.grad for leaf in leaves)])
    assert all(map(torch.equal, *results))


def test_meta_tensors_give_shapes():
    problem = make((2, 3), 8, 24, 2, device="cpu", law=(0.5, False))
    for name in (*DORA_OPERANDS, "dy", "seed"):
        setattr(problem, name, getattr(problem, name).to("meta"))
    leaves = {name: v.requires_grad_() for name, v in problem.operands().items()}
    y = call_dora(problem)
    assert y.device.type == "meta"
    assert y.shape == (2, 3, 24)
    y.backward(problem.dy)
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves.values())


def test_jit_trace(seed, device):
    problem = make(4, 8, 6, 2, device=device)
    traced = torch.jit.trace(lambda x: call_dora(problem, x=x), (problem.x,))
    x = torch.randn(9, 8, device=device)
    torch.testing.assert_close(traced(x), call_dora(problem, x=x))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_fx_records_one_node(dropout_p, seed, device):
    problem = make(4, 8, 6, 2, device=device, law=(dropout_p, False))

    class Model(torch.nn.Module):
        def forward(self, x):
            return call_dora(problem, x=x)

    graph = torch.fx.symbolic_trace(Model())
    assert [node.op for node in graph.graph.nodes].count("call_function") == 1
    assert torch.equal(graph(problem.x), call_dora(problem))


@every_law
def test_jagged_rows(dropout_p, low_rank_only, seed, device):
    problem = make(9, 8, 6, 2, device=device, law=(dropout_p, low_rank_only))
    offsets = torch.tensor([0, 2, 9], device=device)
    x = torch.nested.nested_tensor_from_jagged(problem.x, offsets)
    assert torch.equal(call_dora(problem, x=x).values(), call_dora(problem))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_rows_of_strided_layout_are_refused_by_name(device):
    problem = make(3, 8, 6, 2, device=device)
    x = torch.nested.nested_tensor([problem.x, problem.x[:1]])
    with pytest.raises(TypeError, match=r"lora_linear: x must be dense or .*torch\.jagged"):
        call_dora(problem, x=x)


VIEWS = {
    "transposed": lambda t: t.T.contiguous().T if t.dim() > 1 else t.repeat(2)[: len(t)],
    "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "every second": lambda t: t.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize(
    ("algorithm", "dropout_p"),
    [("reference", 0.0), ("reference", 0.3), ("fused", 0.0), ("addmm", 0.0)],
    indirect=["algorithm"],
)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("operand", ["x", "w", "a", "b", "magnitude", "dy"])
def test_any_strides(view, operand, dropout_p, seed, device):
    problem = make(10, 12, 24, 6, device=device, law=(dropout_p, False))
    setattr(problem, operand, view(getattr(problem, operand)))
    check(problem, solve(problem))


# ---- bad input ----

BAD = {
    "list": (lambda v: v.tolist(), TypeError, "torch.Tensor"),
    "integer": (lambda v: v.long(), TypeError, "float"),
    "sparse": (lambda v: v.to_sparse(), TypeError, "dense"),
    "short": (lambda v: v[1:], ValueError, r"\[12\], got \[11\]"),
    "a column": (lambda v: v[:, None], ValueError, r"\[12\], got \[12, 1\]"),
    "a number": (lambda v: v[0], ValueError, r"\[12\], got \[\]"),
    "device": (lambda v: v.to("meta"), ValueError, "device"),
}


@pytest.mark.parametrize(("change", "error", "match"), BAD.values(), ids=BAD)
def test_a_bad_magnitude_is_named(change, error, match, device):
    p = make(4, 6, 12, 2, device=device)
    with pytest.raises(error, match=f"^lora_linear: magnitude must .*{match}"):
        lora_kernels.lora_linear(p.x, p.w, p.a, p.b, magnitude=change(p.magnitude))


@pytest.mark.parametrize("name", ["lora_merged_linear", "lora_shared_linear"])
def test_only_lora_linear_takes_a_magnitude(name, device):
    p = make(4, 6, 12, 2, device=device)
    with pytest.raises(TypeError, match="magnitude"):
        getattr(lora_kernels, name)(p.x, p.w, p.a, p.b, magnitude=p.magnitude)
