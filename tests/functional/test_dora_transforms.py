"""lora_linear with a magnitude: derivatives of derivatives, torch.func, batches of gradients."""

import itertools

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from lora_kernels.reference import dora as reference
from lora_kernels.reference import dora_formula
from lora_kernels.testing.dora_problem import DORA_OPERANDS
from lora_kernels.testing.dora_problem import dora_formula as formula
from tests.calls import call_dora
from tests.functional.test_dora import every_law, make


@pytest.fixture
def constant_norms(monkeypatch):
    """The norms are constants, as every gradient takes them: not so when operands are nudged."""

    def fix(problem):
        p = problem
        norms = reference.row_norms(p.w, p.a, p.b, p.scaling)
        monkeypatch.setattr(reference, "row_norms", lambda *_: norms)
        monkeypatch.setattr(dora_formula, "row_norms", lambda *_: norms)
        return norms

    return fix


@every_law
@pytest.mark.parametrize("zero", [False, True], ids=["", "a magnitude of zero"])
def test_gradcheck_and_gradgradcheck(zero, constant_norms, dropout_p, low_rank_only, seed, device):
    law = (dropout_p, low_rank_only)
    problem = make(3, 5, 6, 2, device=device, dtype=torch.float64, law=law)
    if zero:
        problem.magnitude[2] = 0
    constant_norms(problem)
    leaves = [value.requires_grad_() for value in problem.operands().values()]

    def function(*operands):
        return call_dora(problem, **dict(zip(DORA_OPERANDS, operands, strict=True)))

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("needs", [n for n in itertools.product([False, True], repeat=6) if any(n)])
def test_double_backward_of_every_subset(needs, constant_norms, seed, device):
    problem = make(2, 3, 5, 1, device=device, dtype=torch.float64, law=(0.4, False))
    constant_norms(problem)
    asked = [name for name, needed in zip(DORA_OPERANDS, needs, strict=True) if needed]
    leaves = [getattr(problem, name).requires_grad_() for name in asked]

    def function(*operands):
        return call_dora(problem, **dict(zip(asked, operands, strict=True)))

    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


TRANSFORMS = {
    "grad": lambda f, o: grad(lambda *o: f(*o).pow(3).sum(), argnums=tuple(range(6)))(*o),
    "jacrev": lambda f, o: jacrev(f, argnums=tuple(range(6)))(*o),
    "jacfwd": lambda f, o: jacfwd(f, argnums=(0, 2, 5))(*o),
    "hessian": lambda f, o: hessian(lambda *o: f(*o).pow(3).sum(), argnums=(0, 2, 5))(*o),
    "vmap": lambda f, o: vmap(f)(*(torch.stack((t, t.cos())) for t in o)),
    "vmap over magnitude": lambda f, o: vmap(f, (*[None] * 5, 0))(
        *o[:5], torch.stack((o[5], o[5].cos()))
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@every_law
def test_transforms(name, dropout_p, low_rank_only, seed, device):
    law = (dropout_p, low_rank_only)
    problem = make(3, 5, 6, 2, device=device, dtype=torch.float64, law=law)
    mask = problem.scaled_mask()

    def ours(*operands):
        return call_dora(problem, **dict(zip(DORA_OPERANDS, operands, strict=True)))

    def theirs(*operands):
        return formula(*operands, problem.spec, mask)

    operands = tuple(problem.operands().values())
    transform = TRANSFORMS[name]
    torch.testing.assert_close(transform(ours, operands), transform(theirs, operands))


@pytest.mark.parametrize("create_graph", [False, True])
@every_law
def test_batches_of_gradients(create_graph, dropout_p, low_rank_only, seed, device):
    law = (dropout_p, low_rank_only)
    problem = make(3, 5, 6, 2, device=device, dtype=torch.float64, law=law)
    leaves = [value.requires_grad_() for value in problem.operands().values()]
    y = call_dora(problem)
    dys = torch.randn(4, *y.shape, dtype=torch.float64, device=device)

    def of(dy, **options):
        return torch.autograd.grad(
            y, leaves, dy, retain_graph=True, create_graph=create_graph, **options
        )

    loop = [torch.stack(grads) for grads in zip(*(of(dy) for dy in dys), strict=True)]
    torch.testing.assert_close(list(of(dys, is_grads_batched=True)), loop)
