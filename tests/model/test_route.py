"""route(): every row takes its adapter, and a job trains as it trains alone."""

import copy
import functools
import threading

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lora_kernels as lora
from lora_kernels.testing.tolerance import assert_close
from tests.model.multi_cases import (
    ADAPTERS,
    LENGTH,
    Jobs,
    Net,
    alone,
    example,
    gradients,
    model_with_adapters,
)

pytestmark = pytest.mark.usefixtures("seed")
SHUFFLED = ["c", None, "a", "b", "a", "a", None, "d", "c"]
both_checkpoints = pytest.mark.parametrize("reentrant", [False, True], ids=["new", "reentrant"])


def no_dropout(adapters=ADAPTERS):
    return {name: {**options, "lora_dropout": 0.0} for name, options in adapters.items()}


def train_once(model, names, x, call=lambda model, x: model(x), **options):
    """y, dx and the gradients of a step, by name."""
    leaf = x.detach().clone().requires_grad_()
    with lora.route(model, names, **options):
        y = call(model, leaf)
        y.sum().backward()
    found = {"y": y.detach(), "x": leaf.grad, **gradients(model)}
    model.zero_grad()
    return found


def in_checkpoint(model, x, reentrant=False, **options):
    return checkpoint(model, x, use_reentrant=reentrant, **options)


def by_blocks(model, x, reentrant):
    for block in model.blocks:
        x = checkpoint(block, x, use_reentrant=reentrant)
    return x


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


# ---- rows and adapters ----


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_sample_gets_what_its_adapter_gives_alone(mode, dtype):
    model = model_with_adapters(torch.float32, no_dropout()).to(dtype).train(mode == "train")
    x = example(SHUFFLED, dtype)
    with lora.route(model, SHUFFLED):
        y = model(x)
    exact, wide = torch.empty_like(y, dtype=torch.float64), copy.deepcopy(model).double()
    plain = torch.empty_like(y)
    for i, name in enumerate(SHUFFLED):
        exact[i] = alone(wide, name)(x[i : i + 1].double())[0]
        plain[i] = alone(model, name)(x[i : i + 1])[0]
    assert_close(y, exact, plain)


def test_rows_that_are_packed_or_flattened_are_those_of_the_samples():
    model = model_with_adapters().eval()
    x = example(SHUFFLED)
    with lora.route(model, SHUFFLED):
        expected = model(x).flatten(0, 1)
        assert torch.equal(model(x.flatten(0, 1)), expected)
    with lora.route(model, SHUFFLED, lengths=[LENGTH] * len(SHUFFLED)):
        assert torch.equal(model(x.view(1, -1, 24))[0], expected)
    with lora.route(model, ["a", None, "b"], lengths=[32, 0, 16]):
        packed = model(x[:3].flatten(0, 1))
    with lora.route(model, ["a", "a", "b"]):
        assert torch.equal(packed, model(x[:3]).flatten(0, 1))


def test_layers_that_lack_an_adapter_give_its_rows_the_base():
    adapters = {"a": {"r": 2, "lora_alpha": 2, "target_modules": ["up"]},
                "b": {"r": 3, "lora_alpha": 2, "target_modules": ["down"]}}  # fmt: skip
    model = model_with_adapters(torch.float64, adapters)
    block, x = model.blocks[0], example("ab", torch.float64)
    assert set(block.up.adapters) == {"a"}
    assert set(block.down.adapters) == {"b"}
    assert type(block.query) is nn.Linear
    with lora.route(model, ["a", "b"]):
        y = block.up(x)
    base = F.linear(x, block.up.weight, block.up.bias)
    assert torch.equal(y[1], base[1])
    assert not torch.equal(y[0], base[0])
    with lora.route(model, ["b", "b"]):
        assert torch.equal(block.up(x), base)


def test_absent_adapters_get_no_gradient_and_the_base_none():
    model = model_with_adapters()
    found = train_once(model, ["a", None, "c"], example("abc"))
    trained = {name.rpartition("_")[2] for name in found if "lora" in name}
    assert trained == {"a", "c"}
    assert not any("weight" in name or "bias" in name for name in found)


# ---- jobs do not see each other ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_jobs_in_a_mix_end_as_jobs_one_after_another(dtype):
    mixed, single = Jobs(dtype).train(True), Jobs(dtype).train(False)
    assert_same(mixed, single)
    start = dict(model_with_adapters(dtype).named_parameters())
    assert all(torch.equal(p, start[n]) == ("lora" not in n) for n, p in mixed.items())


@both_checkpoints
def test_jobs_are_the_same_with_checkpointing(reentrant):
    call = functools.partial(by_blocks, reentrant=reentrant)

    def through(model, x):
        return call(model, x.requires_grad_())

    assert_same(Jobs(torch.float32).train(True, through), Jobs(torch.float32).train(True))


def test_masks_depend_on_the_seed_the_layer_and_the_call():
    layers = {"a": {"r": 2, "lora_alpha": 2, "lora_dropout": 0.5}}
    model = lora.apply_lora(Net(), adapters=layers)
    first, second = model.blocks[0].query, model.blocks[1].query
    with torch.no_grad():
        for layer in (first, second):
            layer.weight.zero_()
            layer.bias.zero_()
            layer.lora_A_a.fill_(1)
            layer.lora_B_a.fill_(1)
    x = torch.rand(1, LENGTH, 24)

    def outputs(**options):
        with lora.route(model, ["a"], **options):
            return [layer(x) for layer in (first, first, second)]

    one, again, other = outputs(seeds={"a": 1}), outputs(seeds={"a": 1}), outputs(seeds={"a": 2})
    for y, same, different in zip(one, again, other, strict=True):
        assert torch.equal(y, same)
        assert not torch.equal(y, different)
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], one[2])
    torch.manual_seed(5)
    drawn = outputs()
    torch.manual_seed(5)
    assert torch.equal(outputs()[0], drawn[0])
    assert not torch.equal(outputs()[0], drawn[0])


def test_a_generator_is_drawn_from_only_if_its_adapter_is_present():
    model, generator = model_with_adapters(), torch.Generator().manual_seed(3)
    before = generator.get_state()
    with lora.route(model, ["b"], seeds={"a": generator}):
        pass
    assert torch.equal(generator.get_state(), before)
    with lora.route(model, ["a"], seeds={"a": generator}):
        pass
    assert not torch.equal(generator.get_state(), before)


# ---- the backward ----


@both_checkpoints
@pytest.mark.parametrize("call", [in_checkpoint, by_blocks])
def test_checkpointing_gives_the_same_bits(call, reentrant):
    model, x = model_with_adapters(), example(SHUFFLED)
    seeds = dict.fromkeys(ADAPTERS, 7)
    expected = train_once(model, SHUFFLED, x, seeds=seeds)
    actual = train_once(
        model, SHUFFLED, x, functools.partial(call, reentrant=reentrant), seeds=seeds
    )
    assert_same(actual, expected)


def test_a_backward_without_recomputation_may_come_after_the_route():
    model, x = model_with_adapters(), example(SHUFFLED)
    seeds = dict.fromkeys(ADAPTERS, 7)
    expected = train_once(model, SHUFFLED, x, seeds=seeds)
    leaf = x.clone().requires_grad_()
    with lora.route(model, SHUFFLED, seeds=seeds):
        y = model(leaf)
    y.sum().backward()
    assert_same({"y": y.detach(), "x": leaf.grad, **gradients(model)}, expected)


@both_checkpoints
@pytest.mark.parametrize("where", ["outside", "in another", "in an inner one"])
def test_a_recomputation_in_another_route_raises_or_is_right(where, reentrant):
    model, x = model_with_adapters(), example(SHUFFLED)
    call = functools.partial(in_checkpoint, reentrant=reentrant)
    others, leaf = SHUFFLED[::-1], x.clone().requires_grad_()
    seeds = dict.fromkeys(ADAPTERS, 7)
    expected = train_once(model, SHUFFLED, x, seeds=seeds)
    if where == "in an inner one":
        with lora.route(model, SHUFFLED, seeds=seeds):
            y = call(model, leaf)
            with lora.route(model, others):
                model(x)
                y.sum().backward()
        assert_same({"y": y.detach(), "x": leaf.grad, **gradients(model)}, expected)
        return
    with lora.route(model, SHUFFLED, seeds=seeds):
        y = call(model, leaf)
    message = r"route\(\) of the layer's forward.*backward\(\) in the same"
    if where == "outside":
        with pytest.raises(RuntimeError, match=message):
            y.sum().backward()
        return
    with lora.route(model, others):
        z = call(model, leaf)
        with pytest.raises(RuntimeError, match=message):
            (y + z).sum().backward()


def test_routes_of_two_models_nest_and_each_thread_has_its_own():
    first, second, x = model_with_adapters().eval(), model_with_adapters().eval(), example("ab")
    with lora.route(first, ["a", "b"]):
        ab = first(x)
        with lora.route(second, ["b", "a"]), lora.route(first, ["b", "a"]):
            ba = first(x)
            assert torch.equal(second(x), ba)
        assert torch.equal(first(x), ab)
    assert not torch.equal(ab, ba)
    found, barrier = {}, threading.Barrier(2)

    def run(names):
        with lora.route(first, names):
            barrier.wait()
            found[tuple(names)] = [first(x) for _ in range(20)]
            barrier.wait()

    threads = [threading.Thread(target=run, args=(names,)) for names in (["a", "b"], ["b", "a"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, ab) for y in found["a", "b"])
    assert all(torch.equal(y, ba) for y in found["b", "a"])
    assert not any(m._active.entries for m in first.modules() if hasattr(m, "_active"))


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
def test_a_routed_forward_compiles_without_breaks(dropout):
    torch._dynamo.reset()
    model, x = (
        model_with_adapters(adapters=ADAPTERS if dropout else no_dropout()),
        example(SHUFFLED),
    )
    seeds = dict.fromkeys(ADAPTERS, 7)
    expected = train_once(model, SHUFFLED, x, seeds=seeds)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):
        actual = train_once(model, SHUFFLED, x, lambda _, x: compiled(x), seeds=seeds)
        assert_same(actual, expected)
    assert counter.frame_count == 1
    mixed = SHUFFLED[::-1]
    actual = train_once(model, mixed, x, lambda _, x: compiled(x), seeds=seeds)
    assert_same(actual, train_once(model, mixed, x, seeds=seeds))
    with pytest.raises(RuntimeError, match="route"):
        compiled(x)


def test_a_copy_or_a_pickle_made_in_a_route_is_in_none():
    model = model_with_adapters()
    with lora.route(model, ["a"]):
        twin = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="route"):
        twin(example("a"))
    with lora.route(twin, ["a"]):
        twin(example("a"))


# ---- what does not fit ----


def test_a_call_without_a_route_names_route():
    model = model_with_adapters()
    with pytest.raises(
        RuntimeError, match=r"MultiLoRALinear\(.*lora_kernels\.route\(model, names\)"
    ):
        model(example("a"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "z"],), "no adapter is called 'z'; the model has 'a', 'b', 'c', 'd'"),
        (("a",), "names must be a list"),
        (([],), "names must be a list of at least one"),
        ((["a"], [1, 2]), "lengths must be 1 integers"),
        ((["a"], [-1]), "lengths must be 1 integers"),
        ((["a"], None, {"z": 1}), "no adapter is called 'z'"),
        ((["a"], None, {"a": 0.5}), r"seeds\['a'\] must be an integer"),
        ((["a"], None, 3), "seeds must map"),
    ],
)
def test_bad_routes_raise_and_leave_no_route(arguments, message):
    model = model_with_adapters()
    names, lengths, seeds = (*arguments, None, None)[:3]
    with pytest.raises(ValueError, match=message), lora.route(model, names, lengths, seeds=seeds):
        pass
    with pytest.raises(RuntimeError, match="route"):
        model(example("a"))


def test_an_input_that_does_not_fit_the_route_is_named():
    model = model_with_adapters()
    with (
        lora.route(model, ["a", "b"]),
        pytest.raises(ValueError, match=r"MultiLoRALinear\(.*the 2 samples.*got \[3, 16, 24\]"),
    ):
        model(example("abc"))
    too_few = pytest.raises(ValueError, match=r"sum to, 11, got \[2, 16, 24\]")
    with lora.route(model, ["a", "b"], lengths=[5, 6]), too_few:
        model(example("ab"))
    with pytest.raises(ValueError, match="has no named adapters"), lora.route(Net(), ["a"]):
        pass


def test_adapter_parameters_are_those_of_one_adapter():
    model = model_with_adapters()
    found = lora.adapter_parameters(model, "c")
    names = {name for name, p in model.named_parameters() if any(p is q for q in found)}
    assert names == {
        f"blocks.{i}.{module}.lora_{kind}_c"
        for i in range(2) for module in ("query", "up") for kind in "AB"
    }  # fmt: skip
    with pytest.raises(ValueError, match="no adapter is called 'z'"):
        lora.adapter_parameters(model, "z")
