"""lora_linear, lora_merged_linear and lora_shared_linear under torch.func and its relatives."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.functional import hessian as autograd_hessian
from torch.autograd.functional import hvp, jacobian
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import lora_kernels
from lora_kernels import dropout
from lora_kernels.testing.problem import OPERANDS, lora_formula, make_problem
from tests.calls import call

QKV = [(4, True), (2, False), (3, True)]
every_group = pytest.mark.parametrize("groups", [None, QKV], ids=["linear", "merged"])
every_dropout = pytest.mark.parametrize("dropout_p", [0.0, 0.3])


def pair(groups, dropout_p, device, m=3):
    """The public function and the formula, of all operands; and the operands, in float64."""
    problem = make_problem(
        m, 5, 9, 2, device=device, dtype=torch.float64, dropout_p=dropout_p, groups=groups
    )
    mask = problem.mask()
    if mask is not None:
        mask = mask.double() * dropout.keep_scale(dropout_p)

    def ours(*operands):
        return call(problem, **dict(zip(OPERANDS, operands, strict=True)))

    def theirs(*operands):
        return lora_formula(*operands, problem.spec, mask)

    return ours, theirs, tuple(problem.operands().values())


def loss(f):
    return lambda *operands: f(*operands).pow(3).sum()


def forward_mode(f, operands):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, t.cos()) for t in operands]
        return forward_ad.unpack_dual(f(*duals)).tangent


def by_name(function, *argnums):
    return lambda f, operands: function(f, argnums=argnums or tuple(range(5)))(*operands)


TRANSFORMS = {
    "jvp": lambda f, operands: jvp(f, operands, tuple(t.cos() for t in operands))[1],
    "jacrev": by_name(jacrev),
    "jacrev by x and lora_B": by_name(jacrev, 0, 3),
    "jacfwd": by_name(jacfwd),
    "hessian": lambda f, operands: hessian(loss(f), argnums=(0, 2, 3))(*operands),
    "jacrev of jacrev": lambda f, operands: jacrev(jacrev(loss(f)), argnums=(0, 3))(*operands),
    "grad of grad by x and lora_B": lambda f, operands: grad(
        lambda *ts: grad(loss(f), argnums=3)(*ts).pow(2).sum(), argnums=(0, 3)
    )(*operands),
    "three derivatives": lambda f, operands: grad(
        lambda *o: grad(lambda *p: grad(loss(f))(*p).pow(2).sum(), argnums=2)(*o).sum(), argnums=3
    )(*operands),
    "vmap over all": lambda f, operands: vmap(f)(*(torch.stack((t, t.sin())) for t in operands)),
    "vmap over lora_B": lambda f, operands: vmap(f, (None, None, None, 0, None))(
        *operands[:3], torch.stack((operands[3], operands[3].sin())), operands[4]
    ),
    "vmap of vmap": lambda f, operands: vmap(
        vmap(f, (0, None, None, None, None)), (None, None, 0, None, None)
    )(torch.stack([operands[0]] * 2), operands[1], torch.stack([operands[2]] * 2), *operands[3:]),
    "forward-mode AD": forward_mode,
    "jacobian, vectorised": lambda f, operands: jacobian(f, operands, vectorize=True),
    "jacobian, forward mode": lambda f, operands: jacobian(
        f, operands, vectorize=True, strategy="forward-mode"
    ),
    "hessian, vectorised": lambda f, operands: autograd_hessian(
        loss(f), operands[:4], vectorize=True
    ),
    "hvp": lambda f, operands: hvp(loss(f), operands[:4], tuple(t.cos() for t in operands[:4]))[1],
}  # fmt: skip
OF_FOUR = ("hessian, vectorised", "hvp")


@pytest.mark.parametrize("name", TRANSFORMS)
@every_dropout
@every_group
def test_transform(name, groups, dropout_p, seed, device):
    ours, theirs, operands = pair(groups, dropout_p, device)
    if name in OF_FOUR:
        bias = operands[4]
        full = ours, theirs
        ours, theirs = (lambda *o, f=f: f(*o, bias) for f in full)
    transform = TRANSFORMS[name]
    torch.testing.assert_close(transform(ours, operands), transform(theirs, operands))


@every_dropout
@every_group
def test_per_sample_gradients_are_those_of_a_loop(groups, dropout_p, seed, device):
    ours, _, (_, *weights) = pair(groups, dropout_p, device)
    samples = torch.randn(6, 3, 5, dtype=torch.float64, device=device)

    def of_sample(x):
        return grad(lambda *ws: loss(ours)(x, *ws), argnums=(1, 2))(*weights)

    together = vmap(of_sample)(samples)
    loop = [of_sample(x) for x in samples]
    for index, gradient in enumerate(together):
        torch.testing.assert_close(gradient, torch.stack([grads[index] for grads in loop]))


# ---- dropout under vmap ----


def dropped(x, **options):
    """x_hat through the op: weight 0, lora_A and lora_B the identity."""
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return lora_kernels.lora_linear(x, eye * 0, eye, eye, dropout_p=0.5, **options)


def test_vmap_says_what_random_numbers_do(seed, device):
    x = torch.ones(4, 16, 8, device=device)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(dropped)(x)
    same = vmap(dropped, randomness="same")(x)
    different = vmap(dropped, randomness="different")(x)
    assert set(same.unique().tolist()) == set(different.unique().tolist()) == {0.0, 2.0}
    assert all(torch.equal(same[0], other) for other in same[1:])
    assert not any(torch.equal(different[0], other) for other in different[1:])


def test_seeds_may_be_batched(seed, device):
    x = torch.randn(4, 16, 8, device=device)
    seeds = torch.arange(4, device=device)[:, None] * 7919
    together = vmap(lambda x, own: dropped(x, seed=own))(x, seeds)
    alone = [dropped(one, seed=own) for one, own in zip(x, seeds, strict=True)]
    assert torch.equal(together, torch.stack(alone))


# ---- batches of gradients ----


@every_dropout
@every_group
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("way", ["is_grads_batched", "vmap"])
def test_batches_of_gradients(way, create_graph, groups, dropout_p, seed, device):
    ours, _, operands = pair(groups, dropout_p, device)
    leaves = [t.requires_grad_() for t in operands]
    y = ours(*leaves)
    dys = torch.randn(4, *y.shape, dtype=torch.float64, device=device)

    def of(dy, **options):
        return torch.autograd.grad(
            y, leaves, dy, retain_graph=True, create_graph=create_graph, **options
        )

    together = of(dys, is_grads_batched=True) if way == "is_grads_batched" else vmap(of)(dys)
    loop = [torch.stack(grads) for grads in zip(*(of(dy) for dy in dys), strict=True)]
    torch.testing.assert_close(list(together), loop)
    if create_graph:  # and the second derivative of a batch
        second = [
            torch.autograd.grad(sum(g.pow(2).sum() for g in grads), leaves[:4], retain_graph=True)
            for grads in (together, loop)
        ]
        torch.testing.assert_close(*second)


def shared(device, dropout_p):
    layers = [
        make_problem(3, 5, n, 2, device=device, dtype=torch.float64, dropout_p=dropout_p)
        for n in (4, 6)
    ]
    seed = torch.cat([layer.seed for layer in layers]) if dropout_p else None
    names = ("w", "a", "b", "bias")
    lists = [[getattr(layer, name).requires_grad_() for layer in layers] for name in names]
    x = layers[0].x.requires_grad_()

    def together(x, *flat):
        ws, a, b, biases = (flat[i : i + 2] for i in range(0, 8, 2))
        return lora_kernels.lora_shared_linear(x, ws, a, b, biases, dropout_p=dropout_p, seed=seed)

    def alone(x, *flat):
        return tuple(
            lora_kernels.lora_linear(
                x, *flat[i::2], dropout_p=dropout_p, seed=None if seed is None else seed[i : i + 1]
            )
            for i in range(2)
        )

    return together, alone, (x, *(t for same in lists for t in same))


@every_dropout
def test_shared_input_under_transforms(dropout_p, seed, device):
    together, alone, operands = shared(device, dropout_p)
    for transform in (
        lambda f: jacrev(f, argnums=(0, 3))(*operands),
        lambda f: jvp(f, operands, operands)[1],
        lambda f: vmap(lambda x: f(x, *operands[1:]))(torch.stack([operands[0]] * 2)),
        lambda f: grad(lambda *o: sum(y.pow(3).sum() for y in f(*o)), argnums=(0, 5))(*operands),
    ):
        torch.testing.assert_close(transform(together), transform(alone))


@every_dropout
@pytest.mark.parametrize("create_graph", [False, True])
def test_batches_of_gradients_of_a_shared_input(create_graph, dropout_p, seed, device):
    together, alone, operands = shared(device, dropout_p)
    dys = [torch.randn(4, 3, n, dtype=torch.float64, device=device) for n in (4, 6)]
    results = [
        torch.autograd.grad(f(*operands), operands, dys, is_grads_batched=True,
                            create_graph=create_graph)
        for f in (together, alone)
    ]  # fmt: skip
    torch.testing.assert_close(*results)


@every_dropout
def test_second_derivative_of_a_shared_input(dropout_p, seed, device):
    together, _, operands = shared(device, dropout_p)
    assert torch.autograd.gradgradcheck(together, operands)


@pytest.mark.parametrize("op", ["lora_linear_forward", "lora_linear_backward"])
def test_ops_have_batching_rules(op, seed, device):
    problem = make_problem(3, 5, 9, 2, device=device, dtype=torch.float64, dropout_p=0.3)
    h = torch.randn(3, 2, dtype=torch.float64, device=device)
    p = problem
    constants = (2.0, 0.3, [9], [True])
    call = getattr(torch.ops.lora_kernels, op).default
    if op == "lora_linear_forward":
        tensors = (p.x, p.w, p.a, p.b, p.bias, p.seed)
    else:
        tensors, constants = (p.dy, p.x, h, p.w, p.a, p.b, p.seed), (*constants, [True] * 5)
    for index in range(len(tensors) - 1):  # a batch of this operand alone
        stacked = torch.stack((tensors[index], tensors[index].sin()))

        def one(value, index=index):
            return call(*tensors[:index], value, *tensors[index + 1 :], *constants)

        loop = [torch.stack(results) for results in zip(*map(one, stacked), strict=True)]
        torch.testing.assert_close(list(vmap(one)(stacked)), loop)


# ---- under torch.compile ----


@pytest.mark.parametrize("transform", [vmap, grad], ids=["vmap", "grad"])
def test_transforms_compile_whole(transform, seed, device):
    torch._dynamo.reset()
    ours, _, (x, *weights) = pair(None, 0.0, device)
    f = (lambda x: ours(x, *weights)) if transform is vmap else lambda x: ours(x, *weights).sum()
    compiled = torch.compile(lambda x: transform(f)(x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), transform(f)(x))
    torch._dynamo.reset()
