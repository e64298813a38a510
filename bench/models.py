"""Whole layers and models: one Llama-3-8B decoder layer, GPT-2 medium; random weights.

A cell's model takes hidden states [batch, tokens, width] and returns hidden states. Every provider
puts the same adapters into a copy of the same model.
"""

import copy
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bench import accuracy, peers
from bench.providers import FLOOR, OURS, Provider
from bench.shapes import BOTH, EAGER
from lora_kernels.testing.problem import Problem

__all__ = ["MODEL_PROVIDERS", "ModelCell", "model_cells"]

CHECKED_TOKENS = 64
SCALING = 2.0


@dataclass(frozen=True)
class ModelCell:
    """Forward + backward of one model on hidden states [batch, tokens, width]."""

    model: str
    config: tuple[tuple[str, int], ...]
    batch: int
    tokens: int
    r: int
    dropout_p: float
    checkpointing: bool
    dtype: torch.dtype
    device: str
    mode: str = BOTH
    execution: str = EAGER

    def __str__(self) -> str:
        checkpointing = " checkpointing" if self.checkpointing else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.model} {self.batch}x{self.tokens} r{self.r} p{self.dropout_p:g} "
            f"{dtype} {self.device}{checkpointing}"
        )

    def fields(self) -> dict:
        """What a result row says of this cell."""
        return {
            "kind": "model",
            "cell": str(self),
            "model": self.model,
            "config": dict(self.config),
            "m": self.batch * self.tokens,
            "r": self.r,
            "dropout_p": self.dropout_p,
            "checkpointing": self.checkpointing,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device,
            "mode": self.mode,
            "execution": self.execution,
        }

    def subject(self) -> "ModelSubject":
        return ModelSubject(self)


class ModelSubject:
    """The model of a cell, and adapters [(a, b), ...] for the linears that get one, by path."""

    copies = 1

    def __init__(self, cell: ModelCell):
        self.cell = cell
        torch.manual_seed(0)
        with torch.device(cell.device):
            self.model = _FAMILIES[cell.model.partition(" ")[0]](cell).to(cell.dtype)
            self.adapters = {
                path: _draw_adapter(cell.r, linear, groups)
                for path, (linear, groups) in _targets(self.model).items()
            }
            width = self.model.inner.config.hidden_size
            self.x, self.dy = (
                torch.randn(cell.batch, cell.tokens, width).to(cell.dtype) for _ in range(2)
            )
        self._solutions = None

    def build(self, provider: Provider) -> nn.Module:
        return self._built(self.model, provider, self.cell.dropout_p)

    def check(self, provider: Provider) -> None:
        """Without dropout and on few tokens: y, dx and the gradients of all factors."""
        labels, exact, baseline = self._expected()
        actual = self._solve(self.model, provider)
        if provider.name == FLOOR:
            return  # it is the model itself, which the others are checked against
        accuracy.compare(provider.name, labels, actual, exact, baseline)

    def _expected(self) -> tuple[list[str], tuple, tuple]:
        if self._solutions is None:
            formula = Provider("formula", put_formula)
            labels = ["y", "dx"]
            for path in self.adapters:
                labels += [f"da of {path}", f"db of {path}"]
            exact = self._solve(copy.deepcopy(self.model).double(), formula)
            self._solutions = labels, exact, self._solve(self.model, formula)
        return self._solutions

    def _solve(self, model: nn.Module, provider: Provider) -> tuple[Tensor, ...]:
        dtype = next(model.parameters()).dtype
        x, dy = (t[:1, :CHECKED_TOKENS].detach().to(dtype) for t in (self.x, self.dy))
        return accuracy.solve(self._built(model, provider, dropout_p=0.0), x, dy)

    def _built(self, model: nn.Module, provider: Provider, dropout_p: float) -> nn.Module:
        dtype = next(model.parameters()).dtype
        adapters = {
            path: (a.to(dtype), b.to(dtype)) for path, (a, b) in self.adapters.items()
        }  # fmt: skip
        built = copy.deepcopy(model).requires_grad_(False)
        provider.build(built, adapters, dropout_p)
        gc.collect()  # the layers that were replaced
        return built.train()


class Backbone(nn.Module):
    """A transformer from hidden states to hidden states."""

    def __init__(self, inner: nn.Module, checkpointing: bool):
        super().__init__()
        self.inner = inner
        if checkpointing:
            inner.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(inputs_embeds=x, use_cache=False).last_hidden_state


def _llama(cell: ModelCell) -> Backbone:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        **dict(cell.config), num_hidden_layers=1, vocab_size=8, pad_token_id=None,
        max_position_embeddings=cell.tokens, attn_implementation="sdpa",
    )  # fmt: skip
    return Backbone(LlamaModel(config), cell.checkpointing)


def _gpt2(cell: ModelCell) -> Backbone:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        **dict(cell.config), n_positions=cell.tokens, vocab_size=8, attn_implementation="sdpa",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return Backbone(GPT2Model(config), cell.checkpointing)


_FAMILIES = {"llama3-8b-layer": _llama, "gpt2-medium": _gpt2}
QUERY_AND_VALUE = [True, False, True]  # of c_attn, as the paper's GPT-2 experiments have it


def _targets(model: nn.Module) -> dict[str, tuple[nn.Module, list[bool]]]:
    """The linears that get an adapter and their groups: all of a Llama, c_attn of a GPT-2."""
    targets = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            targets[path] = (module, [True])
        elif path.endswith("c_attn"):
            targets[path] = (module, QUERY_AND_VALUE)
    return targets


def _shape(linear: nn.Module) -> tuple[int, int]:
    """[N, K] of an nn.Linear or of a Conv1D of transformers, which stores [K, N]."""
    shape = linear.weight.shape
    return tuple(shape if isinstance(linear, nn.Linear) else reversed(shape))


def _draw_adapter(r: int, linear: nn.Module, groups: list[bool]) -> tuple[Tensor, Tensor]:
    n, k = _shape(linear)
    rows = n // len(groups) * sum(groups)
    a = torch.randn(r * sum(groups), k) * k**-0.5
    # Small beside the weight, as a trained update is: deep stacks stay in range.
    return a, torch.randn(rows, r) * 0.01


# ---- the providers: each puts adapters into the model that it is given ----

Adapters = Mapping[str, tuple[Tensor, Tensor]]


def put_nothing(model: nn.Module, adapters: Adapters, dropout_p: float) -> None:
    """The floor: the frozen model."""


def put_formula(model: nn.Module, adapters: Adapters, dropout_p: float) -> None:
    """The formula in plain PyTorch."""

    def wrap(linear, groups, a, b):
        n, _ = _shape(linear)
        bias = linear.weight.new_zeros(n) if linear.bias is None else linear.bias
        weight = linear.weight if isinstance(linear, nn.Linear) else linear.weight.T
        sizes = [n // len(groups)] * len(groups)
        return peers.Formula(
            Problem(
                x=None, w=weight, a=a, b=b, bias=bias, dy=None, seed=None, scaling=SCALING,
                dropout_p=dropout_p, groups=list(zip(sizes, groups, strict=True)),
            )
        )  # fmt: skip

    _replace(model, adapters, wrap)


def put_lora_kernels(model: nn.Module, adapters: Adapters, dropout_p: float) -> None:
    import lora_kernels as lora

    def wrap(linear, groups, a, b):
        r, options = b.shape[1], {"lora_dropout": dropout_p}
        if len(groups) > 1:
            options["enable_lora"] = groups
        kind = lora.LoRAMergedLinear if len(groups) > 1 else lora.LoRALinear
        layer = kind.from_linear(linear, r, SCALING * r, **options)
        return _filled(layer, layer.lora_A, layer.lora_B, a, b)

    _replace(model, adapters, wrap)


def put_shared(model: nn.Module, adapters: Adapters, dropout_p: float) -> None:
    """q, k and v, and gate and up, in one call each."""
    import lora_kernels as lora

    put_lora_kernels(model, adapters, dropout_p)
    lora.share_inputs(model)


def put_loralib(model: nn.Module, adapters: Adapters, dropout_p: float) -> None:
    """loralib has no way to wrap a layer: one is made and its weight and bias replaced."""
    import loralib as lora

    def wrap(linear, groups, a, b):
        (n, k), r = _shape(linear), b.shape[1]
        options = {
            "r": r, "lora_alpha": SCALING * r, "lora_dropout": dropout_p,
            "fan_in_fan_out": not isinstance(linear, nn.Linear),
            "bias": linear.bias is not None,
        }  # fmt: skip
        if len(groups) > 1:
            layer = lora.MergedLinear(k, n, enable_lora=groups, **options)
        else:
            layer = lora.Linear(k, n, **options)
        layer.to(linear.weight.device, linear.weight.dtype)
        layer.weight, layer.bias = linear.weight, linear.bias
        return _filled(layer, layer.lora_A, layer.lora_B, a, b)

    _replace(model, adapters, wrap)


def put_peft(model: nn.Module, adapters: Adapters, dropout_p: float) -> None:
    """PEFT's layers; over the groups of c_attn it has one adapter, so it takes no part there."""
    from peft import LoraConfig, inject_adapter_in_model

    (_, b), *_ = adapters.values()
    config = LoraConfig(
        r=b.shape[1], lora_alpha=SCALING * b.shape[1], lora_dropout=dropout_p,
        target_modules=list(adapters),
    )  # fmt: skip
    inject_adapter_in_model(config, model)
    model.to(b.dtype)
    for path, (a, b) in adapters.items():
        layer = model.get_submodule(path)
        _filled(layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight, a, b)


def _replace(model: nn.Module, adapters: Adapters, wrap: Callable) -> None:
    for path, (linear, groups) in _targets(model).items():
        model.set_submodule(path, wrap(linear, groups, *adapters[path]))


def _filled(layer: nn.Module, lora_a: Tensor, lora_b: Tensor, a: Tensor, b: Tensor) -> nn.Module:
    with torch.no_grad():
        lora_a.copy_(a)
        lora_b.copy_(b)
    return layer


MODEL_PROVIDERS = (
    Provider(FLOOR, put_nothing),
    Provider("loralib", put_loralib, needs="loralib"),
    Provider("peft", put_peft, lambda cell: cell.model.startswith("llama"), needs="peft"),
    Provider(f"{OURS}[shared inputs]", put_shared, lambda cell: cell.model.startswith("llama")),
    Provider(OURS, put_lora_kernels),
)

# ---- the cells ----

LLAMA_3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8,
}  # fmt: skip
GPT2_MEDIUM = {"n_embd": 1024, "n_layer": 24, "n_head": 16}
SMALL_LLAMA = {
    "hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 4,
    "num_key_value_heads": 1,
}  # fmt: skip
SMALL_GPT2 = {"n_embd": 128, "n_layer": 2, "n_head": 4}


def model_cells(device: str) -> list[ModelCell]:
    """The real sizes on a GPU; on a CPU small ones, which prove that it runs."""
    if device == "cuda":
        sizes, common = (LLAMA_3_8B, GPT2_MEDIUM), {"dtype": torch.bfloat16, "r": 16}
        names, llama, gpt2 = ("llama3-8b-layer", "gpt2-medium"), (4, 2048), (8, 1024)
    else:
        sizes, common = (SMALL_LLAMA, SMALL_GPT2), {"dtype": torch.float32, "r": 8}
        names, llama, gpt2 = ("llama3-8b-layer (small)", "gpt2-medium (small)"), (2, 128), (2, 128)
    layer, model = (
        ModelCell(
            name, tuple(size.items()), *shape, dropout_p=0.1, checkpointing=False, device=device,
            **common,
        )
        for name, size, shape in zip(names, sizes, (llama, gpt2), strict=True)
    )  # fmt: skip
    return [layer, replace(layer, checkpointing=True), model]
