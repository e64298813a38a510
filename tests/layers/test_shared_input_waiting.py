"""Outputs of joined layers that wait to be fetched: whose they are, and how long they live."""

import contextlib
import copy
import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lora_kernels as lora
from lora_kernels.layers import shared_input
from lora_kernels.testing.tolerance import assert_close
from tests.layers.attention import (
    ALONE,
    NAMES,
    SHARED,
    calls_of,
    make,
    traces_joined_layers,
)


@pytest.fixture
def joined(seed, device):
    model, x = make(device, merge_weights=False)
    lora.share_inputs(model)
    return model, x


@pytest.fixture
def outputs(monkeypatch):
    """Weak references to all that joined layers compute, in the order of the layers."""
    seen, compute = [], shared_input.lora_shared_linear

    def recorded(*args, **kwargs):
        ys = compute(*args, **kwargs)
        seen.extend(map(weakref.ref, ys))
        return ys

    monkeypatch.setattr(shared_input, "lora_shared_linear", recorded)
    return seen


@pytest.fixture
def without_gc():
    """What is freed here is freed by its last reference."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def unjoined(model):
    model = copy.deepcopy(model)
    for name in NAMES:
        getattr(model, name)._shared_input = None
    return model


def assert_as_unjoined(actual, run, model, *inputs):
    """actual is what run gives with an unjoined model: a tensor, or a tuple of tensors."""
    plain = unjoined(model)
    baseline, exact = run(plain, *inputs), run(plain.double(), *(x.double() for x in inputs))
    if isinstance(actual, torch.Tensor):
        actual, baseline, exact = (actual,), (baseline,), (exact,)
    for result, reference, other in zip(actual, exact, baseline, strict=True):
        assert_close(result, reference, other, "as if unjoined")


def call(model, x):
    return model(x)


def still_joined(model):
    return len(model.q_proj.computed_together) == 3


def alive(references):
    return [reference() is not None for reference in references]


# ---- threads ----


def test_thread_between_the_calls_of_another_takes_and_changes_nothing(joined):
    model, x = joined
    other, theirs = torch.randn_like(x), []

    def interrupted(x):
        q = model.q_proj(x)
        thread = threading.Thread(target=lambda: theirs.append(model(other)))
        thread.start()
        thread.join()
        return model.o_proj(torch.cat([q, model.k_proj(x), model.v_proj(x)], -1))

    assert_as_unjoined(interrupted(x), call, model, x)
    assert_as_unjoined(theirs[0], call, model, other)
    assert calls_of(interrupted, x) == [SHARED, ALONE]
    assert still_joined(model)


@pytest.mark.parametrize("same", [False, True], ids=["own x", "one x"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_four_threads_over_one_model(same, grad, joined, device):
    model, x = joined
    inputs = [x if same else torch.randn_like(x) for _ in range(4)]

    def solve(model, x):
        with torch.set_grad_enabled(grad):
            leaf = x.detach().requires_grad_(grad) if grad else x
            y = model(leaf)
        return (y, *torch.autograd.grad(y.square().sum(), leaf)) if grad else (y,)

    barrier, interval = threading.Barrier(4), sys.getswitchinterval()

    def serve(index):
        barrier.wait()
        return [solve(model, inputs[index]) for _ in range(40)]

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(serve, range(4)))
    finally:
        sys.setswitchinterval(interval)
    for x, answers in zip(inputs, results, strict=True):
        for answer in answers:
            assert_as_unjoined(answer, solve, model, x)
    assert still_joined(model)


def test_thread_that_ends_leaves_nothing(joined, outputs, without_gc):
    model, x = joined

    def leave():
        with torch.no_grad():
            model.q_proj(x)

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    assert alive(outputs) == [False] * 3


# ---- how long outputs live ----


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("way", ["no_grad", "frozen", "forward", "backward"])
def test_nothing_is_kept_behind_the_last_fetch(way, training, joined, outputs, without_gc):
    model, x = joined
    model.train(training).requires_grad_(way != "frozen")
    x = x.clone()
    with torch.no_grad() if way == "no_grad" else contextlib.nullcontext():
        y = model(x)
    if way == "backward":
        y.sum().backward()
    freed = weakref.ref(x)
    del x, y
    assert freed() is None
    assert alive(outputs) == [False] * 3
    assert model.q_proj._shared_input._waiting is None


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("way", ["no_grad", "frozen", "forward", "backward"])
def test_output_that_nobody_fetches_dies_with_x(way, training, joined, outputs, without_gc):
    model, x = joined
    model.train(training).requires_grad_(way != "frozen")
    x = x.clone()
    with torch.no_grad() if way == "no_grad" else contextlib.nullcontext():
        y = model.q_proj(x).sum() + model.k_proj(x).sum()
    assert alive(outputs)[2]
    if way == "backward":
        y.backward()
    freed = weakref.ref(x)
    del x
    if way == "forward":
        del y  # its graph is what holds x
    assert freed() is None
    assert alive(outputs) == [False] * 3
    assert still_joined(model)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_output_that_nobody_fetches_dies_with_the_next_x(grad, joined, outputs, without_gc):
    model, x = joined
    with torch.set_grad_enabled(grad):
        kept = [x, model.q_proj(x), model.k_proj(x)]
        assert alive(outputs)[2]
        model.q_proj(x.clone())
    assert not alive(outputs)[2]
    assert len(kept) == 3
    assert still_joined(model)


@traces_joined_layers
def test_compiled_layer_that_is_not_called_leaves_nothing(joined, without_gc):
    model, x = joined

    @torch.compile(fullgraph=True, backend="aot_eager")
    def without_v(x):
        x = x.sin()
        return model.q_proj(x).sum() + model.k_proj(x).sum()

    for _ in range(3):
        y = without_v(x)
        waiting = model.q_proj._shared_input._traced
        assert waiting._outputs() is None
        y.backward()
        del y
        assert waiting._x() is None
    assert still_joined(model)


# ---- calls in the middle of others ----


def test_forward_that_fails_in_the_middle(joined):
    model, x = joined

    def fail(*_):
        raise RuntimeError("in the middle")

    handle = model.k_proj.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        model(x)
    handle.remove()
    assert_as_unjoined(model(x), call, model, x)
    assert calls_of(model, x.clone()) == [SHARED, ALONE]


def test_layer_whose_hook_calls_the_model_again(joined):
    model, x = joined
    other, inner = torch.randn_like(x), []

    def again(layer, args, output):
        if not inner:
            inner.append(None)
            inner[0] = model(other)

    handle = model.q_proj.register_forward_hook(again)
    y = model(x)
    handle.remove()
    assert_as_unjoined(y, call, model, x)
    assert_as_unjoined(inner[0], call, model, other)


def test_layer_called_twice_before_the_others(joined):
    model, x = joined

    def twice(model, x):
        leaf = x.clone().requires_grad_()
        first = model.q_proj(leaf)
        y = model(leaf).square().sum() + first.square().sum()
        return y, *torch.autograd.grad(y, [leaf, model.q_proj.lora_A, model.v_proj.lora_B])

    assert_as_unjoined(twice(model, x), twice, model, x)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_stay_joined_and_keep_nothing(
    use_reentrant, joined, outputs, without_gc
):
    model, x = joined
    leaf = x.clone().requires_grad_()
    for _ in range(2):
        y = checkpoint(model, leaf, use_reentrant=use_reentrant)
        assert calls_of(y.sum().backward)[:1] == [SHARED]
    freed = weakref.ref(leaf)
    del leaf, y
    assert freed() is None
    assert alive(outputs) == [False] * 12
    assert still_joined(model)


def test_first_output_changed_in_place(joined):
    model, x = joined

    def run(model, x):
        leaf = x.clone().requires_grad_()
        q = model.q_proj(leaf)
        q.mul_(2).relu_()
        y = q.sum() + model.k_proj(leaf).mul_(3).sum() + model.v_proj(leaf).sum()
        return y, *torch.autograd.grad(y, leaf)

    assert_as_unjoined(run(model, x), run, model, x)


# ---- replicas, transforms, other places ----


def test_replica_computes_alone_and_takes_nothing(joined):
    model, x = joined
    replica = model.k_proj._replicate_for_data_parallel()
    replica._parameters = dict(model.k_proj._parameters)

    def interrupted(x):
        return model.q_proj(x), replica(x), model.k_proj(x)

    assert calls_of(interrupted, x) == [SHARED, ALONE]
    assert replica(x).equal(unjoined(model).k_proj(x))
    assert still_joined(model)


def test_functional_call_computes_with_the_weights_it_is_given(joined):
    model, x = joined
    other = {name: torch.randn_like(p) for name, p in model.named_parameters()}

    def run(model, x, weights):
        weights = {name: w.to(x.dtype) for name, w in weights.items()}
        return torch.func.functional_call(model, weights, (x,))

    for weights in (other, {}, other):
        actual = run(model, x, weights)
        assert_as_unjoined(actual, lambda model, x, w=weights: run(model, x, w), model, x)
    assert calls_of(model, x) == [SHARED, ALONE]


def test_functional_call_between_the_calls_of_layers(joined):
    model, x = joined
    q = model.q_proj(x)
    weights = {name: torch.randn_like(p) for name, p in model.k_proj.named_parameters()}
    changed = torch.func.functional_call(model.k_proj, weights, (x,))
    assert changed.equal(torch.func.functional_call(unjoined(model).k_proj, weights, (x,)))
    assert_as_unjoined(model.k_proj(x), lambda model, x: model.k_proj(x), model, x)
    assert_as_unjoined(q, lambda model, x: model.q_proj(x), model, x)


def test_output_whose_graph_was_freed_is_computed_anew(joined):
    model, x = joined
    model.q_proj(x)
    assert_as_unjoined(model.k_proj(x), lambda model, x: model.k_proj(x), model, x)
    assert still_joined(model)


def test_transform_of_torch_func_leaves_the_layers_as_they_are(joined, outputs):
    model, x = joined

    def gradients(model, x):
        def loss(weights):
            return torch.func.functional_call(model, weights, (x,)).square().sum()

        weights = {name: p.detach() for name, p in model.named_parameters()}
        return tuple(torch.func.grad(loss)(weights).values())

    assert_as_unjoined(gradients(model, x), gradients, model, x)
    assert outputs == []
    assert calls_of(model, x) == [SHARED, ALONE]


def test_layers_compute_alone_while_one_of_them_is_offloaded(joined):
    model, x = joined
    model.v_proj.to("meta")
    assert calls_of(model.q_proj, x) == [ALONE]
    assert model.q_proj(x).equal(unjoined(model).q_proj(x))
