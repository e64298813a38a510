"""Every layer under torch.func and its relatives, against a layer whose weight holds the update."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.functional import hessian as autograd_hessian
from torch.autograd.functional import jacobian
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vmap,
)  # fmt: skip
from torch.nn import functional as F

from lora_kernels import LoRAConv2d, LoRAEmbedding, LoRALinear, LoRAMergedLinear, share_inputs
from tests.layers.cases import build

MAKERS = {
    "linear": lambda **kw: LoRALinear(3, 4, r=2, **kw),
    "fan_in_fan_out": lambda **kw: LoRALinear(3, 4, r=2, fan_in_fan_out=True, **kw),
    "merged_linear": lambda **kw: LoRAMergedLinear(3, 4, r=1, enable_lora=[True, False], **kw),
    "embedding": lambda **kw: LoRAEmbedding(5, 4, r=2, **kw),
    "sparse embedding": lambda **kw: LoRAEmbedding(5, 4, r=2, sparse=True, **kw),
    "conv": lambda **kw: LoRAConv2d(2, 3, 2, r=2, **kw),
}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
every_mode = pytest.mark.parametrize(
    ("training", "merge_weights"), [(True, True), (False, True), (False, False)],
    ids=["train", "merged", "on the fly"],
)  # fmt: skip


class Twin(nn.Module):
    """The plain layer with base + delta for a weight, in one product."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        layer = self.layer
        weight = layer.base_weight() + layer.delta_weight()
        if isinstance(layer, LoRAEmbedding):
            return F.embedding(x, weight)
        if isinstance(layer, LoRAConv2d):
            return F.conv2d(x, weight, layer.bias)
        return F.linear(x, layer.oriented(weight), layer.bias)


def built(make, device, training, merge_weights):
    layer = build(make, device, dtype=torch.float64, merge_weights=merge_weights)
    return layer.train(training)


def example(layer, device):
    if isinstance(layer, LoRAEmbedding):
        return torch.tensor([[0, 1, 4], [2, 2, 3], [1, 0, 0]], device=device)
    shape = (3, 2, 3, 3) if isinstance(layer, LoRAConv2d) else (3, 3)
    return torch.randn(shape, dtype=torch.float64, device=device)


def of_factors(module, x):
    """module's output for x as a function of lora_A and lora_B, and these."""
    values = {name: value.detach() for name, value in module.named_parameters()}
    names = [name for name in values if name.endswith(("lora_A", "lora_B"))]

    def f(a, b, x=x):
        return functional_call(module, values | dict(zip(names, (a, b), strict=True)), (x,))

    return f, [values[name] for name in names]


def cubes(f):
    return lambda *args, **kwargs: f(*args, **kwargs).pow(3).sum()


def dual(f, operands):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, t.cos()) for t in operands]
        return forward_ad.unpack_dual(f(*duals)).tangent


def per_sample(f, operands, x):
    def of(sample):
        return grad(lambda a, b: cubes(f)(a, b, x=sample), argnums=(0, 1))(*operands)

    return vmap(of)(x), [torch.stack(grads) for grads in zip(*map(of, x), strict=True)]


BY_FACTORS = {
    "grad": lambda f, o: grad(cubes(f), argnums=(0, 1))(*o),
    "jvp": lambda f, o: jvp(f, tuple(o), tuple(t.cos() for t in o))[1],
    "jacrev": lambda f, o: jacrev(f, argnums=(0, 1))(*o),
    "jacfwd": lambda f, o: jacfwd(f, argnums=(0, 1))(*o),
    "hessian": lambda f, o: hessian(cubes(f), argnums=(0, 1))(*o),
    "vmap": lambda f, o: vmap(f)(*(torch.stack((t, t.sin())) for t in o)),
    "vmap of one": lambda f, o: vmap(f, (None, 0))(o[0], torch.stack((o[1], o[1].sin()))),
    "forward-mode AD": dual,
}
BATCHED = {
    "jacobian": lambda f, o: jacobian(f, tuple(o), vectorize=True),
    "hessian": lambda f, o: autograd_hessian(cubes(f), tuple(o), vectorize=True),
}


@every_maker
@every_mode
@pytest.mark.parametrize("transform", BY_FACTORS.values(), ids=BY_FACTORS)
def test_derivatives_by_the_factors(transform, training, merge_weights, make, seed, device):
    layer = built(make, device, training, merge_weights)
    x = example(layer, device)
    ours, theirs = (transform(*of_factors(module, x)) for module in (layer, Twin(layer)))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "sparse embedding"])
@every_mode
@pytest.mark.parametrize("of", BATCHED.values(), ids=BATCHED)
def test_batches_of_gradients(of, training, merge_weights, name, seed, device):
    layer = built(MAKERS[name], device, training, merge_weights)
    x = example(layer, device)
    ours, theirs = (of(*of_factors(module, x)) for module in (layer, Twin(layer)))
    torch.testing.assert_close(ours, theirs)


def test_sparse_gradients_have_no_batches(seed, device):
    layer = built(MAKERS["sparse embedding"], device, True, False)
    with pytest.raises(RuntimeError, match=r"LoRAEmbedding: with sparse=True .*sparse=False"):
        BATCHED["jacobian"](*of_factors(layer, example(layer, device)))


BY_X = {
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),))[1],
    "jacrev": lambda f, x: jacrev(f)(x),
    "hessian": lambda f, x: hessian(cubes(f))(x),
    "vmap": lambda f, x: vmap(f)(torch.stack((x, x.sin()))),
    "forward-mode AD": lambda f, x: dual(f, [x]),
    "jacobian": lambda f, x: jacobian(f, x, vectorize=True),
    "jacobian, forward mode": lambda f, x: jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    ),
    "hessian of autograd": lambda f, x: autograd_hessian(cubes(f), x, vectorize=True),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in MAKERS if "embedding" not in name])
@every_mode
@pytest.mark.parametrize("transform", BY_X.values(), ids=BY_X)
def test_derivatives_by_x(transform, training, merge_weights, name, seed, device):
    layer = built(MAKERS[name], device, training, merge_weights)
    x = example(layer, device)
    torch.testing.assert_close(transform(layer, x), transform(Twin(layer), x))


@every_maker
@every_mode
def test_per_sample_gradients_are_those_of_a_loop(training, merge_weights, make, seed, device):
    layer = built(make, device, training, merge_weights)
    x = example(layer, device)
    for module in (layer, Twin(layer)):
        together, loop = per_sample(*of_factors(module, x), x)
        torch.testing.assert_close(list(together), loop)


@every_maker
@every_mode
def test_ensembles(training, merge_weights, make, seed, device):
    layers = [built(make, device, training, merge_weights) for _ in range(3)]
    x = example(layers[0], device)
    parameters, buffers = stack_module_state(layers)
    together = vmap(
        lambda values, others: functional_call(layers[0], (values, others), (x,))
    )(parameters, buffers)  # fmt: skip
    torch.testing.assert_close(together, torch.stack([layer(x) for layer in layers]))


@every_mode
def test_options_of_embeddings_under_transforms(training, merge_weights, seed, device):
    def make(**kw):
        return LoRAEmbedding(5, 4, r=2, max_norm=0.7, padding_idx=1, **kw)

    layer = built(make, device, training, merge_weights)
    x = example(layer, device)
    f, operands = of_factors(layer, x)
    together, loop = per_sample(f, operands, x)
    torch.testing.assert_close(list(together), loop)
    torch.testing.assert_close(vmap(layer)(x), layer(x))


def test_joined_layers_under_transforms(seed, device):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(self, name, build(MAKERS["linear"], device, dtype=torch.float64))

        def forward(self, x):
            return self.q_proj(x) * self.k_proj(x) + self.v_proj(x)

    block, x = Block(), torch.randn(5, 3, dtype=torch.float64, device=device)
    transforms = [
        lambda f: vmap(f)(x),
        lambda f: jacrev(f)(x),
        lambda f: hessian(lambda x: f(x).pow(2).sum())(x),
        lambda f: jacobian(f, x, vectorize=True),
        lambda f: torch.fx.symbolic_trace(f)(x),
        lambda f: autograd_hessian(lambda x: f(x).pow(2).sum(), x),
    ]
    alone = [transform(block) for transform in transforms]
    share_inputs(block)
    for transform, expected in zip(transforms, alone, strict=True):
        torch.testing.assert_close(transform(block), expected)
