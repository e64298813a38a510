"""A small model with several adapters, and jobs that train them."""

import torch
from torch import nn
from torch.nn import functional as F

import lora_kernels as lora

ADAPTERS = {
    "a": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
    "b": {"r": 8, "lora_alpha": 16},
    "c": {"r": 5, "lora_alpha": 5, "lora_dropout": 0.25, "target_modules": ["up", "query"]},
    "d": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1},
}
LENGTH = 16  # rows of a sample
RATES = {"a": 1e-2, "b": 3e-3, "c": 1e-3, "d": 1e-2}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query, self.up = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        x = x + torch.tanh(self.query(x))
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self, width=24, blocks=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def model_with_adapters(dtype=torch.float32, adapters=ADAPTERS):
    """The same values in every call."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    lora.apply_lora(model, adapters=adapters)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


def example(names, dtype=torch.float32):
    """An input with a sample for each name."""
    return torch.randn(len(names), LENGTH, 24, dtype=dtype)


def alone(model, name):
    """A copy of the model in which the layers have one adapter, or none for None."""
    torch.manual_seed(0)
    plain = Net().to(next(model.parameters()).dtype)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k})
    if name is not None:
        options = {"target_modules": "all-linear", **ADAPTERS[name], "lora_dropout": 0.0}
        lora.apply_lora(plain, **options)
        for path, layer in plain.named_modules():
            if isinstance(layer, lora.LoRALinear):
                a, b = model.get_submodule(path).factors(name)
                layer.lora_A, layer.lora_B = (nn.Parameter(f.detach().clone()) for f in (a, b))
    return plain


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Jobs:
    """Every adapter with an optimizer, a stream of seeds and data of its own."""

    def __init__(self, dtype):
        self.model, self.dtype = model_with_adapters(dtype), dtype
        self.optimizers, self.seeds = {}, {}
        for number, (name, rate) in enumerate(RATES.items()):
            parameters = lora.adapter_parameters(self.model, name)
            self.optimizers[name] = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.1)
            self.seeds[name] = torch.Generator().manual_seed(number)
        self.data = torch.Generator().manual_seed(9)

    def batch(self, name, samples):
        shape = (samples, LENGTH, 24)
        x, y = (torch.randn(shape, generator=self.data, dtype=self.dtype) for _ in range(2))
        return name, x, y

    def step(self, batches, call=lambda model, x: model(x)):
        """One step of the jobs in the batch, each with its own mean of the loss."""
        names = [name for name, x, _ in batches for _ in x]
        with lora.route(self.model, names, seeds=self.seeds):
            out = call(self.model, torch.cat([x for _, x, _ in batches]))
            parts = out.split([len(x) for _, x, _ in batches])
            losses = [F.mse_loss(part, y) for part, (_, _, y) in zip(parts, batches, strict=True)]
            sum(losses).backward()
        for name in self.optimizers:
            present = name in names
            for parameter in lora.adapter_parameters(self.model, name):
                assert (parameter.grad is not None) == present
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()

    def train(self, mixed, call=lambda model, x: model(x)):
        """Four steps; two of the jobs are absent in every other one."""
        for t in range(4):
            sizes = {"a": 2, "b": 1, "c": 3, "d": 1} if t % 2 == 0 else {"c": 1, "a": 2}
            batches = [self.batch(name, samples) for name, samples in sizes.items()]
            for some in [batches] if mixed else [[one] for one in batches]:
                self.step(some, call)
        return dict(self.model.named_parameters())
