"""lora_shared_linear: in one call, what lora_linear gives layer by layer."""

import itertools

import pytest
import torch

import lora_kernels
from lora_kernels.testing.problem import make_problem
from lora_kernels.testing.tolerance import assert_close
from tests.op_calls import Calls

GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU
every_algorithm = pytest.mark.parametrize(
    "algorithm", ["reference", "fused", "addmm"], indirect=True
)
SIZES = (37, 16, 41)
SCALINGS = (2.0, -0.5, 1.5)


def problems(device, dtype=torch.float32, dropout_p=0.3, m=33, k=45, r=5, **options):
    """Layers of several sizes over the x of the first."""
    layers = [
        make_problem(
            m, k, n, r, device=device, dtype=dtype, dropout_p=dropout_p, scaling=scaling,
            bias=n != SIZES[1], **options,
        )
        for n, scaling in zip(SIZES, SCALINGS, strict=True)
    ]  # fmt: skip
    for layer in layers[1:]:
        layer.x = layers[0].x
    return layers


def lists(layers, leaves=None):
    """weights, lora_As, lora_Bs and biases of layers, or of leaves in their place."""
    sources = leaves or [layer.operands() for layer in layers]
    return [[source.get(name) for source in sources] for name in ("w", "a", "b", "bias")]


def call(layers, x=None, leaves=None, **options):
    p = layers[0].dropout_p
    seed = torch.cat([layer.seed for layer in layers]) if p else None
    x = layers[0].x if x is None else x
    return lora_kernels.lora_shared_linear(
        x, *lists(layers, leaves), scalings=[layer.scaling for layer in layers], dropout_p=p,
        seed=seed, **options,
    )  # fmt: skip


def solve(layers, call=call, trained=("w", "a", "b", "bias")):
    """Every y, dx, and the gradients of each layer's trained operands, by name."""
    x = layers[0].x.detach().requires_grad_()
    leaves = [
        {name: t.detach().requires_grad_(name in trained) for name, t in layer.operands().items()}
        for layer in layers
    ]
    ys = call(layers, x, leaves)
    named = {
        f"{name} {i}": leaf
        for i, source in enumerate(leaves)
        for name, leaf in source.items()
        if name in trained and name != "x"
    }
    grads = torch.autograd.grad(ys, [x, *named.values()], [layer.dy for layer in layers])
    results = {f"y {i}": y.detach() for i, y in enumerate(ys)}
    return results | dict(zip(["x", *named], grads, strict=True))


def expected(layers, dtype=None):
    """The same by the formula, layer by layer."""
    results, dx = {}, 0
    for i, layer in enumerate(layers):
        solved = layer.solve(dtype)
        dx = dx + solved.pop("x")
        results |= {f"{name} {i}": value for name, value in solved.items()}
    return results | {"x": dx}


@every_algorithm
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("lora_dtype", [None, torch.float32], ids=["same", "float32 adapters"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients(dtype, lora_dtype, dropout_p, algorithm, seed, device):
    layers = problems(device, dtype, dropout_p, lora_dtype=lora_dtype)
    exact, baseline = expected(layers, torch.float64), expected(layers)
    results = solve(layers)
    assert results.keys() == exact.keys()
    for name, result in results.items():
        assert result.dtype == baseline[name].dtype
        assert_close(result, exact[name], baseline[name], name)


@pytest.mark.parametrize("algorithm", ["auto"], indirect=True)
@pytest.mark.parametrize("amp", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("lora_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_both_passes_ask_for_factors_of_their_dtype(
    algorithm, lora_dtype, amp, asked, seed, device
):
    """As lora_linear does, and as report() says; autocast rounds factors to its dtype."""
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        solve(problems(device, torch.bfloat16, lora_dtype=lora_dtype))
    uniform = amp or lora_dtype == torch.bfloat16
    found = [(shape.backward, shape.uniform) for shape in asked]
    assert found == [(False, uniform), (True, uniform)]


@every_algorithm
def test_mask_of_each_layer_is_that_of_its_own_seed(algorithm, seed, device):
    layers = problems(device)
    layers[2].seed = layers[0].seed
    for name in ("a", "b", "w", "bias", "dy"):
        setattr(layers[2], name, getattr(layers[0], name).clone())
    layers[2].spec = layers[0].spec
    same, other, again = call(layers)
    assert torch.equal(same, again)
    layers[2].seed = layers[1].seed
    assert torch.equal(call(layers)[1], other)
    assert not torch.equal(call(layers)[2], same)


@every_algorithm
def test_gradients_are_adjoint_to_the_outputs(algorithm, seed, device):
    """Without bias y is linear in x: <dy, y> = <dx, x>, whatever the masks."""
    layers = problems(device, dropout_p=0.4)
    for layer in layers:
        layer.bias = None
    results = solve(layers)
    along_y = sum(
        (layer.dy.double() * results[f"y {i}"].double()).sum() for i, layer in enumerate(layers)
    )
    along_x = (results["x"].double() * layers[0].x.double()).sum()
    scale = sum(
        (layer.dy.double() * results[f"y {i}"].double()).abs().sum()
        for i, layer in enumerate(layers)
    )
    assert (along_y - along_x).abs() <= 4 * torch.finfo(torch.float32).eps * scale


@every_algorithm
def test_bits_are_the_same_in_two_runs(algorithm, seed, device):
    layers = problems(device)
    first, second = solve(layers), solve(layers)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@every_algorithm
@pytest.mark.parametrize(
    "trained",
    [
        combination
        for length in (1, 4)
        for combination in itertools.combinations(("w", "a", "b", "bias"), length)
    ],
    ids="+".join,
)
def test_gradients_of_some_operands_alone(trained, algorithm, seed, device):
    layers = problems(device, m=9, k=17)
    every, some = solve(layers), solve(layers, trained=trained)
    for name, value in some.items():
        assert torch.equal(value, every[name]), name


def test_gradients_go_to_no_layer_without_trained_operands(seed, device):
    layers = problems(device)
    leaves = [{name: t.clone() for name, t in layer.operands().items()} for layer in layers]
    leaves[1]["b"].requires_grad_()
    ys = call(layers, leaves=leaves)
    sum(y.sum() for y in ys).backward()
    assert leaves[1]["b"].grad is not None
    assert all(t.grad is None for i in (0, 2) for t in leaves[i].values())


def test_outputs_that_nobody_used_change_nothing(seed, device):
    layers = problems(device)
    x = layers[0].x.detach().requires_grad_()
    ys = call(layers, x)
    (grad,) = torch.autograd.grad(ys[1], x, layers[1].dy)
    assert_close(grad, layers[1].solve(torch.float64)["x"], layers[1].solve()["x"], "dx")


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_saved_for_backward_are_x_h_and_seeds(dropout_p, seed, device):
    layers = problems(device, dropout_p=dropout_p)
    leaves = [
        {name: t.detach().requires_grad_(name in "ab") for name, t in layer.operands().items()}
        for layer in layers
    ]
    x = layers[0].x.detach().requires_grad_()
    known = {t.untyped_storage().data_ptr() for source in leaves for t in source.values()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known | {x.untyped_storage().data_ptr()}:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ys = call(layers, x, leaves)
    m, r = x.shape[0], layers[0].a.shape[0]
    assert sum(kept.values()) == 4 * 3 * m * r + 8 * 3 * bool(dropout_p)
    del ys


def test_ops_are_called_once_each_way(seed, device):
    layers = problems(device)
    with Calls() as calls:
        solve(layers)
    assert calls.names == ["lora_shared_linear_forward", "lora_shared_linear_backward"]


@every_algorithm
def test_outputs_may_be_changed_in_place(algorithm, seed, device):
    layers = problems(device)

    def in_place(*args):
        return [torch.relu_(y) for y in call(*args)]

    def copied(*args):
        return [torch.relu(y) for y in call(*args)]

    expected = solve(layers, copied)
    for name, value in solve(layers, in_place).items():
        assert torch.equal(value, expected[name]), name


def test_compiles_as_one_graph(seed, device):
    layers = problems(device, dropout_p=0.0)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    eager, graph = solve(layers), solve(layers, compiled)
    for name, value in eager.items():
        assert torch.equal(graph[name], value), name


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_ops_pass_opcheck(dropout_p, seed, device):
    layers = problems(device, dropout_p=dropout_p, m=5, k=9)
    ws, a, bs, biases = lists(layers)
    a, p = torch.stack(a), dropout_p
    seeds = torch.cat([layer.seed for layer in layers]) if p else None
    forward = torch.ops.lora_kernels.lora_shared_linear_forward.default
    torch.library.opcheck(forward, (layers[0].x, ws, a, bs, biases, seeds, list(SCALINGS), p))
    h = forward(layers[0].x, ws, a, bs, biases, seeds, list(SCALINGS), p)[-1]
    backward = torch.ops.lora_kernels.lora_shared_linear_backward.default
    dys = [layer.dy for layer in layers]
    args = (dys, layers[0].x, h, ws, a, bs, seeds, list(SCALINGS), p, [True] * 5)
    torch.library.opcheck(backward, args)


def test_autocast_computes_as_lora_linear_does(seed, device):
    layers = problems(device, dropout_p=0.0)
    with torch.autocast(device.type, torch.bfloat16):
        ys = call(layers)
        ones = [
            lora_kernels.lora_linear(
                layer.x, layer.w, layer.a, layer.b, layer.bias, scaling=layer.scaling
            )
            for layer in layers
        ]
    for y, one in zip(ys, ones, strict=True):
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, one)


def test_seeds_are_drawn_from_torchs_generator(seed, device):
    layers = problems(device)
    x, operands = layers[0].x, lists(layers)
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        results.append(lora_kernels.lora_shared_linear(x, *operands, dropout_p=0.3))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    again = lora_kernels.lora_shared_linear(x, *operands, dropout_p=0.3)
    assert not torch.equal(again[0], results[0][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_Bs": []}, "lora_Bs must have one entry for each .* got 0 for 3"),
        ({"scalings": [1.0]}, "scalings must have one entry .* got 1 for 3"),
        ({"lora_As": "ranks"}, r"all lora_As must have the same number of rows, got \[5, 5, 4\]"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed must be an int64 tensor of 3 elements"),
        ({"weights": [], "lora_As": [], "lora_Bs": [], "biases": []}, ".* must not be empty"),
    ],
    ids=["lora_Bs", "scalings", "lora_As", "seed", "nothing"],
)
def test_errors_name_what_does_not_fit(change, message, seed, device):
    layers = problems(device)
    weights, lora_as, lora_bs, biases = lists(layers)
    arguments = {"weights": weights, "lora_As": lora_as, "lora_Bs": lora_bs, "biases": biases}
    if change.get("lora_As") == "ranks":
        change = {"lora_As": [*lora_as[:2], lora_as[2][:4]]}
    change = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=f"lora_shared_linear: {message}"):
        lora_kernels.lora_shared_linear(layers[0].x, **{**arguments, "dropout_p": 0.1, **change})
