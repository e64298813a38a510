"""eval() merges, train() takes it back, and the base stays what it is. One test, every layer."""

import copy
import io
import pickle
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import loralib
import pytest
import torch
from torch import nn

from lora_kernels import LoRALayer, LoRALinear
from tests.layers.cases import build, every_layer, example, filled, unmerged_output


@every_layer
def test_merged_and_unmerged_outputs_agree(make, seed, device):
    layer = build(make, device, dtype=torch.float64).eval()
    assert layer.merged
    x = example(layer, device)
    torch.testing.assert_close(layer(x), unmerged_output(layer, x), rtol=1e-12, atol=1e-12)


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_base_is_the_same_bit_for_bit_after_a_thousand_cycles(make, dtype, seed, device):
    layer = build(make, device, dtype=dtype)
    base, merged = layer.weight.detach().clone(), layer.merged_weight()
    for _ in range(1000):
        layer.eval()
        layer.train()
    assert torch.equal(layer.weight, base)
    assert torch.equal(layer.eval().complete_weight(), merged)


def test_train_of_loralib_lets_the_base_drift(seed):
    layer = filled(loralib.Linear(12, 20, r=3, dtype=torch.bfloat16), "cpu")
    base = layer.weight.detach().clone()
    for _ in range(1000):
        layer.eval()
        layer.train()
    assert not torch.equal(layer.weight, base)


@every_layer
def test_eval_rounds_the_delta_once_and_leaves_the_base_where_it_is(make, seed, device):
    layer = build(make, device, dtype=torch.bfloat16)
    exact = layer.base_weight().float() + layer.delta_weight()
    assert layer.delta_weight().dtype == torch.float32
    layer.eval()
    assert torch.equal(layer.complete_weight(), exact.to(torch.bfloat16))
    assert layer.base_weight() is layer.weight


@every_layer
@pytest.mark.parametrize("name", ["lora_A", "lora_B", "scaling"])
def test_edits_while_merged_take_effect_at_the_next_forward(make, name, seed, device):
    layer = build(make, device).eval()
    base = layer.base_weight().clone()
    x = example(layer, device)
    before = layer(x)
    if name == "scaling":
        layer.scaling *= 3
    else:
        with torch.no_grad():
            getattr(layer, name).mul_(3)
    after = layer(x)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, unmerged_output(layer, x), rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.train().weight, base)


@every_layer
def test_merged_eval_gives_the_adapter_no_gradient_and_merge_weights_false_does(make, seed, device):
    layer = build(make, device).eval()
    x = example(layer, device).requires_grad_()
    layer(x).sum().backward()
    assert layer.lora_A.grad is None
    assert layer.lora_B.grad is None
    assert x.grad is not None
    layer = build(make, device, merge_weights=False).eval()
    layer(x).sum().backward()
    assert not layer.merged
    assert layer.lora_A.grad is not None
    assert layer.lora_B.grad is not None


@every_layer
def test_cast_while_merged_casts_the_base_and_merges_again(make, seed, device):
    layer = build(make, device).eval()
    base = layer.base_weight().clone()
    layer.to(torch.bfloat16)
    assert layer.merged
    cast = copy.deepcopy(layer).train()
    assert torch.equal(cast.weight, base.to(torch.bfloat16))
    assert torch.equal(layer.complete_weight(), cast.merged_weight())


@every_layer
def test_eval_twice_train_twice(make, seed, device):
    layer = build(make, device)
    base = layer.weight.detach().clone()
    merged = layer.merged_weight()
    for _ in range(2):
        assert torch.equal(layer.eval().complete_weight(), merged)
    for _ in range(2):
        assert layer.train().complete_weight() is None
        assert torch.equal(layer.weight, base)


@every_layer
def test_eval_merges_inside_inference_mode(make, seed, device):
    layer = build(make, device)
    base = layer.weight.detach().clone()
    with torch.inference_mode():
        layer.eval()
        layer(example(layer, device))
    assert torch.equal(layer.train().weight, base)
    assert layer.weight.requires_grad is False


@every_layer
@pytest.mark.parametrize("mode", [True, False])
def test_merge_weights_turned_off_while_merged_restores_at_the_next_switch(
    make, mode, seed, device
):
    layer = build(make, device)
    base = layer.weight.detach().clone()
    layer.eval()
    layer.merge_weights = False
    layer.train(mode)
    assert not layer.merged
    assert torch.equal(layer.weight, base)


@every_layer
def test_weight_stays_the_same_object_through_merging(make, seed, device):
    layer = build(make, device)
    weight, address = layer.weight, layer.weight.data_ptr()
    layer.eval()
    assert layer.weight is weight
    layer.train()
    assert layer.weight is weight
    assert weight.data_ptr() == address


# ---- weights that somebody else holds, too ----


@every_layer
def test_tied_weight_keeps_its_values_and_both_layers_are_right(make, seed, device):
    layer = build(make, device)
    other = nn.Linear(1, 1)
    other.weight = layer.weight
    base = layer.weight.detach().clone()
    x = example(layer, device)
    expected = unmerged_output(layer, x)
    layer.eval()
    assert layer.merged
    assert torch.equal(other.weight, base)
    torch.testing.assert_close(layer(x), expected)
    del other
    layer.eval()
    assert layer.merged
    torch.testing.assert_close(layer(x), expected)


@every_layer
@pytest.mark.parametrize("view", ["part", "reshaped", "data"])
def test_tensor_that_shares_memory_with_a_merged_weight_keeps_its_values(make, view, seed, device):
    layer = build(make, device)
    weight = layer.weight.detach()
    shared = {
        "part": lambda: weight[:1],
        "reshaped": lambda: weight.view(-1),
        "data": lambda: weight,
    }
    holder = nn.ParameterList([nn.Parameter(shared[view]())])
    before = holder[0].detach().clone()
    layer.eval()
    assert layer.merged
    assert holder[0].data_ptr() == layer.weight.data_ptr()
    assert torch.equal(holder[0], before)
    layer.train()
    assert torch.equal(holder[0], before)


@every_layer
def test_ties_may_come_and_go(make, seed, device):
    layer = build(make, device)
    optimizer = torch.optim.SGD(list(layer.parameters()), lr=0.1)
    layer.eval()
    layer.train()
    del optimizer
    base, merged = layer.weight.detach().clone(), layer.merged_weight()
    other = nn.Linear(1, 1)
    other.weight = layer.weight
    assert torch.equal(layer.eval().complete_weight(), merged)
    del other
    assert torch.equal(layer.eval().complete_weight(), merged)
    other = nn.Linear(1, 1)
    other.weight = layer.weight  # tied while merged
    assert torch.equal(layer.eval().complete_weight(), merged)
    assert torch.equal(other.weight, base)


@every_layer
def test_buffer_that_shares_memory_with_a_merged_weight_keeps_its_values(make, seed, device):
    layer = build(make, device)
    holder = nn.Module()
    holder.register_buffer("table", layer.weight.detach())
    before = holder.table.clone()
    assert layer.eval().merged
    assert holder.table.data_ptr() == layer.weight.data_ptr()
    assert torch.equal(holder.table, before)


@every_layer
def test_references_of_others_than_modules_do_not_stop_merging(make, seed, device):
    layer = build(make, device)
    optimizer = torch.optim.SGD(list(layer.parameters()), lr=0.1)
    assert layer.eval().merged
    assert optimizer.param_groups[0]["params"]


# ---- what eval() may meet ----


def pair(make, device, **options):
    """A layer that merges and one of the same values that never does."""
    layer = build(make, device, **options)
    twin = copy.deepcopy(layer)
    twin.merge_weights = False
    return layer, twin


@every_layer
@pytest.mark.parametrize("moved", ["before", "after"])
def test_weight_that_a_hook_moves_is_not_merged(make, moved, seed, device):
    layer, twin = pair(make, device)
    stored = layer.weight.detach().clone()

    def bring(module, args):
        module.weight.data = stored.clone()

    def take(module, args, y):
        module.weight.data = torch.empty(0, device=device)

    if moved == "after":
        layer.eval()
    layer.register_forward_pre_hook(bring)
    layer.register_forward_hook(take)
    if moved == "before":
        layer.weight.data = torch.empty(0, device=device)
        layer.eval()
    x = torch.randn(5, 12, device=device)
    for _ in range(2):
        assert torch.equal(layer(x), twin.eval()(x))
        assert not layer.merged
    layer.train()
    assert torch.equal(layer(x), twin.train()(x))


@every_layer
@pytest.mark.parametrize("moved", ["before", "after"])
def test_offloaded_layer_is_not_merged(make, moved, seed, device):
    accelerate = pytest.importorskip("accelerate")
    layer, twin = pair(make, device)
    model = nn.Sequential(layer)
    if moved == "after":
        model.eval()
    accelerate.cpu_offload(model, device)
    model.eval()
    x = torch.randn(5, 12, device=device)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model(x), twin.eval()(x))
        assert not layer.merged


@every_layer
def test_weight_on_meta_is_not_merged(make, seed, device):
    layer = build(make, device).eval().to("meta")
    assert not layer.merged
    assert not layer.eval().merged
    assert layer(torch.empty(5, 12, device="meta")).is_meta


@every_layer
def test_layer_in_shared_memory_sees_what_another_process_trains(make, seed):
    layer = build(make, "cpu").eval()
    layer.share_memory()
    assert not layer.merged
    assert not layer.eval().merged
    x = torch.randn(5, 12)
    other = copy.copy(layer.lora_B.detach().numpy())  # what does not count its edits
    with torch.no_grad():
        layer.lora_B.detach().numpy()[:] = other * 2
    assert torch.equal(layer(x), unmerged_output(layer, x))


@every_layer
def test_functional_call_on_a_merged_layer_takes_what_it_is_given(make, seed, device):
    layer, twin = pair(make, device)
    layer.eval()
    x = example(layer, device)
    for change in (1.0, 1.5):
        state = {name: value * change for name, value in layer.state_dict().items()}
        ours, theirs = (torch.func.functional_call(m, state, (x,)) for m in (layer, twin))
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(layer(x), twin(x))


@every_layer
def test_gradients_of_func_come_through_a_merged_layer(make, seed, device):
    layer, twin = pair(make, device)
    x = example(layer, device)

    def loss(factors, module):
        return torch.func.functional_call(module, factors, (x,)).square().sum()

    layer.eval()
    factors = {name: p.detach() for name, p in layer.named_parameters() if "lora_" in name}
    ours, theirs = (torch.func.grad(loss)(factors, module) for module in (layer, twin))
    for name in factors:
        torch.testing.assert_close(ours[name], theirs[name])
    with torch.no_grad():
        layer.lora_A.mul_(2)
    torch.func.grad(lambda v: layer(v).sum())(x)  # merges anew, but not inside
    torch.testing.assert_close(layer(x), unmerged_output(layer, x))


@every_layer
def test_replicas_of_a_merged_layer_use_their_own_tensors(make, seed, device):
    layer, twin = pair(make, device)
    layer.eval()
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter.detach().clone())
    x = example(layer, device)
    assert torch.equal(replica(x), twin(x))
    assert layer.merged
    assert layer.complete_weight() is not None


@every_layer
def test_base_weight_that_trains_gets_its_gradient_in_eval(make, seed, device):
    layer, twin = pair(make, device)
    x = example(layer, device)
    for module in (layer.eval(), twin.eval()):
        module.weight.requires_grad_(True)
        module(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.grad, twin.get_parameter(name).grad), name
    with torch.no_grad():
        assert layer.complete_weight() is not None


@every_layer
def test_eval_makes_one_merged_copy_and_train_frees_it(make, seed, device):
    layer = build(make, device).eval()
    merged = layer.complete_weight()
    assert merged.untyped_storage().nbytes() == layer.weight.untyped_storage().nbytes()
    assert merged.data_ptr() != layer.weight.data_ptr()
    assert not merged.requires_grad
    assert layer.eval().complete_weight() is merged
    gone = weakref.ref(merged)
    del merged
    layer.train()
    assert gone() is None


@every_layer
def test_copies_and_pickles_hold_no_merged_weight(make, seed, device):
    layer = build(make, device)
    length = len(pickle.dumps(layer))
    layer.eval()
    assert len(pickle.dumps(layer)) < length + 200
    twin = copy.deepcopy(layer)
    assert twin._merged_weight.weight is None
    file = io.BytesIO()
    torch.save(layer, file, _use_new_zipfile_serialization=False)  # fills tensors at the very end
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = example(layer, device)
    for other in (twin, loaded):
        assert other.merged
        assert torch.equal(other(x), layer(x))


@every_layer
def test_conversion_by_swapping_tensors_merges_again(make, seed, device):
    layer, twin = pair(make, device)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.eval().to(torch.bfloat16)
        twin.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert layer.merged
    assert torch.equal(layer.complete_weight(), twin.merged_weight())


@every_layer
def test_load_by_assign_while_merged_takes_effect_and_leaves_the_tensors_alone(make, seed, device):
    layer, other = build(make, device).eval(), build(make, device)
    state = other.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    layer.load_state_dict(state, assign=True)
    assert layer.merged
    x = example(layer, device)
    assert torch.equal(layer(x), other.eval()(x))
    layer.train().eval()
    for name, value in before.items():
        assert torch.equal(state[name], value)


@every_layer
def test_edits_of_the_base_weight_while_merged_take_effect_at_the_next_forward(make, seed, device):
    layer, twin = pair(make, device)
    layer.eval()
    x = example(layer, device)
    with torch.no_grad():
        for module in (layer, twin):
            module.weight.mul_(2)
    assert torch.equal(layer(x), copy.deepcopy(layer).eval()(x))
    torch.testing.assert_close(layer(x), twin(x))
    for module in (layer, twin):
        module.weight = nn.Parameter(module.weight.detach() * 2, requires_grad=False)
    assert torch.equal(layer(x), twin(x))
    assert not layer.merged
    assert layer.eval().merged
    torch.testing.assert_close(layer(x), twin(x))


@every_layer
def test_threads_that_share_a_merged_layer_see_every_edit(make, seed, device):
    layer, twin = pair(make, device)
    layer.eval()
    x = example(layer, device)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            with torch.no_grad():
                for module in (layer, twin):
                    module.lora_B.mul_(-1.01)
            for y in pool.map(layer, [x] * 8):
                torch.testing.assert_close(y, twin(x))


@every_layer
def test_forwards_beside_a_thread_that_changes_the_mode_have_the_update(make, seed, device):
    layer, twin = pair(make, device)
    layer.eval()
    x, interval = example(layer, device), sys.getswitchinterval()
    expected, ended = twin(x).detach(), threading.Event()

    def change_modes():
        while not ended.is_set():
            layer.train()
            layer.eval()

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            changing = pool.submit(change_modes)
            outputs = list(pool.map(layer, [x] * 600))
            ended.set()
            changing.result()
    finally:
        ended.set()
        sys.setswitchinterval(interval)
    for y in outputs:
        torch.testing.assert_close(y.detach(), expected)


@every_layer
def test_compiled_layer_follows_train_eval_and_loading(make, seed, device):
    torch._dynamo.reset()
    layer, twin = pair(make, device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = example(layer, device)
    for _ in range(2):
        compiled.eval()
        assert torch.equal(compiled(x), layer(x))
        torch.testing.assert_close(compiled(x), twin(x))
        other = {name: torch.randn_like(value) for name, value in layer.state_dict().items()}
        for module in (layer, twin):
            module.load_state_dict(other)
        torch.testing.assert_close(compiled(x), twin(x))
        compiled.train()
        with torch.no_grad():
            for module in (layer, twin):
                module.lora_B.mul_(2)
        torch.testing.assert_close(compiled(x), twin(x))
    layer.eval()
    for module in (layer, twin):
        module.lora_A = nn.Parameter(module.lora_A.detach() + 1)
    torch.testing.assert_close(compiled(x), twin(x))
    torch._dynamo.reset()


def test_subclass_that_merges_on_its_own_is_merged_once(seed, device):
    class Own(LoRALinear):
        def train(self, mode=True):
            nn.Linear.train(self, mode)
            if self.merged == mode:
                sign = -1 if mode else 1
                self.weight.data += sign * (self.lora_B @ self.lora_A) * self.scaling
                self.merged = not mode

    layer = build(lambda: Own(12, 20, r=3), device)
    x = example(layer, device)
    expected = layer(x)
    layer.eval()
    layer.to(torch.float32)
    torch.testing.assert_close(layer(x), expected)
    layer.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), expected)
    layer.train()
    torch.testing.assert_close(layer(x), expected)


def test_layer_that_the_program_has_merged_is_not_merged_again(seed, device):
    layer = build(lambda: LoRALinear(12, 20, r=3), device)
    x = example(layer, device)
    expected = layer(x)
    layer.weight.data += layer.delta_weight()
    layer.merged = True
    torch.testing.assert_close(layer.eval()(x), expected)


def test_edit_is_seen_inside_inference_mode_and_outlives_it(seed, device):
    layer, twin = pair(lambda: LoRALinear(12, 20, r=3), device)
    layer.eval()
    x = example(layer, device)
    with torch.inference_mode():
        for module in (layer, twin):
            module.lora_B.mul_(2)
        torch.testing.assert_close(layer(x), twin(x))
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    torch.testing.assert_close(torch.jit.trace(layer, x)(x), twin(x))


def test_subclass_with_a_forward_of_its_own_is_never_merged(seed, device):
    class Own(LoRALinear):
        def forward(self, x):
            y = nn.functional.linear(x, self.weight, self.bias)
            return y if self.merged else y + x @ self.lora_A.T @ self.lora_B.T * self.scaling

    layer = build(lambda: Own(12, 20, r=3), device)
    x = example(layer, device)
    expected = layer(x)
    assert torch.equal(layer.eval()(x), expected)
    assert not layer.merged


def test_mixin_layer_without_a_base_weight_goes_to_eval(seed):
    class Parallel(LoRALayer, nn.Module):
        def __init__(self):
            nn.Module.__init__(self)
            LoRALayer.__init__(self, 2, 1, 0.0, True)
            self.lora_A, self.lora_B = (nn.Parameter(torch.ones(s)) for s in ((2, 4), (4, 2)))

        def forward(self, x):
            return x @ self.lora_A.T @ self.lora_B.T

    layer = Parallel()
    assert layer.eval() is layer
    assert not layer.merged
    assert layer.double()(torch.ones(1, 4).double()).sum() == 32


def test_an_edit_through_data_takes_effect_after_train_and_eval(seed):
    layer = LoRALinear(4, 4, r=2)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 4)
    before = layer.eval()(x)
    layer.lora_B.data.zero_()
    assert torch.equal(layer.eval()(x), before)  # PyTorch does not count it
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer.train().eval()(x), plain)
