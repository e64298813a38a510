"""Tiny experts of Transformers, one of every kind that its experts interface has."""

import types

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

EXPERTS, HIDDEN, INNER, TOP_K, TOKENS, R = 5, 16, 24, 2, 11, 3
# By another name in every family.
SIZES = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS),
    **{"moe_num_experts": EXPERTS, "hidden_size": HIDDEN, "moe_hidden_size": HIDDEN},
    **{"intermediate_size": INNER, "moe_intermediate_size": INNER, "moe_latent_size": None},
    **{"hidden_act": "silu", "mlp_hidden_act": "relu2", "post_norm_eps": 1e-6},
    **{"swiglu_alpha": 1.702, "swiglu_limit": 7.0, "_experts_implementation": "grouped_mm"},
}
FAMILIES = {
    "mixtral": MixtralExperts,
    "qwen3_moe": Qwen3MoeExperts,
    "gpt_oss": GptOssExperts,  # transposed, interleaved, with biases
    "aria": AriaExperts,  # transposed
    "nemotron_h": NemotronHExperts,  # without a gate
    "muse_spark": MuseSparkExperts,  # a norm behind the experts
}
COMMON = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS = {
    "mixtral": lambda: MixtralConfig(num_local_experts=4, **COMMON),
    "qwen3_moe": lambda: Qwen3MoeConfig(num_experts=4, moe_intermediate_size=20, **COMMON),
}
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


class Holder(nn.Module):
    """A model of one experts module."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, *args, **kwargs) -> Tensor:
        return self.experts(*args, **kwargs)


class Made(TorchDispatchMode):
    """The numbers of elements of the tensors that operators made, beside those of their inputs."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.elements.append(tensor.numel())
        return out


def up_name(family: str) -> str:
    return "up_proj" if family == "nemotron_h" else "gate_up_proj"


def experts(family: str, dtype: torch.dtype = torch.float64, **sizes) -> nn.Module:
    """An experts module with drawn weights."""
    module = FAMILIES[family](types.SimpleNamespace(**(SIZES | sizes)))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module.to(dtype)


def drawn(model: nn.Module) -> nn.Module:
    """model, with factors that are not zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model


def inputs(dtype: torch.dtype = torch.float64, tokens: int = TOKENS):
    """x, and the experts of each token with their weights."""
    x = torch.randn(tokens, HIDDEN, dtype=dtype).requires_grad_()
    weights, ids = torch.rand(tokens, EXPERTS, dtype=dtype).topk(TOP_K)
    return x, ids, weights.requires_grad_()


def whole(kind: str) -> nn.Module:
    """A causal language model with two layers of experts."""
    return AutoModelForCausalLM.from_config(CONFIGS[kind]())
