"""Which calls an op cannot compute, and how that is said."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import lora_kernels
from lora_kernels.ops.obstacle import is_plain, obstacle
from lora_kernels.testing.problem import make_problem
from tests.op_calls import Calls
from tests.tensor_classes import Halves


class Renamed(nn.Parameter):
    """A parameter with a class of its own and PyTorch's behaviour."""


class WithMethod(Tensor):
    """A tensor with a method more."""

    def double_of_it(self):
        return self * 2


def operands(device):
    problem = make_problem(3, 8, 6, 2, device=device)
    return [problem.x, nn.Parameter(problem.w), problem.a, problem.b, problem.bias]


@pytest.mark.parametrize("kind", [Renamed, WithMethod, nn.Parameter, Tensor])
def test_classes_that_behave_as_tensors_stay_on_the_op(kind, seed, device):
    x, weight, a, b, bias = operands(device)
    weight = weight.detach().as_subclass(kind) if kind is not Renamed else Renamed(weight.detach())
    assert is_plain(type(weight))
    assert obstacle(x, weight, a, b, bias) is None
    with Calls() as calls:
        lora_kernels.lora_linear(x, weight, a, b, bias)
    assert calls.fused == 1


def test_no_obstacle_without_bias_and_for_what_is_no_tensor(seed, device):
    x, weight, a, b, _ = operands(device)
    assert obstacle(x, weight, a, b, None) is None
    assert obstacle([1.0], weight, a, b, None) is None  # a mistake, which the checks name
    assert obstacle(None, weight, a, b, None) is None


def test_operands_are_named(seed, device):
    x, weight, a, b, bias = operands(device)
    assert obstacle(x, Halves(weight.detach()), a, b, bias) == "weight is a Halves"
    assert obstacle(x, weight, a, Halves(b), bias) == "lora_B is a Halves"
    jagged = torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged)
    assert obstacle(jagged, weight, a, b, bias) == "x is a nested tensor of layout jagged"
    strided = torch._nested_tensor_from_tensor_list([x, x[:1]])
    assert obstacle(strided, weight, a, b, bias) == "x is a nested tensor of layout strided"
    recorded = torch.fx.Proxy(torch.fx.Graph().placeholder("x"))
    assert obstacle(recorded, weight, a, b, bias) == "torch.fx records x"


def test_transforms_are_named(seed, device):
    x, weight, a, b, bias = operands(device)
    said = []

    def f(x):
        said.append(obstacle(x, weight, a, b, bias))
        return x.sum()

    torch.func.vmap(f)(x)
    torch.func.jvp(f, (x,), (x,))
    torch.func.vmap(torch.func.grad(f))(x)
    with forward_ad.dual_level():
        f(forward_ad.make_dual(x, x))
    assert said == [
        "vmap of torch.func is running", "jvp of torch.func is running",
        "vmap of torch.func is running", "forward-mode AD is running",
    ]  # fmt: skip


def test_grad_of_torch_func_stays_on_the_op_if_it_can_be_differentiated_again(seed, device):
    x, weight, a, b, bias = operands(device)
    said = []

    def f(x, a, b):
        said.append(obstacle(x, weight, a, b, bias))
        return x.sum() + a.sum() + b.sum()

    weight.requires_grad = False
    torch.func.grad(f, argnums=(0, 1, 2))(x, a, b)
    torch.func.grad(f, argnums=(1, 2))(x, a, b)
    again = "torch.func may differentiate again by what the op does not save"
    torch.func.grad(f, argnums=(0, 2))(x, a, b)
    torch.func.grad(f, argnums=(1, 2))(x.requires_grad_(), a, b)
    torch.func.grad(lambda *o: torch.func.grad(f, argnums=2)(*o).sum())(x, a, b)
    assert said == [None, None, again, again, again]
