"""Random sequences of what programs do to a model: a model that merges gives what one that never
merges gives, and no tensor that existed before changes by a byte.

A failing run prints its steps. LORA_KERNELS_TEST_SEED repeats it.
"""

import copy
import pickle
import random

import pytest
import torch
from torch import nn

from lora_kernels import (
    LoRAConv1d,
    LoRAEmbedding,
    LoRALayer,
    LoRALinear,
    LoRAMergedLinear,
    merge_lora,
    unmerge_lora,
)

RUNS, STEPS = 24, 50
IDS, WIDTH = 11, 8


class Net(nn.Module):
    """Every kind of layer, and a plain head that may be tied to the embedding."""

    def __init__(self, merge_weights):
        super().__init__()
        options = {"merge_weights": merge_weights, "dtype": torch.float64}
        self.embed = LoRAEmbedding(IDS, WIDTH, r=2, max_norm=2.0, **options)
        self.lin = LoRALinear(WIDTH, WIDTH, r=3, lora_alpha=2, **options)
        self.turned = LoRALinear(WIDTH, WIDTH, r=2, fan_in_fan_out=True, **options)
        self.qkv = LoRAMergedLinear(WIDTH, WIDTH, r=2, enable_lora=[True, False], **options)
        self.conv = LoRAConv1d(WIDTH, WIDTH, 3, r=2, padding=1, **options)
        self.plain = LoRALinear(WIDTH, WIDTH, r=0, **options)
        self.head = nn.Linear(WIDTH, IDS, bias=False, dtype=torch.float64)

    def forward(self, ids):
        h = self.turned(self.lin(self.embed(ids))).tanh()
        h = self.conv(h.mT).mT + self.plain(self.qkv(h))
        return self.head(h)

    def lora_layers(self):
        return [m for m in self.modules() if isinstance(m, LoRALayer) and m.has_lora]


class Run:
    """A model that merges in eval mode, its twin that never does, and the tensors seen so far."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.model, self.twin = Net(True), Net(False)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.4)
        self.twin.load_state_dict(copy.deepcopy(self.model.state_dict()))
        self.kept = []  # state dicts of the model, and what they held when they were taken
        self.snapshot()

    @property
    def both(self):
        return self.model, self.twin

    @property
    def dtype(self):
        return self.model.head.weight.dtype

    # ---- what is checked after every step ----

    def snapshot(self):
        """From now on these tensors are to keep their bytes."""
        seen = [p.detach() for p in self.model.parameters()]
        seen += [tensor for state in self.kept for tensor in state.values()]
        self.held = [(tensor, tensor.clone()) for tensor in seen]

    def check(self):
        for tensor, values in self.held:
            assert tensor.dtype == values.dtype
            assert torch.equal(tensor.view(torch.uint8), values.view(torch.uint8))
        ours, theirs = (model.state_dict() for model in self.both)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), key
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            assert parameter.data_ptr() == ours[name].data_ptr(), name
        ids = torch.randint(0, IDS, (2, 5))
        self.compare(self.model(ids), self.twin(ids))

    def compare(self, ours, theirs):
        scale = theirs.detach().abs().max().item()
        limit = 200 * torch.finfo(theirs.dtype).eps * max(scale, 1.0)
        assert (ours - theirs).abs().max().item() <= limit

    # ---- steps that write to no tensor ----

    def train(self):
        for model in self.both:
            model.train()

    def eval(self):
        for model in self.both:
            model.eval()
        assert all(layer.merged for layer in self.model.lora_layers())

    def eval_of_one_layer(self):
        name = self.random.choice(["embed", "lin", "turned", "qkv", "conv", "plain"])
        for model in self.both:
            getattr(model, name).eval()

    def eval_in_inference_mode(self):
        with torch.inference_mode():
            self.eval()
            self.check()

    def eval_under_autocast(self):
        with torch.autocast("cpu", torch.bfloat16):
            self.eval()

    def merge_lora(self):
        merge_lora(self.model)
        self.twin.eval()

    def unmerge_lora(self):
        unmerge_lora(self.model)
        for layer in self.model.modules():
            if isinstance(layer, LoRALayer):
                layer.merge_weights = True

    def keep_state_dict(self):
        self.kept = [*self.kept[-3:], self.model.state_dict()]
        self.snapshot()

    def load_by_assign(self):
        states = [s for s in self.kept if s["head.weight"].dtype == self.dtype]
        if states:
            state = self.random.choice(states)
            self.twin.load_state_dict(copy.deepcopy(state), assign=True)  # ties included
            self.model.load_state_dict(state, assign=True)

    def cast(self):
        dtype = self.random.choice([torch.float64, torch.float32])
        for model in self.both:
            model.to(dtype)

    def half_and_back(self):
        dtype = self.dtype
        for model in self.both:
            model.half()
        self.check()
        for model in self.both:
            model.to(dtype)

    def tie(self):
        for model in self.both:
            model.head.weight = model.embed.weight

    def untie(self):
        for model in self.both:
            model.head.weight = nn.Parameter(model.head.weight.detach().clone())

    def tie_layers(self):
        for model in self.both:
            model.turned.weight = model.lin.weight

    def freeze(self):
        for model in self.both:
            model.requires_grad_(False)

    def unfreeze(self):
        for model in self.both:
            model.requires_grad_(True)
        ids = torch.randint(0, IDS, (2, 5))
        ours, theirs = (
            torch.autograd.grad(m(ids).sum(), [m.lin.weight, m.conv.weight, m.head.weight])
            for m in self.both
        )
        for left, right in zip(ours, theirs, strict=True):
            self.compare(left, right)

    def functional_call(self):
        state = {k: v * 1.1 for k, v in self.model.state_dict().items()}
        if self.random.random() < 0.5:
            state = dict(self.model.state_dict())
        elif self.random.random() < 0.5:
            state = {k: v for k, v in state.items() if "lora_" in k}
        ids = torch.randint(0, IDS, (2, 5))
        call = torch.func.functional_call
        self.compare(*(call(m, state, (ids,), tie_weights=False) for m in self.both))

    def go_on_with_a_copy(self):
        self.model, self.twin = (copy.deepcopy(model) for model in self.both)

    def go_on_with_a_pickle(self):
        self.model, self.twin = (pickle.loads(pickle.dumps(model)) for model in self.both)

    def go_on_with_a_shallow_copy(self):
        for model in self.both:
            model.lin = copy.copy(model.lin)

    def copy_to_meta(self):
        far = copy.deepcopy(self.model).to("meta").eval()
        assert not any(layer.merged for layer in far.lora_layers())
        assert far(torch.zeros(2, 5, dtype=torch.int64, device="meta")).shape == (2, 5, IDS)

    def replace_factors(self):
        values = torch.randn(3, WIDTH, dtype=self.dtype)
        for model in self.both:
            model.lin.lora_A = nn.Parameter(values.clone())

    def change_scaling(self):
        scaling = self.random.choice([0.5, 1.0, 2.0])
        for model in self.both:
            model.qkv.scaling = scaling

    # ---- steps that write to the model's own tensors, as the program asks ----

    def load(self):
        if self.kept:
            state = copy.deepcopy(self.random.choice(self.kept))
            for model in self.both:
                model.load_state_dict(state)
            self.snapshot()

    def load_factors(self):
        if self.kept:
            state = copy.deepcopy(self.random.choice(self.kept))
            factors = {k: v for k, v in state.items() if "lora_" in k}
            for model in self.both:
                model.load_state_dict(factors, strict=False)
            self.snapshot()

    def edit(self):
        name = self.random.choice([n for n, _ in self.twin.named_parameters()])
        with torch.no_grad():
            for model in self.both:
                model.get_parameter(name).mul_(-0.9)
        self.snapshot()

    def step_of_an_optimizer(self):
        ids = torch.randint(0, IDS, (2, 5))
        self.train()
        self.twin.requires_grad_(True)
        self.twin(ids).square().mean().backward()
        for model in self.both:
            for ours, theirs in zip(model.parameters(), self.twin.parameters(), strict=True):
                ours.grad = theirs.grad.clone()
                ours.requires_grad_(True)
        for model in self.both:
            torch.optim.AdamW(model.parameters(), lr=1e-2).step()
            model.zero_grad()
        self.snapshot()


WRITING = (Run.load, Run.load_factors, Run.edit, Run.step_of_an_optimizer)
OTHERS = (
    Run.train, Run.eval, Run.eval, Run.eval_of_one_layer, Run.eval_in_inference_mode,
    Run.eval_under_autocast, Run.merge_lora, Run.unmerge_lora, Run.keep_state_dict,
    Run.load_by_assign, Run.cast, Run.half_and_back, Run.tie, Run.untie, Run.tie_layers,
    Run.freeze, Run.unfreeze, Run.functional_call, Run.go_on_with_a_copy, Run.go_on_with_a_pickle,
    Run.go_on_with_a_shallow_copy, Run.copy_to_meta, Run.replace_factors, Run.change_scaling,
)  # fmt: skip


@pytest.mark.parametrize("number", range(RUNS))
def test_merging_changes_no_tensor_and_no_output(number, seed):
    run = Run(seed + number)
    for _ in range(STEPS):
        step = run.random.choice(WRITING + OTHERS)
        print(step.__name__)
        step(run)
        run.check()
