"""Whole layers and models: one Llama-3-8B decoder layer, GPT-2 medium; random weights.

A cell's model takes hidden states [batch, tokens, width] and returns hidden states. Every
implementation puts the same adapters into a copy of the same model, a layer of its own in the place
of each linear.
"""

import copy
import functools
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import lora_kernels
from bench import accuracy, implementations, peers
from bench.implementations import FLOOR, Implementation
from lora_kernels.checks import dtype_name
from lora_kernels.spec import LoraSpec, OutputSplits
from lora_kernels.testing.problem import Problem
from lora_kernels.tuning.rows import BOTH, EAGER, OURS
from lora_kernels.tuning.shapes import DTYPES

__all__ = ["MODEL_IMPLEMENTATIONS", "ModelCell", "ModelSubject", "model_cells", "put"]

CHECKED_TOKENS = 64
SCALING = 2.0
QUERY_AND_VALUE = (True, False, True)  # of c_attn, as the paper's GPT-2 experiments have it


@dataclass(frozen=True)
class ModelCell:
    """Forward + backward of one model on hidden states [batch, tokens, width]."""

    model: str
    config: tuple[tuple[str, int], ...]
    batch: int
    tokens: int
    r: int
    device: str
    dropout_p: float = 0.1
    checkpointing: bool = False
    mode: str = BOTH
    execution: str = EAGER

    @property
    def dtype_name(self) -> str:
        """The dtype as rows have it."""
        return dtype_name(DTYPES[self.device])

    def __str__(self) -> str:
        checkpointing = " checkpointing" if self.checkpointing else ""
        return (
            f"{self.model} {self.batch}x{self.tokens} r{self.r} p{self.dropout_p:g} "
            f"{self.dtype_name} {self.device}{checkpointing}"
        )

    def fields(self) -> dict:
        """What a result row says of this cell."""
        own = {**vars(self), "config": dict(self.config), "dtype": self.dtype_name}
        return {"kind": "model", "cell": str(self), "m": self.batch * self.tokens, **own}


class ModelSubject:
    """The model of a cell, and adapters {path: (a, b)} for the linears that get one."""

    copies = 1

    def __init__(self, cell: ModelCell):
        self.cell = cell
        dtype = DTYPES[cell.device]
        torch.manual_seed(0)
        with torch.device(cell.device):
            self.model = Backbone(cell).to(dtype)
            self.adapters = {
                path: _draw_adapter(cell.r, _weight(linear), splits)
                for path, (linear, splits) in _targets(self.model).items()
            }
            size = cell.batch, cell.tokens, self.model.inner.config.hidden_size
            self.x, self.dy = (torch.randn(size).to(dtype) for _ in range(2))

    def build(self, implementation: Implementation) -> nn.Module:
        """The model with the implementation's layers."""
        return self._built(self.model, implementation.build, self.cell.dropout_p)

    def check(self, implementation: Implementation) -> None:
        """Without dropout and on few tokens: y, dx and the gradients of all factors."""
        labels, exact, baseline = self._expected
        actual = self._solve(self.model, implementation.build)
        if implementation.name == FLOOR:
            return  # it is the model itself, which the others are checked against
        accuracy.compare(implementation.name, labels, actual, exact, baseline)

    @functools.cached_property
    def _expected(self) -> tuple[list[str], tuple, tuple]:
        formula = put(peers.Formula)
        labels = ["y", "dx", *(f"d{name} of {path}" for path in self.adapters for name in "ab")]
        exact = self._solve(copy.deepcopy(self.model).double(), formula)
        return labels, exact, self._solve(self.model, formula)

    def _solve(self, model: nn.Module, build: Callable) -> tuple[Tensor, ...]:
        dtype = next(model.parameters()).dtype
        x, dy = (t[:1, :CHECKED_TOKENS].detach().to(dtype) for t in (self.x, self.dy))
        return accuracy.solve(self._built(model, build, dropout_p=0.0), x, dy)

    def _built(self, model: nn.Module, build: Callable, dropout_p: float) -> nn.Module:
        built = copy.deepcopy(model).requires_grad_(False)
        build(built, self.adapters, dropout_p)
        gc.collect()  # the layers that were replaced
        return built.train()


class Backbone(nn.Module):
    """A transformer from hidden states to hidden states."""

    def __init__(self, cell: ModelCell):
        import transformers as hf

        super().__init__()
        common = {**dict(cell.config), "vocab_size": 8, "attn_implementation": "sdpa"}
        if _is_llama(cell):
            config = hf.LlamaConfig(
                **common, num_hidden_layers=1, pad_token_id=None,
                max_position_embeddings=cell.tokens,
            )  # fmt: skip
            self.inner = hf.LlamaModel(config)
        else:
            config = hf.GPT2Config(
                **common, n_positions=cell.tokens, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
            )
            self.inner = hf.GPT2Model(config)
        if cell.checkpointing:
            self.inner.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(inputs_embeds=x, use_cache=False).last_hidden_state


def _is_llama(cell: ModelCell) -> bool:
    return cell.model.startswith("llama")


def _targets(model: nn.Module) -> dict[str, tuple[nn.Module, OutputSplits]]:
    """The linears that get an adapter and their groups: all of a Llama, c_attn of a GPT-2."""
    targets = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            targets[path] = module, OutputSplits.whole(module.out_features)
        elif path.endswith("c_attn"):
            columns = module.weight.shape[1]
            targets[path] = module, OutputSplits((columns // 3,) * 3, QUERY_AND_VALUE)
    return targets


def _weight(linear: nn.Module) -> Tensor:
    """[N, K] of an nn.Linear or of a Conv1D of transformers, which stores [K, N]."""
    return linear.weight if isinstance(linear, nn.Linear) else linear.weight.T


def _draw_adapter(r: int, weight: Tensor, splits: OutputSplits) -> tuple[Tensor, Tensor]:
    k = weight.shape[1]
    # b is small beside the weight, as a trained update is: deep stacks stay in range.
    return torch.randn(r * splits.count, k) * k**-0.5, torch.randn(splits.rows, r) * 0.01


def put(build: Callable[[Problem], nn.Module]) -> Callable[[nn.Module, Mapping, float], None]:
    """Puts the layer that build makes of its operands in the place of each linear of a model."""

    def put_layers(model, adapters, dropout_p):
        for path, (linear, splits) in _targets(model).items():
            weight, spec = _weight(linear), LoraSpec(SCALING, dropout_p, splits)
            a, b = (factor.to(weight.dtype) for factor in adapters[path])
            problem = Problem(None, weight, a, b, linear.bias, dy=None, seed=None, spec=spec)
            model.set_submodule(path, build(problem))

    return put_layers


def _put_nothing(model, adapters, dropout_p) -> None:
    """The floor: the frozen model."""


def _put_shared(model, adapters, dropout_p) -> None:
    """q, k and v, and gate and up, in one call each."""
    put(implementations.ours)(model, adapters, dropout_p)
    lora_kernels.share_inputs(model)


MODEL_IMPLEMENTATIONS = (
    Implementation(FLOOR, _put_nothing, always=True),
    Implementation("loralib", put(implementations.loralib), needs="loralib"),
    # Over the groups of c_attn PEFT has one adapter, so it takes no part there.
    Implementation("peft", put(implementations.peft), _is_llama, needs="peft"),
    Implementation(f"{OURS}[shared inputs]", _put_shared, _is_llama),
    Implementation(OURS, put(implementations.ours), always=True),
)


def model_cells(device: str) -> list[ModelCell]:
    """The real sizes on a GPU; on a CPU small ones, which prove that it runs."""
    if device == "cuda":
        small, llama, gpt2 = "", (4096, 14336, 32, 8), (1024, 24, 16)
        llama_tokens, gpt2_tokens, r = (4, 2048), (8, 1024), 16
    else:
        small, llama, gpt2 = " (small)", (256, 896, 4, 1), (128, 2, 4)
        llama_tokens, gpt2_tokens, r = (2, 128), (2, 128), 8
    names = "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"
    config = tuple(zip(names, llama, strict=True))
    layer = ModelCell(f"llama3-8b-layer{small}", config, *llama_tokens, r, device)
    config = tuple(zip(("n_embd", "n_layer", "n_head"), gpt2, strict=True))
    model = ModelCell(f"gpt2-medium{small}", config, *gpt2_tokens, r, device)
    return [layer, replace(layer, checkpointing=True), model]
