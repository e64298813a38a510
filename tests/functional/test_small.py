"""Small products on a CPU take PyTorch's own operators: the same formula, the same gradients."""

import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_kernels
from lora_kernels import LoRALinear, lora_linear
from lora_kernels.functional import seeds
from lora_kernels.functional.small import LARGEST, is_small
from lora_kernels.spec import LoraSpec, OutputSplits
from lora_kernels.testing.problem import make_problem
from lora_kernels.testing.tolerance import assert_close
from tests.calls import call, solve
from tests.op_calls import Calls

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def of_a_user(monkeypatch):
    """As in the process of a user on a CPU."""
    monkeypatch.setenv("LORA_KERNELS_PLAN", "auto")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def ops(run) -> list[str]:
    with Calls() as calls:
        run()
    return calls.names


def plain(m=(3, 4), k=8, n=6, r=2, **options):
    return make_problem(m, k, n, r, device=CPU, **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("m", [(7,), (2, 5), (1,), ()], ids=str)
def test_results_and_gradients_are_those_of_the_formula(m, bias, seed):
    problem = plain(m or (1,), bias=bias)
    if not m:
        problem.x, problem.dy = problem.x[0], problem.dy[0]
    exact, baseline = problem.solve(torch.float64), problem.solve()
    assert ops(lambda: solve(problem)) == []
    for name, result in solve(problem).items():
        assert result.shape == exact[name].shape
        assert_close(result, exact[name], baseline[name], name)


@pytest.mark.parametrize(
    ("dtype", "strict"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, False)]
)
def test_an_exported_program_takes_any_number_of_rows(dtype, strict, seed):
    layer = LoRALinear(64, 64, r=4, dtype=dtype)
    rows = {0: torch.export.Dim("rows", max=100_000)}
    few, many = torch.randn(8, 64, dtype=dtype), torch.randn(5000, 64, dtype=dtype)
    program = torch.export.export(layer, (few,), dynamic_shapes=(rows,), strict=strict)
    assert torch.equal(program.module()(many), layer(many))


def test_dropout_is_pytorchs(seed):
    problem = plain(m=(50,), dropout_p=0.4)
    x, w, a, b = problem.x, problem.w, problem.a, problem.b
    torch.manual_seed(5)
    y = lora_linear(x, w, a, b, problem.bias, scaling=2.0, dropout_p=0.4)
    torch.manual_seed(5)
    expected = F.linear(x, w, problem.bias) + 2.0 * F.dropout(x, 0.4) @ a.T @ b.T
    torch.testing.assert_close(y, expected)


def test_a_layer_has_the_losses_of_peft_with_dropout(seed):
    import peft

    base = nn.Sequential(nn.Linear(12, 10))
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["0"], lora_dropout=0.3))
    layer = theirs.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    ours = LoRALinear.from_linear(layer.base_layer, 3, 8, lora_dropout=0.3)
    with torch.no_grad():
        ours.lora_A.copy_(layer.lora_A["default"].weight)
        ours.lora_B.copy_(layer.lora_B["default"].weight)
    x = torch.randn(9, 12)
    results = []
    for module in (theirs.train(), ours.train()):
        torch.manual_seed(1)
        results.append(module(x))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": torch.tensor([3])}, {"x": lambda x: x.double()}, {"x": lambda x: x.half()},
        {"x": lambda x: x[:1].expand(LARGEST // 48 + 1, 8)},
    ],
    ids=["seed", "float64", "float16", "large"],
)  # fmt: skip
def test_everything_else_takes_the_op(change, seed):
    problem = plain(m=(5,), dropout_p=0.1)
    x, w, a, b = problem.x, problem.w, problem.a, problem.b
    if "x" in change:
        x = change["x"](x)
        w, a, b = (t.to(x.dtype) for t in (w, a, b))
    taken = ops(lambda: lora_linear(x, w, a, b, dropout_p=0.1, seed=change.get("seed")))
    assert taken == ["lora_linear_forward"]


@pytest.mark.parametrize("name", ["reference"])
def test_the_users_wish_goes_before_it(name, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_PLAN", name)
    assert ops(lambda: call(plain())) == ["lora_linear_forward"]


def test_autocast_takes_the_op():
    problem = plain()
    with torch.autocast("cpu", torch.bfloat16):
        assert ops(lambda: call(problem)) == ["lora_linear_forward"]


def test_compiled_code_takes_the_op_for_every_size():
    problem = plain()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(
        lambda x: lora_linear(x, problem.w, problem.a, problem.b),
        backend=backend, fullgraph=True, dynamic=True,
    )  # fmt: skip
    for m in (3, 40, 20_000):
        compiled(torch.ones(m, 8))
    assert len(graphs) == 1
    assert "lora_linear" in graphs[0].lower()


def test_second_derivatives(seed):
    problem = plain(m=(3,), k=4, n=3, dtype=torch.float32)
    x = problem.x.requires_grad_()
    (dx,) = torch.autograd.grad(call(problem, x=x).square().sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x)
    w = problem.w + 2 * problem.b @ problem.a
    torch.testing.assert_close(ddx, 2 * (w.T @ w).sum(0).expand_as(x))


@pytest.mark.parametrize(
    ("operand", "value"),
    [
        ("x", torch.ones(3, 5)), ("w", torch.ones(6, 7)), ("w", torch.ones(6)),
        ("a", torch.ones(3, 8)), ("b", torch.ones(5, 2)), ("bias", torch.ones(5)),
        ("a", torch.ones(2, 8, dtype=torch.int64)),
    ],
)  # fmt: skip
def test_wrong_operands_have_the_errors_of_the_op(operand, value, monkeypatch):
    problem = plain()
    messages = []
    for asked in ("auto", "reference"):
        monkeypatch.setenv("LORA_KERNELS_PLAN", asked)
        with pytest.raises((ValueError, TypeError)) as raised:
            call(problem, **{operand: value})
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("operand", ["w", "a", "b", "bias"])
def test_operands_that_are_not_dense_are_for_the_checks_of_the_op(operand):
    operands = {"w": torch.ones(6, 8), "a": torch.ones(2, 8), "b": torch.ones(6, 2)}
    operands["bias"] = torch.ones(6)
    spec = LoraSpec(1.0, 0.0, OutputSplits.whole(6))
    assert is_small(torch.ones(3, 8), *operands.values(), spec)
    operands[operand] = operands[operand].to_sparse()
    assert not is_small(torch.ones(3, 8), *operands.values(), spec)


@pytest.mark.parametrize("options", [{"scaling": float("nan")}, {"dropout_p": 1.0},
                                     {"dropout_p": -0.1}, {"scaling": "1"}, {"dropout_p": "a"},
                                     {"scaling": 10**400}])  # fmt: skip
def test_wrong_numbers_are_refused(options):
    problem = plain()
    with pytest.raises((ValueError, TypeError), match=f"lora_linear: {next(iter(options))} must"):
        lora_linear(problem.x, problem.w, problem.a, problem.b, **options)


def test_a_rank_of_zero_is_refused():
    with pytest.raises(ValueError, match="lora_linear: lora_B must"):
        lora_linear(torch.ones(3, 8), torch.ones(6, 8), torch.ones(0, 8), torch.ones(6, 0))


@pytest.mark.parametrize("shape", [(2, 3, 8), (8,)], ids=str)
def test_results_are_no_views(shape):
    """As those of nn.Linear: code that frees, detaches or changes them in place goes on."""
    layer = LoRALinear(8, 6, r=2)
    with torch.no_grad():
        y = layer(torch.ones(shape))
    assert y._base is None
    y += torch.ones(6, requires_grad=True)
    layer(torch.ones(shape)).detach_()


def test_nothing_is_recorded_of_its_choice():
    """torch.jit.trace warns of every size that Python looks at."""
    layer = LoRALinear(8, 6, r=2, merge_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(layer, torch.ones(3, 8))
    x = torch.randn(5, 8)
    torch.testing.assert_close(traced(x), layer(x))


def test_ranks_have_masks_of_their_own(monkeypatch):
    """Equal states of PyTorch's generator give F.dropout equal masks; the op's seeds differ."""
    monkeypatch.setattr(seeds, "GroupMember", types.SimpleNamespace(WORLD=object()))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    layer = LoRALinear(8, 6, r=2, lora_dropout=0.5)
    assert ops(lambda: layer(torch.ones(3, 8))) == ["lora_linear_forward"]
    assert ops(lambda: layer.eval()(torch.ones(3, 8))) == []


def test_little_is_kept():
    """Few columns do not make many rows small."""
    spec = LoraSpec(1.0, 0.1, OutputSplits.whole(2))
    w, a, b = torch.ones(2, 4), torch.ones(1, 4), torch.ones(2, 1)
    assert is_small(torch.ones(1 << 16, 4), w, a, b, None, spec)
    assert not is_small(torch.ones((1 << 16) + 1, 4), w, a, b, None, spec)
    assert not is_small(torch.ones(0, 4), w, a, b, None, spec)


def test_a_model_of_peft_has_pefts_losses_with_dropout(unpatched, seed):
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2,
                         num_hidden_layers=1, vocab_size=9)  # fmt: skip
    model = peft.get_peft_model(
        LlamaForCausalLM(config),
        peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.2),
    ).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    ids, losses = torch.tensor([[1, 2, 3, 4]]), []
    for patch in (lambda: None, lora_kernels.patch_peft):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch()
        torch.manual_seed(0)
        losses.append(model(ids, labels=ids).loss)
    torch.testing.assert_close(*losses)
