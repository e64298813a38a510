"""compute: the algorithm that is chosen is the one that runs."""

import pytest
import torch

import lora_kernels
from lora_kernels.dispatch import algorithm as algorithms
from lora_kernels.dispatch.algorithm import Algorithm


@pytest.fixture
def seen(monkeypatch):
    """The ops that reach the kernels, and the algorithm that each is run by."""
    from lora_kernels.kernels import linear, shared_input

    calls = []
    for module in (linear, shared_input):
        for name in module.__all__:
            if name.startswith("lora_"):
                real = getattr(module, name)

                def call(algorithm, *args, name=name, real=real):
                    calls.append((name, algorithm))
                    return real(algorithm, *args)

                monkeypatch.setattr(module, name, call)
    return calls


@pytest.mark.parametrize("algorithm", ["fused", "addmm", "reference"], indirect=True)
def test_layers_take_the_plan_that_is_chosen(algorithm, seen, device):
    layer = lora_kernels.Linear(8, 6, r=2, device=device)
    layer(torch.randn(3, 8, device=device)).sum().backward()
    assert [name for _, name in seen] == (
        [] if algorithm == "reference" else [algorithm, algorithm]
    )


@pytest.mark.parametrize("shared", [False, True])
def test_each_pass_asks_for_its_own_plan(shared, seen, monkeypatch, device):
    monkeypatch.setattr(
        algorithms, "choose", lambda shape: Algorithm("addmm" if shape.backward else "fused", "")
    )
    x, w, a, b = (
        torch.randn(shape, device=device, requires_grad=True)
        for shape in ((3, 8), (6, 8), (2, 8), (6, 2))
    )
    if shared:
        (y,) = lora_kernels.lora_shared_linear(x, [w.detach()], [a], [b])
    else:
        y = lora_kernels.lora_linear(x, w.detach(), a, b)
    y.sum().backward()
    op = "lora_shared_linear" if shared else "lora_linear"
    assert seen == [(f"{op}_forward", "fused"), (f"{op}_backward", "addmm")]
